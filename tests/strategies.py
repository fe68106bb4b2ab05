"""Hypothesis strategies for the rules' values. Instants are aware UTC, as everywhere."""

from datetime import UTC, datetime, timedelta
from string import ascii_letters, ascii_lowercase, digits
from typing import Any

from attrs import fields_dict
from hypothesis import strategies as st

from hypemand.core.cadence import MIN_INTERVAL
from hypemand.core.model import (
    InstanceId,
    ManagedBy,
    RestoreAction,
    RestoreStep,
    Retention,
    Schedule,
    Settings,
    Snapshot,
    SnapshotKind,
)
from hypemand.core.naming import PREFIX_MAX, TAG_KEY_MAX, TAG_VALUE_MAX, scheduled_tags

NOW = datetime(2026, 3, 9, 1, tzinfo=UTC)
"""The present of tests that need just one."""

WEB = InstanceId("web-1")

_ID_START = ascii_letters + digits + "_-"
_TAG_TEXT = ascii_letters + digits + " _.:/=+@-"
_COMMON_INTERVALS = tuple(timedelta(minutes=minutes) for minutes in (1, 15, 60, 24 * 60, 7 * 24 * 60))

int64s = st.integers(-(2**63), 2**63 - 1)


def instants(first_year: int = 2000, last_year: int = 2100) -> st.SearchStrategy[datetime]:
    first, last = datetime(first_year, 1, 1, tzinfo=UTC), datetime(last_year, 12, 31, tzinfo=UTC)
    # Hypothesis wants its bounds naive.
    return st.datetimes(first.replace(tzinfo=None), last.replace(tzinfo=None), timezones=st.just(UTC))


def durations(
    shortest: timedelta = timedelta(0), longest: timedelta = timedelta(days=10 * 366)
) -> st.SearchStrategy[timedelta]:
    return st.timedeltas(shortest, longest)


def intervals(longest: timedelta = timedelta(days=366)) -> st.SearchStrategy[timedelta]:
    return st.sampled_from(_COMMON_INTERVALS) | st.timedeltas(MIN_INTERVAL, longest)


def times_of_day() -> st.SearchStrategy[str]:
    return st.builds("{:02}:{:02}".format, st.integers(0, 23), st.integers(0, 59))


def instance_ids() -> st.SearchStrategy[InstanceId]:
    rest = st.text(_ID_START + ".", max_size=127)
    return st.builds(lambda first, more: InstanceId(first + more), st.sampled_from(_ID_START), rest)


def prefixes() -> st.SearchStrategy[str]:
    return st.text(ascii_lowercase + digits + "-", min_size=1, max_size=PREFIX_MAX).filter(
        lambda text: not text.startswith("-") and not text.endswith("-")
    )


def metadata() -> st.SearchStrategy[dict[str, str]]:
    keys = st.text(_TAG_TEXT, min_size=1, max_size=TAG_KEY_MAX)
    return st.dictionaries(keys, st.text(_TAG_TEXT, max_size=TAG_VALUE_MAX), max_size=4)


def json_values() -> st.SearchStrategy[Any]:
    leaves = st.none() | st.booleans() | int64s | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
    return st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=5,
    )


def extras(cls: type[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Keys that a document of *cls* may have beside those known; ``extra`` itself is such a one."""
    known = fields_dict(cls).keys() - {"extra"}
    keys = st.just("extra") | st.text(max_size=12).filter(lambda key: key not in known)
    return st.dictionaries(keys, json_values(), max_size=2)


def retentions() -> st.SearchStrategy[Retention]:
    return st.builds(
        Retention,
        max_age=st.none() | durations(),
        max_count=st.none() | st.integers(0, 20) | st.integers(0, 2**63 - 1),
        extra=extras(Retention),
    )


def settings() -> st.SearchStrategy[Settings]:
    return st.builds(
        Settings,
        first_run=st.none() | st.just("now") | times_of_day(),
        max_freeze=st.none() | durations(timedelta.resolution),
        enabled=st.booleans(),
        extra=extras(Settings),
    )


def schedules() -> st.SearchStrategy[Schedule]:
    texts = st.none() | st.text(max_size=20)
    return st.builds(
        Schedule,
        instance_id=instance_ids(),
        interval=intervals(),
        retention=retentions(),
        created_at=instants(),
        updated_at=instants(),
        next_run_at=instants(),
        last_run_at=st.none() | instants(),
        last_error=texts,
        last_snapshot_id=texts,
        metadata=metadata(),
        name_prefix=st.none() | st.just("") | prefixes(),
        backend=texts,
        managed_by=st.sampled_from(ManagedBy),
        settings=settings(),
        gone_since_at=st.none() | instants(),
        extra=extras(Schedule),
    )


def restore_steps() -> st.SearchStrategy[tuple[RestoreStep, ...]]:
    steps = st.builds(RestoreStep, st.sampled_from(RestoreAction), st.text(max_size=40))
    return st.lists(steps, max_size=3).map(tuple)


def snapshots(instance: InstanceId = WEB, now: datetime = NOW) -> st.SearchStrategy[Snapshot]:
    """Scheduled snapshots of *instance*, minutes apart and often at the same one, some of them ahead of *now*."""
    return st.builds(
        lambda number, minutes, kind, restore: Snapshot(
            id=f"run-{number}",
            instance_id=instance,
            name=f"scheduled-{number}",
            kind=kind,
            created_at=now - timedelta(minutes=minutes),
            size_bytes=number,
            tags=scheduled_tags(instance, {}),
            restore=restore,
        ),
        st.integers(0, 999),
        st.integers(-15, 60) | st.integers(-(10**6), 10**6),
        st.sampled_from(SnapshotKind),
        restore_steps(),
    )


def snapshot_lists(
    instance: InstanceId = WEB, now: datetime = NOW, most: int = 12
) -> st.SearchStrategy[list[Snapshot]]:
    return st.lists(snapshots(instance, now), max_size=most, unique_by=lambda snapshot: snapshot.id)


def small_retentions() -> st.SearchStrategy[Retention]:
    """Limits of the size of `snapshot_lists`, so that they often bite."""
    return st.builds(
        Retention,
        max_age=st.none() | st.integers(0, 60).map(lambda minutes: timedelta(minutes=minutes)) | durations(),
        max_count=st.none() | st.integers(0, 14),
    )
