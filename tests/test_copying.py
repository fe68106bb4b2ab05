"""Copying a guest's file: whole, sparse, and stopped at once when nobody wants it any more."""

import errno
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from hypemand.backends.base import CaptureFailed
from hypemand.backends.copying import CHUNK, copy_file, data_bytes
from hypemand.backends.meter import Meter

MIB = 1 << 20


@pytest.fixture
def tiny_filesystem(tmp_path: Path) -> Iterator[Path]:
    """A filesystem that 256 KiB fill."""
    where = tmp_path / "tiny"
    where.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", where], check=False, capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no filesystem can be mounted here: {mounted.stderr.strip()}")
    yield where
    subprocess.run(["umount", where], check=True)


def copy_threads(target: Path) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == f"copy {target}"]


def begun(target: Path) -> bool:
    return target.exists() and target.stat().st_blocks > 0


async def eventually(condition: Callable[[], bool]) -> None:
    with trio.fail_after(10):
        while not condition():
            await trio.sleep(0.01)


@pytest.mark.parametrize("size", [0, 1, 4097, CHUNK, 2 * CHUNK + 12345])
@pytest.mark.parametrize("rate", [None, 1 << 40])
async def test_the_copy_has_the_content_of_its_source(tmp_path: Path, size: int, rate: int | None) -> None:
    content = os.urandom(size)
    (tmp_path / "disk").write_bytes(content)
    assert await copy_file(tmp_path / "disk", tmp_path / "copy", rate=rate) == size
    assert (tmp_path / "copy").read_bytes() == content


@pytest.mark.parametrize("rate", [None, 1 << 40])
async def test_holes_stay_holes(tmp_path: Path, rate: int | None) -> None:
    source, target = tmp_path / "disk", tmp_path / "copy"
    with source.open("wb") as file:
        file.seek(16 * MIB)
        file.write(os.urandom(MIB))
        file.seek(40 * MIB)
        file.write(b"end")
        file.truncate(64 * MIB)
    if source.stat().st_blocks * 512 > 8 * MIB:
        pytest.skip("this filesystem knows of no holes")
    assert await copy_file(source, target, rate=rate) == 64 * MIB
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_blocks * 512 <= 8 * MIB


async def test_a_file_that_is_one_hole_is_copied(tmp_path: Path) -> None:
    with (tmp_path / "disk").open("wb") as file:
        file.truncate(MIB)
    assert await copy_file(tmp_path / "disk", tmp_path / "copy") == MIB
    assert (tmp_path / "copy").read_bytes() == bytes(MIB)


async def test_a_copy_onto_another_filesystem_has_the_content_of_its_source(tmp_path: Path) -> None:
    target = Path("/dev/shm") / f"hypemand-test-{os.getpid()}"
    if not target.parent.is_dir():
        pytest.skip("no /dev/shm here")
    content = os.urandom(CHUNK + 1)
    (tmp_path / "disk").write_bytes(content)
    try:
        await copy_file(tmp_path / "disk", target)
        assert target.read_bytes() == content
    finally:
        target.unlink()


async def test_a_copy_is_for_its_owner_alone(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"secret")
    (tmp_path / "disk").chmod(0o644)
    await copy_file(tmp_path / "disk", tmp_path / "copy")
    assert (tmp_path / "copy").stat().st_mode & 0o777 == 0o600


async def test_a_rate_holds_the_copy_back(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(os.urandom(MIB))
    began = time.monotonic()
    await copy_file(tmp_path / "disk", tmp_path / "copy", rate=4 * MIB)
    assert time.monotonic() - began >= 0.24


async def test_a_cancelled_copy_returns_at_once_and_its_thread_ends(tmp_path: Path) -> None:
    source, target = tmp_path / "disk", tmp_path / "copy"
    source.write_bytes(os.urandom(MIB))
    # Ten minutes for the whole, and a minute for a chunk.
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: copy_file(source, target, rate=MIB // 600))
            await eventually(lambda: begun(target))
            nursery.cancel_scope.cancel()
    await eventually(lambda: not copy_threads(target))
    assert target.stat().st_blocks * 512 < MIB


async def test_a_copy_that_waits_for_a_hung_source_can_be_cancelled_and_makes_no_file_later(tmp_path: Path) -> None:
    source, target = tmp_path / "pipe", tmp_path / "copy"
    os.mkfifo(source)  # to open it waits for a writer
    with trio.move_on_after(0.1) as scope:
        await copy_file(source, target)
    assert scope.cancelled_caught
    assert copy_threads(target)
    with source.open("wb"):  # now the source answers, too late
        pass
    await eventually(lambda: not copy_threads(target))
    assert not target.exists()


async def test_hung_copies_take_no_threads_from_others(tmp_path: Path) -> None:
    source = tmp_path / "pipe"
    os.mkfifo(source)
    total = int(trio.to_thread.current_default_thread_limiter().total_tokens) + 1
    with trio.move_on_after(0.2):
        async with trio.open_nursery() as nursery:
            for number in range(total):
                nursery.start_soon(copy_file, source, tmp_path / str(number))
    with trio.fail_after(10):
        assert await trio.to_thread.run_sync(lambda: "a thread was free") == "a thread was free"
    # A writer that stays until all of them have opened it.
    with source.open("wb"):
        await eventually(lambda: not any(copy_threads(tmp_path / str(number)) for number in range(total)))


async def test_a_full_filesystem_is_named(tmp_path: Path, tiny_filesystem: Path) -> None:
    (tmp_path / "disk").write_bytes(os.urandom(MIB))
    with pytest.raises(CaptureFailed, match=f"{tiny_filesystem} is full.*{os.strerror(errno.ENOSPC)}"):
        await copy_file(tmp_path / "disk", tiny_filesystem / "copy")


async def test_a_missing_source_fails_the_capture_and_makes_no_file(tmp_path: Path) -> None:
    with pytest.raises(CaptureFailed, match=f"{tmp_path / 'disk'} .*No such file"):
        await copy_file(tmp_path / "disk", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


async def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"new")
    (tmp_path / "copy").write_bytes(b"somebody's")
    with pytest.raises(CaptureFailed, match="File exists"):
        await copy_file(tmp_path / "disk", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"somebody's"


@pytest.mark.parametrize("rate", [None, 1 << 40])
async def test_a_meter_takes_what_was_copied_without_holes(tmp_path: Path, rate: int | None) -> None:
    with (tmp_path / "disk").open("wb") as file:
        file.write(os.urandom(MIB))
        file.truncate(64 * MIB)
    meter = Meter(total_bytes=data_bytes(tmp_path / "disk"))
    await copy_file(tmp_path / "disk", tmp_path / "copy", rate=rate, meter=meter)
    assert meter.done_bytes == meter.total_bytes == MIB


async def test_a_meter_tells_how_far_a_copy_is_while_it_goes_on(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(os.urandom(MIB))
    meter = Meter(total_bytes=MIB)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: copy_file(tmp_path / "disk", tmp_path / "copy", rate=MIB, meter=meter))
            await eventually(lambda: meter.done_bytes > 0)
            assert meter.done_bytes < MIB
            scope.cancel()
