"""Files that survive: whole before and after, whatever fails in between."""

import errno
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from hypemand.state.files import Disk, Signature
from tests.disks import FaultyDisk

OLD, NEW = b"old content", b"new and longer content"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def open_umask() -> Iterator[None]:
    """A umask that takes nothing away."""
    before = os.umask(0)
    yield
    os.umask(before)


def test_replace_makes_and_replaces_the_whole_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (OLD, NEW, b"", bytes(range(256)) * 5000):
        Disk().replace(path, content)
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["schön 快照.json", "a\nb", "-rf", "%s{}", os.fsdecode(b"\xff\xfe.json")])
def test_names_are_taken_as_they_are(name: str, tmp_path: Path) -> None:
    path = tmp_path / "größe" / name
    Disk().make_directory(path.parent)
    Disk().replace(path, NEW)
    assert Disk().read(path)[0] == NEW
    Disk().rename(path, tmp_path / name)
    assert (tmp_path / name).read_bytes() == NEW
    Disk().remove(tmp_path / name)
    assert [entry.name for entry in tmp_path.iterdir()] == ["größe"]


def test_a_reader_sees_the_old_or_the_new_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    contents = [bytes([letter]) * size for letter, size in ((65, 70_000), (66, 3), (67, 200_000))]
    path.write_bytes(contents[0])
    stop = threading.Event()

    def replace_on_and_on() -> None:
        number = 0
        while not stop.is_set():
            Disk().replace(path, contents[number % 3])
            number += 1

    writer = threading.Thread(target=replace_on_and_on)
    writer.start()
    try:
        seen = {path.read_bytes() for _ in range(2000)}
    finally:
        stop.set()
        writer.join()
    assert seen <= set(contents)


