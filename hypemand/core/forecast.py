"""What a schedule will do: its coming runs, and what each will prune."""

from collections.abc import Collection, Iterator, Sequence
from datetime import datetime, timedelta

from attrs import frozen

from hypemand.core.cadence import next_slot
from hypemand.core.model import Schedule, Snapshot, SnapshotKind
from hypemand.core.naming import scheduled_tags, snapshot_name
from hypemand.core.retention import Expired, select_expired


@frozen
class PlannedRun:
    """A run to come. *prunes* is what retention would delete after it, should every run until then succeed."""

    at: datetime
    snapshot_name: str
    prunes: tuple[Expired, ...]


def forecast(
    schedule: Schedule,
    snapshots: Collection[Snapshot],
    *,
    now: datetime,
    within: timedelta,
    made: Sequence[str] = (),
) -> Iterator[PlannedRun]:
    """The runs of *schedule* due until ``now + within``, in order; an overdue one is due now.

    Args:
        snapshots: Its scheduled snapshots as they are now.
        made: Their ids in the order in which they were made, as far as that is known.
    """
    in_order = [*made]
    kept = {snapshot.id: snapshot for snapshot in snapshots}
    names = {snapshot.name for snapshot in snapshots}
    at = max(schedule.next_run_at, now)
    due = schedule.next_run_at
    while at <= now + within:
        name = snapshot_name(schedule.name_prefix, at, names)
        names.add(name)
        kept[name] = Snapshot(
            id=name,
            instance_id=schedule.instance_id,
            name=name,
            kind=SnapshotKind.STANDBY,
            created_at=at,
            size_bytes=0,
            tags=scheduled_tags(schedule.instance_id, schedule.metadata),
        )
        in_order.append(name)
        prunes = select_expired(list(kept.values()), schedule.retention, now=at, protected={name}, made=in_order)
        for expired in prunes:
            del kept[expired.snapshot.id]
            names.discard(expired.snapshot.name)
            if expired.snapshot.id in in_order:
                in_order.remove(expired.snapshot.id)
        yield PlannedRun(at, name, prunes)
        due = next_slot(due, schedule.interval, at).next_run_at
        at = due
