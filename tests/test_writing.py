"""Files that are written together: each by itself as far as it concerns whoever asked, one sync of their directory."""

import errno
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from hypemand.state.files import Signature
from hypemand.state.sure import SureEvent
from hypemand.state.turns import Turns
from hypemand.state.writing import MOST_TOGETHER, Writer
from tests.disks import FaultyDisk, LateDisk


class CountingDisk(LateDisk):
    """Late, and counts how many files each write has."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def replace_all(self, files: Sequence[tuple[Path, bytes]]) -> list[Signature | OSError]:
        self.sizes.append(len(files))
        return super().replace_all(files)


async def write_all(writer: Writer, directory: Path, count: int) -> None:
    async with trio.open_nursery() as nursery:
        for number in range(count):
            nursery.start_soon(writer.replace, directory / f"{number}", b"new")


async def test_what_waits_while_others_are_written_is_written_in_one_go(tmp_path: Path) -> None:
    disk = CountingDisk()
    disk.gate = trio.Event()
    writer = Writer(disk)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.replace, tmp_path / "first", b"new")
        await wait_all_tasks_blocked()
        nursery.start_soon(write_all, writer, tmp_path, MOST_TOGETHER + 10)
        await wait_all_tasks_blocked()
        disk.gate.set()
        disk.gate = None
    assert disk.sizes == [1, MOST_TOGETHER, 10]
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"new"}
    assert len(list(tmp_path.iterdir())) == MOST_TOGETHER + 11


async def test_many_files_of_a_directory_need_one_sync_of_it(tmp_path: Path) -> None:
    disk = FaultyDisk()
    await write_all(Writer(disk), tmp_path, 20)
    assert disk.calls["replace"] == 20
    assert disk.calls["sync_directory"] <= 2


@pytest.mark.parametrize("step", ["replace", "rename"])
async def test_one_that_cannot_be_written_is_nobody_elses_trouble(tmp_path: Path, step: str) -> None:
    disk = FaultyDisk()
    disk.fail(step, errno.ENOSPC, name="7" if step == "replace" else ".7.tmp")
    writer, errors = Writer(disk), dict[int, str]()

    async def replace(number: int) -> None:
        try:
            await writer.replace(tmp_path / f"{number}", b"new")
        except OSError as error:
            errors[number] = f"{error.strerror} {error.filename}"

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(replace, number)
    assert errors == {7: f"No space left on device {tmp_path / '7'}"}
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [n for n in range(20) if n != 7]


async def test_where_the_directory_cannot_be_synced_nobody_is_told_that_it_lasts(tmp_path: Path) -> None:
    disk = FaultyDisk()
    disk.fail("sync_directory")
    writer, failed = Writer(disk), Counter[str]()

    async def replace(number: int) -> None:
        with pytest.raises(OSError, match="Input/output error"):
            await writer.replace(tmp_path / f"{number}", b"new")
        failed["times"] += 1

    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(replace, number)
    assert failed["times"] == 5


async def test_a_write_that_was_asked_for_is_done_also_where_nobody_waits_any_more(tmp_path: Path) -> None:
    disk = LateDisk()
    disk.begins = trio.Event()
    writer = Writer(disk)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(write_all, writer, tmp_path, 3)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        disk.begins.set()
    assert len(list(tmp_path.iterdir())) == 3


async def test_where_no_thread_is_to_be_had_all_that_wait_are_told(tmp_path: Path) -> None:
    class Threadless(FaultyDisk):
        async def call(self, *_: object) -> None:  # type: ignore[override]
            await trio.lowlevel.checkpoint()
            raise RuntimeError("can't start new thread")

    writer, told = Writer(Threadless()), []

    async def replace(number: int) -> None:
        try:
            await writer.replace(tmp_path / f"{number}", b"new")
        except (RuntimeError, OSError) as error:
            told.append(str(error))

    async with trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(replace, number)
    assert len(told) == 3
    assert all("can't start new thread" in text for text in told)


async def test_a_sure_event_is_waited_for_by_whom_is_cancelled_and_wakes_all() -> None:
    event, woken = SureEvent(), list[int]()

    async def wait(number: int) -> None:
        await event.wait()
        woken.append(number)
        await trio.lowlevel.checkpoint()
        woken.append(-number)

    async with trio.open_nursery() as nursery:
        for number in (1, 2, 3):
            nursery.start_soon(wait, number)
            await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        assert woken == []
        event.set()
    assert sorted(woken) == [1, 2, 3]
    await event.wait()  # set already


async def test_turns_are_there_only_while_somebody_has_or_wants_them() -> None:
    turns, at_it, together = Turns[str](), list[str](), list[str]()

    async def take(key: str) -> None:
        async with turns.turn(key):
            assert key not in at_it
            at_it.append(key)
            together.append("".join(sorted(at_it)))
            await trio.sleep(0.01)
            at_it.remove(key)
            assert turns.is_taken(key)

    async with trio.open_nursery() as nursery:
        for key in ("a", "a", "a", "b"):
            nursery.start_soon(take, key)
    assert "ab" in together
    assert len(together) == 4
    assert not turns.is_taken("a")
    assert turns._locks == {}


async def test_a_turn_whose_holder_fails_or_is_cancelled_goes_on_to_the_next() -> None:
    turns = Turns[str]()
    with pytest.raises(ZeroDivisionError):
        async with turns.turn("a"):
            raise ZeroDivisionError
    async with turns.turn("a"):
        with trio.move_on_after(0) as hasty:
            async with turns.turn("a"):
                pytest.fail("somebody else has it")
        assert hasty.cancelled_caught
        assert turns.is_taken("a")
    assert turns._locks == {}
