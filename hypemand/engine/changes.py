"""What a client's PUT makes of a schedule."""

from datetime import datetime

from attrs import Factory, evolve, frozen

from hypemand.config import RetentionEntry
from hypemand.core.model import InstanceId, Interval, ManagedBy, Metadata, NamePrefix, Retention, Schedule
from hypemand.engine.reconcile import put_back


@frozen(kw_only=True)
class SetSchedule:
    """What a PUT asks for: all that a client may set.

    Hypeman's documents require the retention, but its Go client leaves an empty one out.
    """

    interval: Interval
    retention: RetentionEntry = Factory(RetentionEntry)
    metadata: Metadata = Factory(dict)
    name_prefix: NamePrefix | None = None

    @property
    def prefix(self) -> str | None:
        """The name prefix; an empty one is none."""
        return self.name_prefix or None

    def kept(self, before: Retention) -> Retention:
        """The retention as schedules have it; keys of *before* that this version does not know are kept."""
        return Retention(self.retention.max_age, self.retention.max_count, before.extra)


@frozen
class Home:
    """The backend of an instance. *sure*: it has just said that it knows it."""

    name: str
    sure: bool


def changed(
    instance: InstanceId,
    wanted: SetSchedule,
    *,
    present: Schedule | None,
    retired: Schedule | None,
    home: Home,
    now: datetime,
    first: datetime,
) -> Schedule:
    """The schedule as *wanted*, from what there is or was of it.

    Args:
        first: When its first run would be, on a cadence that begins now.
    """
    before = present or retired
    if before is None:
        return Schedule(
            instance_id=instance,
            interval=wanted.interval,
            retention=wanted.kept(Retention()),
            created_at=now,
            updated_at=now,
            next_run_at=first,
            metadata=wanted.metadata,
            name_prefix=wanted.prefix,
            backend=home.name,
            managed_by=ManagedBy.API,
        )
    after = evolve(
        before,
        interval=wanted.interval,
        retention=wanted.kept(before.retention),
        updated_at=now,
        next_run_at=before.next_run_at if wanted.interval == before.interval else first,
        metadata=wanted.metadata,
        name_prefix=wanted.prefix,
        backend=home.name,
        managed_by=ManagedBy.API,
        settings=evolve(before.settings, first_run=None, enabled=True),
        gone_since_at=None if home.sure else before.gone_since_at,
    )
    return after if present is not None else put_back(after, now)
