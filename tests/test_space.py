"""Room is promised on every filesystem that a capture takes from, or on none."""

import os
import threading
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from hypemand.backends.base import BackendUnavailable, Room
from hypemand.engine.space import Filesystem, NoRoomError, Space, measure
from tests.fakes import FakeRoom
from tests.virtual_time import VirtualClock

ONE, TWO, OTHER = Path("/one/a"), Path("/one/b"), Path("/other")


@pytest.fixture
def disks() -> FakeRoom:
    return FakeRoom(free_bytes=1000, others={OTHER: Filesystem(2, 500)})


@pytest.fixture
def space(disks: FakeRoom) -> Space:
    return Space(disks.measure)


@asynccontextmanager
async def promise_of(space: Space, rooms: Collection[Room], min_free: int) -> AsyncIterator[None]:
    with space.promise() as promise:
        await promise.fill(rooms, min_free)
        yield


def promised(space: Space) -> dict[int, int]:
    return {number: size for number, size in space._reserved.items() if size}


async def test_rooms_on_one_filesystem_add_up(space: Space) -> None:
    async with promise_of(space, (Room(ONE, 400), Room(TWO, 600)), 0):
        assert promised(space) == {1: 1000}
    assert promised(space) == {}
    with pytest.raises(NoRoomError, match="at /one/a and /one/b: 1000 B free, the capture needs 1001 B"):
        async with promise_of(space, (Room(ONE, 401), Room(TWO, 600)), 0):
            pytest.fail("there is no room")
    assert promised(space) == {}


async def test_each_filesystem_has_its_own_room(space: Space) -> None:
    async with promise_of(space, (Room(ONE, 900), Room(OTHER, 400)), 100):
        assert promised(space) == {1: 900, 2: 400}
    assert promised(space) == {}


@pytest.mark.parametrize(
    ("rooms", "path", "other"),
    [
        ((Room(ONE, 10), Room(OTHER, 401)), OTHER, ONE),
        ((Room(OTHER, 401), Room(ONE, 10)), OTHER, ONE),
        ((Room(ONE, 901), Room(OTHER, 10)), ONE, OTHER),
    ],
)
async def test_where_one_is_too_full_none_is_promised_and_it_is_named_alone(
    space: Space, rooms: tuple[Room, ...], path: Path, other: Path
) -> None:
    with pytest.raises(NoRoomError) as caught:
        async with promise_of(space, rooms, 100):
            pytest.fail("there is no room")
    assert f"too little room at {path}: " in str(caught.value)
    assert "100 B must be left over (runs.min_free)" in str(caught.value)
    assert str(other) not in str(caught.value)
    assert promised(space) == {}


async def test_what_is_promised_to_others_counts_on_its_own_filesystem(space: Space) -> None:
    async with promise_of(space, (Room(ONE, 300), Room(OTHER, 300)), 0):
        async with promise_of(space, (Room(TWO, 700), Room(OTHER, 200)), 0):
            assert promised(space) == {1: 1000, 2: 500}
        assert promised(space) == {1: 300, 2: 300}
        with pytest.raises(NoRoomError, match="at /other: 500 B free, 300 B are promised to captures under way"):
            async with promise_of(space, (Room(TWO, 700), Room(OTHER, 201)), 0):
                pytest.fail("there is no room")
        assert promised(space) == {1: 300, 2: 300}


async def test_without_rooms_nothing_is_measured_and_nothing_promised(space: Space, disks: FakeRoom) -> None:
    disks.free_bytes, disks.hangs = 0, 1
    async with promise_of(space, (), 10**9):
        assert promised(space) == {}
    assert disks.hangs == 1


async def test_an_error_under_way_gives_the_room_back(space: Space) -> None:
    with pytest.raises(ZeroDivisionError):
        async with promise_of(space, (Room(ONE, 1000), Room(OTHER, 500)), 0):
            raise ZeroDivisionError
    async with promise_of(space, (Room(ONE, 1000), Room(OTHER, 500)), 0):
        assert promised(space) == {1: 1000, 2: 500}


async def test_filesystems_that_hang_take_no_longer_for_being_many(
    space: Space, disks: FakeRoom, autojump_clock: MockClock
) -> None:
    disks.hangs = 9
    with pytest.raises(BackendUnavailable, match="free space"):
        async with promise_of(space, [Room(Path(f"/{number}"), 1) for number in range(9)], 0):
            pytest.fail("nothing is known of the room")
    assert trio.current_time() == 10
    assert promised(space) == {}


async def test_directories_of_one_filesystem_are_measured_as_one(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    whole, part = await measure(tmp_path), await measure(tmp_path / "a")
    assert whole.id == part.id
    assert whole.free_bytes > 0
    with pytest.raises(FileNotFoundError):
        await measure(tmp_path / "b")


async def test_those_who_ask_while_it_is_looked_share_the_next_look(
    space: Space, disks: FakeRoom, monkeypatch: pytest.MonkeyPatch, virtual_clock: VirtualClock
) -> None:
    looks: list[float] = []
    reserved: list[float] = []

    async def slow(path: Path) -> Filesystem:
        looks.append(trio.current_time())
        await trio.sleep(1)
        return await disks.measure(path)

    async def reserve(after_s: float) -> None:
        await trio.sleep(after_s)
        async with promise_of(space, (Room(ONE, 1),), 0):
            reserved.append(trio.current_time())

    space = Space(slow)
    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(reserve, number / 20)
    assert looks == [0, 1]
    assert reserved == [1, *[2] * 19]


async def test_a_look_that_fails_or_is_given_up_is_nobody_elses(disks: FakeRoom, virtual_clock: VirtualClock) -> None:
    tries = 0

    async def faulty(path: Path) -> Filesystem:
        nonlocal tries
        tries += 1
        await trio.sleep(1)
        if tries == 2:
            raise OSError("gone")
        return await disks.measure(path)

    space = Space(faulty)
    failed: list[str] = []

    async def reserve() -> None:
        try:
            async with promise_of(space, (Room(ONE, 1),), 0):
                pass
        except OSError as error:
            failed.append(str(error))

    async with trio.open_nursery() as nursery:
        with trio.move_on_after(0.5):
            nursery.start_soon(reserve)
            nursery.start_soon(reserve)
            async with promise_of(space, (Room(ONE, 1),), 0):  # looks before they begin
                pytest.fail("it was given up before")
    assert failed == ["gone"]
    assert tries == 3
    assert promised(space) == {}


async def test_a_filesystem_that_hangs_takes_no_thread_from_others_however_often_it_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, statvfs = threading.Event(), os.statvfs
    hung = tmp_path / "hung"
    hung.mkdir()

    def hanging(path: Path) -> os.statvfs_result:
        if path == hung:
            go_on.wait(30)
        return statvfs(path)

    monkeypatch.setattr(os, "statvfs", hanging)
    try:
        for _ in range(5):
            with trio.move_on_after(0.02):
                await measure(hung)
        assert trio.to_thread.current_default_thread_limiter().borrowed_tokens == 0
        with trio.fail_after(10):
            assert (await measure(tmp_path)).id == tmp_path.stat().st_dev
            go_on.set()
            assert (await measure(hung)).id == tmp_path.stat().st_dev
    finally:
        go_on.set()
