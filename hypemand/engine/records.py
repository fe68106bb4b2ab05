"""How long guests have stood still before, from the run log: what a capture that can't be interrupted is judged by."""

from collections.abc import Iterable
from datetime import datetime, timedelta

from attrs import define, field, frozen

from hypemand.backends.base import Capabilities
from hypemand.core.duration import format_duration
from hypemand.core.errors import HypemandError
from hypemand.core.model import Freezer, InstanceId, RunFinished, RunStarted
from hypemand.state.codec import Line


class OverBudgetError(HypemandError):
    """The instance has frozen for longer than its budget before, and its capture could not be interrupted."""


@frozen
class LongestFreeze:
    """How long a guest stood still, in the run that began at *at*."""

    freeze_s: float
    at: datetime


@frozen
class FreezeKey:
    """What freezes can be compared: of one instance, by one backend, in one way."""

    instance: InstanceId
    backend: str
    freezes: Freezer


@define
class FreezeRecords:
    """The longest freeze of each instance, backend and freezer that the run log still tells of.

    A guest that a recovery found frozen counts apart: it stood still for as
    long as hypemand was not there, which says nothing of the next capture.
    """

    _longest: dict[FreezeKey, LongestFreeze] = field(factory=dict)
    _found_frozen: dict[FreezeKey, LongestFreeze] = field(factory=dict)
    _latest: dict[tuple[InstanceId, str], Freezer] = field(factory=dict)

    def learn(self, lines: Iterable[Line]) -> None:
        """Take in *lines* of the run log, oldest first. One whose started line is lost is passed over."""
        started: dict[str, RunStarted] = {}
        for line in lines:
            if isinstance(line, RunStarted):
                started[line.run_id] = line
            elif line.run_id in started:
                self.finished(started.pop(line.run_id), line)

    def finished(self, started: RunStarted, run: RunFinished) -> None:
        """Take in how *run* ended."""
        if started.freezes is None:
            return
        key = FreezeKey(started.instance_id, started.backend, started.freezes)
        self._latest[key.instance, key.backend] = key.freezes
        if run.freeze_s is None:
            return
        records = self._found_frozen if run.found_frozen else self._longest
        before = records.get(key)
        if before is None or run.freeze_s > before.freeze_s:
            records[key] = LongestFreeze(run.freeze_s, started.started_at)

    def longest(self, key: FreezeKey) -> LongestFreeze | None:
        """The longest freeze that a capture took, or None where none is known."""
        return self._longest.get(key)

    def longest_found(self, key: FreezeKey) -> LongestFreeze | None:
        """The longest that a recovery ended, or None."""
        return self._found_frozen.get(key)

    def latest_key(self, instance: InstanceId, backend: str) -> FreezeKey | None:
        """By what the guest was frozen last on *backend*, or None where it never was."""
        freezes = self._latest.get((instance, backend))
        return None if freezes is None else FreezeKey(instance, backend, freezes)


def can_abort(able: Capabilities, freezes: Freezer) -> bool:
    """Whether the engine ends a capture at the freeze budget.

    Only where it freezes the guest itself: of a freeze by the hypervisor it
    knows neither when it began nor whether giving up would end it.
    """
    return able.abortable and freezes is Freezer.ENGINE


def why_over_budget(longest: LongestFreeze | None, budget: timedelta) -> str | None:
    """Why a capture that can't be interrupted must not begin, and how to go on; None where it may."""
    if longest is None or longest.freeze_s <= budget.total_seconds():
        return None
    return (
        f"the guest froze for {longest.freeze_s:.1f} s on {longest.at:%Y-%m-%d}, longer than its max_freeze of"
        f" {format_duration(budget)}, and this capture can't be interrupted: set max_freeze to at least"
        f" {format_duration(enough_for(longest.freeze_s))}, or have the backend capture it in a way that freezes it"
        " for less or can be interrupted"
    )


def enough_for(freeze_s: float) -> timedelta:
    """A budget for a freeze of so long, in whole minutes, or in whole seconds below one."""
    unit = timedelta(minutes=1) if freeze_s > 60 else timedelta(seconds=1)
    return -(-timedelta(seconds=freeze_s) // unit) * unit
