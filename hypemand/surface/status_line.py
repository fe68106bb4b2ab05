"""How things are, in one line: what ``systemctl status`` shows beside the log."""

from collections.abc import Callable, Iterator

from attrs import define, field

from hypemand.core.fields import format_instant
from hypemand.core.model import Outcome
from hypemand.engine.engine import Engine
from hypemand.engine.events import Event, RunEnded

NAMED = 3
"""So many instances at most are named."""


@define(eq=False)
class StatusLine:
    """One line about *engine*. Have it `hear` the engine's events; it is cheap to ask again and again.

    Attributes:
        troubles: What keeps the daemon from working as it was told to, in few words.
    """

    engine: Engine
    troubles: Callable[[], Iterator[str]]
    _counted_of: int = field(init=False, default=-1)
    _failing: int = field(init=False, default=0)

    def hear(self, event: Event) -> None:
        """Take in what happens in the engine."""
        if isinstance(event, RunEnded):
            self._counted_of = -1

    def text(self) -> str:
        """For example: ``12 schedules; 1 run under way: web-1; next db-1 at 2026-03-09T02:00:00Z; 1 failing``."""
        return "; ".join(self._parts())

    def _parts(self) -> Iterator[str]:
        engine = self.engine
        yield _counted(len(engine.store.schedules), "schedule")
        busy = sorted(engine.scheduler.running)
        if busy:
            more = f" and {len(busy) - NAMED} more" if len(busy) > NAMED else ""
            yield f"{_counted(len(busy), 'run')} under way: {', '.join(busy[:NAMED])}{more}"
        following = engine.scheduler.next_start
        if following is not None:
            yield f"next {following[0]} at {format_instant(following[1].replace(microsecond=0))}"
        if self._count_failing():
            yield f"{self._failing} failing"
        left_open = len(engine.recovery.left_open)
        if left_open:
            yield f"{_counted(left_open, 'run')} not settled yet"
        yield from self.troubles()

    def _count_failing(self) -> int:
        """Schedules whose last run made no snapshot. Counted anew when a run has ended, for there may be many."""
        schedules = self.engine.store.schedules
        if self._counted_of != len(schedules):
            last = self.engine.recorder.latest.attempts
            runs = [last[instance] for instance in schedules if instance in last]
            self._failing = sum(run.outcome is not Outcome.SUCCEEDED for run in runs)
            self._counted_of = len(schedules)
        return self._failing


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"
