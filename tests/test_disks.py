"""The test disks: they do what a disk does, and fail when they are told to."""

import errno
import os
import threading
from functools import partial
from pathlib import Path

import pytest
import trio

from hypemand.state.files import Disk
from tests.disks import Crash, FaultyDisk, InlineDisk, LateDisk, UnsyncedDisk


def read_through(disk: Disk, path: Path) -> bytes:
    return disk.read(path)[0]


@pytest.mark.parametrize("kind", [InlineDisk, UnsyncedDisk, LateDisk, FaultyDisk])
async def test_work_is_done_in_the_thread_of_the_event_loop(kind: type[Disk]) -> None:
    assert await kind().call(threading.get_ident) == threading.get_ident()


@pytest.mark.parametrize("kind", [InlineDisk, UnsyncedDisk, LateDisk, FaultyDisk])
async def test_a_cancelled_call_does_nothing(kind: type[Disk], tmp_path: Path) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await kind().call((tmp_path / "made").touch)
    assert scope.cancelled_caught
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [InlineDisk, UnsyncedDisk, LateDisk, FaultyDisk])
async def test_calls_work_in_virtual_time(
    kind: type[Disk], tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    disk = kind()
    before = trio.current_time()
    await disk.call(disk.replace, tmp_path / "file", b"content")
    assert trio.current_time() == before
    assert await disk.call(read_through, disk, tmp_path / "file") == b"content"


async def test_a_late_disk_answers_once_its_gate_opens_but_works_at_once(tmp_path: Path) -> None:
    disk = LateDisk()
    disk.gate = gate = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(disk.call, (tmp_path / "made").touch))
        await trio.testing.wait_all_tasks_blocked()
        assert (tmp_path / "made").exists()
        assert len(nursery.child_tasks) == 1
        gate.set()


PATHS = ["make_directory", "read", "replace", "rename", "remove", "open_append", "sync_directory"]


def do(disk: Disk, operation: str, folder: Path) -> None:
    file = folder / "file"
    arguments: dict[str, tuple[object, ...]] = {
        "make_directory": (folder / "made",),
        "read": (file,),
        "replace": (file, b"new"),
        "rename": (file, folder / "renamed"),
        "remove": (file,),
        "open_append": (file,),
        "sync_directory": (folder,),
    }
    made = getattr(disk, operation)(*arguments[operation])
    if operation == "open_append":
        os.close(made)


@pytest.mark.parametrize("operation", PATHS)
def test_each_operation_fails_once_changing_nothing_and_then_works(operation: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    disk = FaultyDisk()
    disk.fail(operation, errno.EIO, once=True)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)) as caught:
        do(disk, operation, tmp_path)
    assert caught.value.errno == errno.EIO
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]
    do(disk, operation, tmp_path)
    assert disk.calls[operation] >= 2


@pytest.mark.parametrize("operation", PATHS)
def test_each_operation_fails_until_it_is_healed(operation: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    disk = FaultyDisk()
    disk.fail(operation)
    for _ in range(3):
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            do(disk, operation, tmp_path)
    disk.heal(operation)
    do(disk, operation, tmp_path)


def test_a_write_fails_after_just_so_many_bytes(tmp_path: Path) -> None:
    disk = FaultyDisk()
    disk.fail("write", errno.ENOSPC, once=True, after=3)
    descriptor = disk.open_append(tmp_path / "file")
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        disk.write(descriptor, b"abcdef")
    disk.write(descriptor, b"ghi")
    os.close(descriptor)
    assert (tmp_path / "file").read_bytes() == b"abcghi"


@pytest.mark.parametrize("operation", ["sync", "truncate"])
def test_operations_on_descriptors_fail_too(operation: str, tmp_path: Path) -> None:
    disk = FaultyDisk()
    descriptor = disk.open_append(tmp_path / "file")
    disk.write(descriptor, b"abc")
    disk.fail(operation, once=True)
    arguments = [0] if operation == "truncate" else []
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        getattr(disk, operation)(descriptor, *arguments)
    assert (tmp_path / "file").read_bytes() == b"abc"
    getattr(disk, operation)(descriptor, *arguments)
    os.close(descriptor)


def test_one_file_alone_can_be_bad_and_the_first_calls_good(tmp_path: Path) -> None:
    for name in ("good", "bad"):
        (tmp_path / name).write_bytes(b"")
    disk = FaultyDisk()
    disk.fail("read", name="bad", skip=1)
    disk.read(tmp_path / "good")
    disk.read(tmp_path / "bad")
    disk.read(tmp_path / "good")
    with pytest.raises(OSError, match="bad"):
        disk.read(tmp_path / "bad")


def test_a_crash_passes_through_what_catches_errors(tmp_path: Path) -> None:
    disk = FaultyDisk()
    disk.fail("rename", Crash())
    with pytest.raises(Crash):
        disk.replace(tmp_path / "file", b"new")
    assert not (tmp_path / "file").exists()


def test_an_operation_that_no_disk_has_is_a_mistake_in_the_test() -> None:
    with pytest.raises(AssertionError, match="wriet"):
        FaultyDisk().fail("wriet")


def test_operations_are_counted_in_order(tmp_path: Path) -> None:
    disk = FaultyDisk()
    disk.replace(tmp_path / "file", b"new")
    assert disk.calls["replace"] == disk.calls["write"] == disk.calls["rename"] == 1
    assert disk.order[0] == ("replace", tmp_path / "file")
    disk.forget()
    assert not disk.calls
    assert not disk.order
