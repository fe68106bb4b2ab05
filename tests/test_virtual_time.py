"""The clock of tests in virtual time: nobody waits, and things happen at the times of trio's own mock clock."""

import random
import time
from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock

from tests.virtual_time import VirtualClock

Clock = VirtualClock | MockClock


async def _sleepers(seed: int) -> list[tuple[float, int]]:
    """Tasks that sleep, give up waiting and wake each other; who woke when."""
    rng = random.Random(seed)
    woken: list[tuple[float, int]] = []
    bell = trio.Event()

    async def sleeper(number: int, naps: list[float]) -> None:
        for nap in naps:
            with trio.move_on_after(nap):
                await (bell.wait() if number % 3 == 0 else trio.sleep(2 * nap))
            woken.append((round(trio.current_time(), 6), number))
        if number == 1:
            bell.set()

    async with trio.open_nursery() as nursery:
        for number in range(9):
            nursery.start_soon(sleeper, number, [rng.uniform(0.001, 10_000) for _ in range(20)])
    return sorted(woken)  # trio shuffles what wakes at one time


@pytest.mark.parametrize("seed", range(5))
def test_sleepers_wake_at_the_times_of_the_mock_clock(seed: int) -> None:
    ours = trio.run(_sleepers, seed, clock=VirtualClock())
    assert ours == trio.run(_sleepers, seed, clock=MockClock(autojump_threshold=0))
    assert len(ours) == 180


def test_a_year_takes_no_time() -> None:
    began = time.monotonic()
    trio.run(trio.sleep, 365 * 24 * 3600.0, clock=VirtualClock())
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(
    "make", [VirtualClock, lambda: MockClock(autojump_threshold=0)], ids=["ours", "the mock clock"]
)
def test_time_stands_still_while_a_task_can_run(make: Callable[[], Clock]) -> None:
    clock = make()

    async def busy() -> list[float]:
        times = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep, 5)
            for _ in range(100):
                await trio.lowlevel.checkpoint()
                times.append(trio.current_time())
        return [*times, trio.current_time()]

    *meanwhile, after = trio.run(busy, clock=clock)
    assert set(meanwhile) == {0.0}
    assert after == 5.0


def test_a_jump_lets_pass_what_was_due_meanwhile() -> None:
    clock = VirtualClock()

    async def jumping() -> tuple[bool, float]:
        with trio.move_on_after(10) as scope:
            clock.jump(30)
            await trio.sleep(1)
        return scope.cancelled_caught, trio.current_time()

    assert trio.run(jumping, clock=clock) == (True, 30.0)
