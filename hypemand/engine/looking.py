"""Looking at files again and again, which is most of what an idle daemon does."""

import threading
from collections.abc import Callable

import trio


async def until(holds: Callable[[], bool], every_s: float) -> None:
    """Return once *holds* does; it is asked each *every_s*, the first time after as long.

    A thread of its own asks and sleeps: the event loop is woken at the end
    alone, and a filesystem that hangs below the file holds up nobody. Once
    cancelled, the thread ends, as soon as *holds* returns.
    """
    over = threading.Event()

    def ask() -> None:
        while not over.wait(every_s) and not holds():
            pass

    try:
        await trio.to_thread.run_sync(ask, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1))
    finally:
        over.set()
