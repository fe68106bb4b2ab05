"""The run log laid over a schedule: what a crash kept from the schedule's own file."""

from collections.abc import Iterable
from datetime import datetime

from attrs import evolve

from hypemand.core.cadence import next_slot
from hypemand.core.model import InstanceId, Outcome, RunFinished, RunStarted, Schedule, Trigger
from hypemand.state.codec import Line
from hypemand.state.lock import LockOwner


def lay_over(schedule: Schedule, lines: Iterable[Line], *, now: datetime | None = None) -> Schedule:
    """*schedule* with what *lines* say later than it does.

    Args:
        lines: Those of its instance, in the order of the log. Lines from
            before the schedule was made belong to an earlier one.
        now: Where it is known: a schedule that was made later than that was
            made under a wrong clock, and its date tells nothing.
    """
    misdated = now is not None and schedule.created_at > now
    for line in lines:
        if misdated or line.started_at >= schedule.created_at:
            schedule = _lay_line(schedule, line)
    return schedule


def _lay_line(schedule: Schedule, line: Line) -> Schedule:
    if line.trigger is Trigger.SCHEDULE:  # a run by hand uses up no slot
        schedule = advanced(schedule, line)
    if isinstance(line, RunStarted) or (schedule.last_run_at and schedule.last_run_at > line.started_at):
        return schedule
    return with_outcome(schedule, line)


def advanced(schedule: Schedule, line: Line) -> Schedule:
    """*schedule* with its slot after that of *line*, if its present one is used up by that.

    Slots that came due since then are not passed over: one of them is still to
    be run. A slot that is skipped while the run of an earlier one waits to
    begin uses up only itself.
    """
    skipped = isinstance(line, RunFinished) and line.outcome is Outcome.SKIPPED
    used = schedule.next_run_at == line.due_at if skipped else schedule.next_run_at <= line.due_at
    if not used:
        return schedule
    as_of = line.finished_at if isinstance(line, RunFinished) else line.started_at
    return evolve(schedule, next_run_at=next_slot(line.due_at, schedule.interval, as_of).next_run_at)


def with_outcome(schedule: Schedule, run: RunFinished) -> Schedule:
    """*schedule* with its ``last_*`` fields as *run* leaves them.

    A success clears the error, unless it has something to tell; a failure
    keeps the last snapshot; a skip changes nothing.
    """
    if run.outcome is Outcome.SKIPPED:
        return schedule
    return evolve(
        schedule,
        last_run_at=run.started_at,
        last_error=run.error,
        last_snapshot_id=run.snapshot_id or schedule.last_snapshot_id,
    )


def remembered(lines: Iterable[Line]) -> dict[InstanceId, RunFinished]:
    """The last run of each instance that *lines* tell of, skips aside, with the id of its last snapshot."""
    last: dict[InstanceId, RunFinished] = {}
    for line in lines:
        if isinstance(line, RunFinished) and line.outcome is not Outcome.SKIPPED:
            before = last.get(line.instance_id)
            snapshot_id = line.snapshot_id or (before.snapshot_id if before else None)
            last[line.instance_id] = evolve(line, snapshot_id=snapshot_id)
    return last


def under_way(run: RunStarted, schedule: Schedule | None, owner: LockOwner | None) -> bool:
    """Whether the holder of the state is at *run*, which is open: not left open by an earlier one, nor by itself.

    Args:
        schedule: That of its instance. A daemon that leaves a run open writes its start there.
    """
    if owner is None or owner.role != "daemon":
        return False
    left = schedule is not None and schedule.last_run_at == run.started_at
    return not left and (owner.since is None or run.started_at >= owner.since)
