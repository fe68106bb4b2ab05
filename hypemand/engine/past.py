"""What run log and schedules tell of the time before this start."""

from collections.abc import Iterable
from datetime import datetime

from hypemand.core.doubt import Reading
from hypemand.core.model import InstanceId, RunFinished
from hypemand.state.codec import Line
from hypemand.state.replay import lay_over
from hypemand.state.segments import LogContent
from hypemand.state.store import Store


def lay_over_all(store: Store, lines: Iterable[Line], now: datetime) -> None:
    """Bring the schedules of *store* up to what *lines* of the run log tell of their runs."""
    by_instance: dict[InstanceId, list[Line]] = {}
    for line in lines:
        by_instance.setdefault(line.instance_id, []).append(line)
    for instance, of_it in by_instance.items():
        schedule = store.schedules.get(instance)
        if schedule is not None and (after := lay_over(schedule, of_it, now=now)) != schedule:
            store.hold(after)


def readings(history: LogContent, store: Store) -> list[Reading]:
    """What the clocks showed whenever something was recorded, oldest first."""
    if not history.lines:
        updated = [schedule.updated_at for schedule in store.schedules.values()]
        return [Reading(max(updated))] if updated else []
    return [
        Reading(line.finished_at)
        if isinstance(line, RunFinished)
        else Reading(line.started_at, line.boot_id, line.boot_s)
        for line in history.lines
    ]


async def used_backends(history: LogContent, store: Store) -> frozenset[str]:
    """Names of backends through which something was captured before: their directories must be there already."""
    schedules = [*store.schedules.values(), *await store.all_retired()]
    of_schedules = {s.backend for s in schedules if s.backend and s.last_snapshot_id}
    return frozenset(of_schedules | {line.backend for line in history.started()})
