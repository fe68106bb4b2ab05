"""Which snapshots of a schedule are no longer kept, and why. Deciding only: the engine deletes."""

from collections.abc import Collection, Iterator, Sequence
from datetime import datetime, timedelta

from attrs import evolve, frozen

from hypemand.core.duration import format_duration
from hypemand.core.model import InstanceId, Retention, Snapshot
from hypemand.core.naming import is_scheduled

CLOCK_SLACK = timedelta(minutes=5)
"""A snapshot dated further ahead of now than this was made under a wrong clock."""


@frozen
class Expired:
    """A snapshot that the retention no longer keeps, with at least one reason."""

    snapshot: Snapshot
    reasons: tuple[str, ...]


def scheduled_only(instance: InstanceId, snapshots: Collection[Snapshot]) -> tuple[Snapshot, ...]:
    """The snapshots that schedules of *instance* made: by both tags, the only ones that may be pruned."""
    return tuple(s for s in snapshots if s.instance_id == instance and is_scheduled(instance, s.tags))


def future_dated(snapshots: Collection[Snapshot], now: datetime) -> tuple[Snapshot, ...]:
    """Snapshots dated more than `CLOCK_SLACK` ahead of *now*: neither counted nor deleted."""
    return tuple(s for s in snapshots if s.created_at > now + CLOCK_SLACK)


def select_expired(
    snapshots: Collection[Snapshot],
    retention: Retention,
    *,
    now: datetime,
    protected: Collection[str],
    made: Sequence[str] = (),
) -> tuple[Expired, ...]:
    """Pick the snapshots that *retention* no longer keeps. Either limit expires.

    One that was dated by a clock that stood too early counts as made when the
    one after it was: it is neither taken for the oldest nor for too old.

    Args:
        snapshots: Scheduled snapshots of one instance, in any order.
        now: Aware UTC.
        protected: Ids that never expire; they count towards ``max_count``.
        made: Ids in the order in which they were made, as far as that is known.

    Returns:
        Oldest first, each with its reasons (never empty).
    """
    dated = [s for s in snapshots if s.created_at <= now + CLOCK_SLACK]
    made_at = _made_at(dated, made, now)
    ranks = {snapshot_id: rank for rank, snapshot_id in enumerate(made)}
    newest_first = sorted(dated, key=lambda s: (made_at[s.id], ranks.get(s.id, -1), s.id), reverse=True)
    expired = []
    for rank, snapshot in enumerate(newest_first, start=1):
        reasons = tuple(_reasons(rank, made_at[snapshot.id], retention, now))
        if reasons and snapshot.id not in protected:
            expired.append(Expired(snapshot, reasons))
    return tuple(reversed(expired))


def _made_at(snapshots: Collection[Snapshot], made: Sequence[str], now: datetime) -> dict[str, datetime]:
    """When each was made, at the latest: its date, or, where one made before it has a later date, that of the next.

    The last ones count as made *now* where their dates can't be right.
    """
    made_at = {snapshot.id: snapshot.created_at for snapshot in snapshots}
    latest: datetime | None = None
    unsure: list[str] = []
    for snapshot_id in (one for one in made if one in made_at):
        if latest is not None and made_at[snapshot_id] < latest:
            unsure.append(snapshot_id)
            continue
        latest = made_at[snapshot_id]
        made_at.update(dict.fromkeys(unsure, latest))
        unsure.clear()
    made_at.update(dict.fromkeys(unsure, now))
    return made_at


def _reasons(rank: int, made_at: datetime, retention: Retention, now: datetime) -> Iterator[str]:
    if retention.max_count and rank > retention.max_count:
        yield f"max_count {retention.max_count}: it is number {rank}, counted from the newest"
    if retention.max_age and made_at < now - retention.max_age:
        age = timedelta(seconds=(now - made_at) // timedelta(seconds=1))
        yield f"max_age {format_duration(retention.max_age)}: it is {format_duration(age)} old"


def without_age(retention: Retention) -> Retention:
    """*retention* as it applies while the clock can't be trusted: nothing expires by age."""
    return evolve(retention, max_age=None)


def outlived(snapshots: Collection[Snapshot], retention: Retention) -> bool:
    """Whether the schedule of an instance that is gone has nothing left to do.

    By Hypeman's rule: no scheduled snapshot is left, or, with ``max_count``
    alone, no more than ``max_count`` are, which would stay for ever.
    """
    if not snapshots:
        return True
    return not retention.max_age and bool(retention.max_count) and len(snapshots) <= (retention.max_count or 0)
