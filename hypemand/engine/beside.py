"""What goes on beside captures: copies are told of, and slots given back whose freeze budget is over.

One task for all of them: a thousand captures at once would have a thousand.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import trio
from attrs import define

from hypemand.backends.meter import Meter
from hypemand.engine.events import Step, TellStep
from hypemand.engine.slots import Slot

LOOK_EVERY_S = 1.0


@define(eq=False)
class _Capture:
    slot: Slot
    release_at: float
    meter: Meter
    tell: TellStep
    told_bytes: int = 0

    def look(self, now: float) -> None:
        if now >= self.release_at:
            self.slot.release()
        if self.meter.done_bytes > self.told_bytes:
            self.told_bytes = done = self.meter.done_bytes
            self.tell(Step.COPYING, done_bytes=done, total_bytes=max(done, self.meter.total_bytes))


class Beside:
    """The captures under way. *background* outlives them."""

    def __init__(self, background: trio.Nursery) -> None:
        self._background = background
        self._captures: set[_Capture] = set()
        self._looks = False

    @contextmanager
    def look_after(self, slot: Slot, within_s: float, meter: Meter, tell: TellStep) -> Iterator[None]:
        """In the block a capture goes on, which has *slot* for *within_s*, or a second longer; copies are told."""
        capture = _Capture(slot, trio.current_time() + within_s, meter, tell)
        self._captures.add(capture)
        if not self._looks:
            self._looks = True
            self._background.start_soon(self._look)
        try:
            yield
        finally:
            self._captures.discard(capture)

    async def _look(self) -> None:
        try:
            while self._captures:
                now = trio.current_time()
                soonest = min(capture.release_at for capture in self._captures) - now
                await trio.sleep(min(soonest, LOOK_EVERY_S) if soonest > 0 else LOOK_EVERY_S)
                for capture in [*self._captures]:
                    capture.look(trio.current_time())
        finally:
            self._looks = False