@pytest.mark.parametrize("after", range(len(NEW) + 1))
def test_a_disk_that_fills_up_at_any_byte_leaves_the_old_and_no_temporary(after: int, tmp_path: Path) -> None:
    disk, path = FaultyDisk(), tmp_path / "file"
    path.write_bytes(OLD)
    disk.fail("write", errno.ENOSPC, after=after)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        disk.replace(path, NEW)
    assert path.read_bytes() == OLD
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("step", ["write", "sync", "rename"])
@pytest.mark.parametrize("there", [True, False])
def test_a_failure_at_each_step_leaves_the_old_and_no_temporary(step: str, there: bool, tmp_path: Path) -> None:
    disk, path = FaultyDisk(), tmp_path / "file"
    if there:
        path.write_bytes(OLD)
    disk.fail(step, errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        disk.replace(path, NEW)
    assert [(entry, entry.read_bytes()) for entry in tmp_path.iterdir()] == ([(path, OLD)] if there else [])


def test_a_target_that_cannot_be_replaced_leaves_no_temporary(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(IsADirectoryError):
        Disk().replace(tmp_path / "file", NEW)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_directory_that_cannot_be_synced_is_an_error_and_the_file_is_whole(tmp_path: Path) -> None:
    disk, path = FaultyDisk(), tmp_path / "file"
    path.write_bytes(OLD)
    disk.fail("sync_directory")
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        disk.replace(path, NEW)
    assert path.read_bytes() == NEW
    assert list(tmp_path.iterdir()) == [path]


def test_the_content_is_synced_before_the_name_changes_and_the_directory_after(tmp_path: Path) -> None:
    disk, path = FaultyDisk(), tmp_path / "file"
    disk.replace(path, NEW)
    done = [operation for operation, _ in disk.order]
    assert done[:4] == ["replace", "write", "sync", "rename"]
    assert ("sync", len(NEW)) in disk.order[:3]
    assert disk.order[4] == ("sync_directory", tmp_path)
    assert done[5] == "sync"


def test_files_are_open_to_their_owner_alone_whatever_the_umask(tmp_path: Path, open_umask: None) -> None:
    path = tmp_path / "file"
    path.write_bytes(OLD)
    path.chmod(0o666)
    Disk().replace(path, NEW)
    assert mode(path) == 0o600
    os.close(Disk().open_append(tmp_path / "log"))
    assert mode(tmp_path / "log") == 0o600


def test_directories_are_open_to_their_owner_alone_whatever_the_umask(tmp_path: Path, open_umask: None) -> None:
    made = tmp_path / "a" / "b"
    Disk().make_directory(made)
    assert mode(made) == 0o700
    made.chmod(0o755)
    Disk().make_directory(made)
    assert mode(made) == 0o700


def test_a_file_in_the_place_of_a_directory_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(OLD)
    with pytest.raises(FileExistsError):
        Disk().make_directory(tmp_path / "state")
    assert (tmp_path / "state").read_bytes() == OLD


def test_rename_syncs_the_directory_it_leaves_and_the_one_it_enters(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "here" / "file").write_bytes(OLD)
    disk = FaultyDisk()
    disk.rename(tmp_path / "here" / "file", tmp_path / "there" / "file")
    synced = {path for operation, path in disk.order if operation == "sync_directory"}
    assert synced == {tmp_path / "here", tmp_path / "there"}
    assert disk.calls["sync"] == 2
    assert (tmp_path / "there" / "file").read_bytes() == OLD


def test_rename_within_a_directory_syncs_it_once(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(OLD)
    disk = FaultyDisk()
    disk.rename(tmp_path / "a", tmp_path / "b")
    assert disk.calls["sync_directory"] == 1


def test_remove_is_durable_and_what_is_gone_already_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(OLD)
    disk = FaultyDisk()
    disk.remove(path)
    assert not path.exists()
    assert disk.order[1] == ("sync_directory", tmp_path)
    disk.remove(path)


def test_appends_go_to_the_end_wherever_the_file_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"one\ntwo\n")
    descriptor = Disk().open_append(path)
    Disk().write(descriptor, b"thr")
    Disk().truncate(descriptor, 4)
    Disk().write(descriptor, b"four\n")
    os.close(descriptor)
    assert path.read_bytes() == b"one\nfour\n"


def test_a_signature_tells_every_version_of_a_file_from_the_next(tmp_path: Path) -> None:
    path = tmp_path / "file"
    written = Disk().replace(path, OLD)
    assert Disk().read(path) == (OLD, written)
    assert Signature.of(path.stat()) == written
    again = Disk().replace(path, OLD)
    assert again != written
    path.write_bytes(OLD)
    os.utime(path, ns=(0, 1))
    assert Signature.of(path.stat()) != again


def test_descriptors_are_closed_also_after_failures(tmp_path: Path) -> None:
    disk = FaultyDisk()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for step in ("write", "sync", "rename", "sync_directory"):
        disk.fail(step, once=True)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            disk.replace(tmp_path / "file", NEW)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


async def test_calls_run_beside_the_event_loop(tmp_path: Path) -> None:
    assert await Disk().call(threading.get_ident) != threading.get_ident()


async def test_a_call_that_has_begun_is_not_cancelled(tmp_path: Path) -> None:
    began, go_on = threading.Event(), threading.Event()

    def work() -> int:
        began.set()
        assert go_on.wait(30)
        (tmp_path / "done").touch()
        return 7

    results: list[int] = []

    async def call(scope: trio.CancelScope) -> None:
        with scope:
            results.append(await Disk().call(work))

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            scope = trio.CancelScope()
            nursery.start_soon(call, scope)
            while not began.is_set():
                await trio.sleep(0.005)
            scope.cancel()
            go_on.set()
    assert results == [7]
    assert (tmp_path / "done").exists()


async def test_a_call_ahead_does_not_wait_for_what_waits_in_the_queue() -> None:
    disk, go_on = Disk(), threading.Event()
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(disk.call, go_on.wait, 30)
            await trio.sleep(0.05)
            assert await disk.call_ahead(str, 7) == "7"
            assert not go_on.is_set()
            go_on.set()


async def test_an_error_of_the_work_reaches_the_caller(tmp_path: Path) -> None:
    disk = Disk()
    with pytest.raises(FileNotFoundError):
        await disk.call(disk.read, tmp_path / "missing")


def test_what_is_written_again_is_the_same_and_whole_however_little_is_taken_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"0123456789")
    written: list[tuple[int, bytes]] = []
    pwrite = os.pwrite

    def little(descriptor: int, data: bytes, offset: int) -> int:
        written.append((offset, data[:3]))
        return pwrite(descriptor, data[:3], offset)

    monkeypatch.setattr(os, "pwrite", little)
    Disk().write_again(path, 2, 9)
    assert written == [(2, b"234"), (5, b"567"), (8, b"8")]
    assert path.read_bytes() == b"0123456789"


def test_a_file_that_has_become_shorter_is_not_made_longer_by_writing_it_again(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"01234")
    Disk().write_again(path, 3, 9)
    assert path.read_bytes() == b"01234"
