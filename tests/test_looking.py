"""Looking again and again, beside the event loop and not in it."""

import threading

import pytest
import trio
import trio.testing

from hypemand.engine.looking import until

FOREVER_S = 3600.0


class Looks:
    """Holds from look number *holds_at* on; counts looks, by the threads that looked."""

    def __init__(self, holds_at: int) -> None:
        self.holds_at = holds_at
        self.threads: list[int] = []

    def __call__(self) -> bool:
        self.threads.append(threading.get_ident())
        return len(self.threads) >= self.holds_at


class Wakes(trio.abc.Instrument):
    """Counts how often the event loop had something to do."""

    count = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.count += 1


async def test_it_looks_until_it_holds_and_wakes_the_event_loop_only_then() -> None:
    looks, wakes = Looks(holds_at=50), Wakes()
    trio.lowlevel.add_instrument(wakes)
    with trio.fail_after(30):
        await until(looks, 0.005)
    trio.lowlevel.remove_instrument(wakes)
    assert len(looks.threads) == 50
    assert len({*looks.threads}) == 1
    assert threading.get_ident() not in looks.threads
    assert wakes.count < 10


async def test_it_waits_before_the_first_look() -> None:
    looks = Looks(holds_at=1)
    with trio.move_on_after(0.1) as patience:
        await until(looks, FOREVER_S)
    assert patience.cancelled_caught
    assert looks.threads == []


async def test_once_cancelled_it_looks_no_more_and_its_thread_ends() -> None:
    looks = Looks(holds_at=10**9)
    with trio.move_on_after(0.2):
        await until(looks, 0.005)
    await trio.sleep(0.1)
    before = len(looks.threads)
    assert before > 0
    await trio.sleep(0.1)
    assert len(looks.threads) == before


async def test_a_look_that_hangs_holds_up_neither_the_event_loop_nor_a_cancellation() -> None:
    hangs, go_on = threading.Event(), threading.Event()

    def hang() -> bool:
        hangs.set()
        return go_on.wait(30)

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(until, hang, 0.005)
            while not hangs.is_set():
                await trio.sleep(0.005)
            nursery.cancel_scope.cancel()
    assert not go_on.is_set()
    go_on.set()


async def test_any_number_may_hang_and_threads_are_left_for_others() -> None:
    async def watch() -> None:
        await until(lambda: False, FOREVER_S)

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            for _ in range(60):
                nursery.start_soon(watch)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert await trio.to_thread.run_sync(lambda: 7) == 7
            nursery.cancel_scope.cancel()


async def test_an_error_of_a_look_is_not_swallowed() -> None:
    def broken() -> bool:
        raise ZeroDivisionError

    with trio.fail_after(30), pytest.raises(ZeroDivisionError):
        await until(broken, 0.005)
