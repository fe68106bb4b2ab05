"""When a schedule runs: first run, jitter, the fixed grid, and what a downtime or a clock jump does to it.

Jitter and grid are those of Hypeman's own scheduler (lib/scheduledsnapshots
there), so that a schedule moved between the two keeps its times.
"""

import re
from datetime import UTC, datetime, time, timedelta, tzinfo

from attrs import frozen

from hypemand.core.duration import to_ns
from hypemand.core.errors import RuleBroken
from hypemand.core.model import InstanceId, Schedule

MIN_INTERVAL = timedelta(minutes=1)
MAX_JITTER_NS = 5 * 60 * 1_000_000_000
_FNV_OFFSET = 0xCBF29CE484222325
_FNV_PRIME = 0x100000001B3
_TIME_OF_DAY = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])")


def jitter_ns(instance: str, interval_ns: int) -> int:
    """FNV-1a-64 of the id modulo the smaller of a tenth of the interval and 5 minutes, in nanoseconds."""
    window = min(interval_ns // 10, MAX_JITTER_NS)
    if window <= 0:
        return 0
    digest = _FNV_OFFSET
    for byte in instance.encode():
        digest = ((digest ^ byte) * _FNV_PRIME) & 0xFFFFFFFFFFFFFFFF
    return digest % window


def jitter(instance: str, interval: timedelta) -> timedelta:
    """`jitter_ns` as a timedelta, cut to microseconds: the same for the same instance, so a fleet spreads out."""
    return timedelta(microseconds=jitter_ns(instance, to_ns(interval)) // 1000)


def stale_after(instance: str, interval: timedelta) -> timedelta:
    """How old the last good snapshot may become, or the schedule without one: two intervals, and the jitter."""
    return 2 * interval + jitter(instance, interval)


def check_first_run(value: object) -> str:
    """*value*, if it says when a schedule runs first: ``now`` or a local time of day ``HH:MM``.

    Raises:
        RuleBroken: Anything else.
    """
    if isinstance(value, str) and (value == "now" or _TIME_OF_DAY.fullmatch(value)):
        return value
    raise RuleBroken(f'{value!r} must be "now" or a local time of day like "02:00"')


def first_run(
    instance: InstanceId, interval: timedelta, *, now: datetime, wanted: str | None, zone: tzinfo
) -> datetime:
    """First slot of a new cadence: *wanted*, or ``now + interval + jitter`` where nothing is wanted.

    Args:
        now: Aware UTC.
        wanted: ``now``, ``HH:MM`` in *zone* (its next occurrence), or None.
    """
    if wanted is None:
        return now + interval + jitter(instance, interval)
    if wanted == "now":
        return now
    local = now.astimezone(zone)
    of_day = time.fromisoformat(wanted)
    for days in (0, 1, 2):  # two, for a day on which the clock leaves that time out
        at = datetime.combine(local.date() + timedelta(days=days), of_day, zone).astimezone(UTC)
        if at > now:
            return at
    raise AssertionError("a time of day occurs within two days")  # pragma: no cover


@frozen
class Slot:
    """The next slot of a grid, strictly in the future, and how many were passed over on the way."""

    next_run_at: datetime
    missed: int


def next_slot(due_at: datetime, interval: timedelta, now: datetime) -> Slot:
    """The slot after a run that was due at *due_at*: the smallest multiple of *interval* on, later than *now*."""
    if now < due_at:
        return Slot(due_at + interval, 0)
    missed = (now - due_at) // interval
    return Slot(due_at + (missed + 1) * interval, missed)


def reanchor(schedule: Schedule, now: datetime, next_run_at: datetime | None = None) -> datetime:
    """*next_run_at*, or that of *schedule*, brought back onto its grid when it lies too far ahead.

    That is further than one interval and the jitter. It happens when a clock
    was wrong once, or somebody edited the file. A first run at a time of day
    may lie up to a day ahead of a short interval.
    """
    reach = schedule.interval + jitter(schedule.instance_id, schedule.interval)
    awaits_time_of_day = schedule.last_run_at is None and schedule.settings.first_run not in (None, "now")
    if awaits_time_of_day:
        reach = max(reach, timedelta(hours=26))  # a day on which clocks are set back, and slack
    at = next_run_at or schedule.next_run_at
    ahead = at - now
    if ahead <= reach:
        return at
    whole = (ahead - timedelta.resolution) // schedule.interval  # one less when it would land on now itself
    return at - whole * schedule.interval
