"""What a single field of a document may hold: one rule each, with a message that says what is wrong with the value."""

import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from hypemand.core.cadence import MIN_INTERVAL, check_first_run
from hypemand.core.duration import parse_duration
from hypemand.core.errors import RuleBroken
from hypemand.core.model import InstanceId
from hypemand.core.naming import check_instance_id, check_metadata, check_prefix
from hypemand.core.size import parse_size

MAX_COUNT_LIMIT = 2**63 - 1
"""Hypeman's counts have 64 bits; larger ones could not even be written to a file."""


def check_duration(value: object) -> timedelta:
    """*value*, a string holding a Go duration.

    Raises:
        RuleBroken: Anything else, a number included.
    """
    if not isinstance(value, str):
        raise RuleBroken(f'{value!r} must be a string holding a duration, like "90s", "15m" or "24h"')
    return parse_duration(value)


def check_interval(value: object) -> timedelta:
    """*value*, a duration of at least a minute.

    Raises:
        RuleBroken: Not a duration, or shorter.
    """
    interval = check_duration(value)
    if interval < MIN_INTERVAL:
        raise RuleBroken(f"{value!r} is too short: the interval must be at least 1m")
    return interval


def check_positive_duration(value: object) -> timedelta:
    """*value*, a duration above zero.

    Raises:
        RuleBroken: Not a duration, zero or negative.
    """
    duration = check_duration(value)
    if duration <= timedelta(0):
        raise RuleBroken(f"{value!r} must be more than zero")
    return duration


def check_max_age(value: object) -> timedelta:
    """*value*, a duration that is not negative; zero is no limit.

    Raises:
        RuleBroken: Not a duration, or negative.
    """
    age = check_duration(value)
    if age < timedelta(0):
        raise RuleBroken(f"{value!r} must not be negative; leave max_age out for no limit by age")
    return age


def check_max_count(value: object) -> int:
    """*value*, a whole number from 0 to `MAX_COUNT_LIMIT`; zero is no limit.

    Raises:
        RuleBroken: Anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise RuleBroken(f"{value!r} must be a whole number of 0 or more (0 is no limit by count)")
    if value > MAX_COUNT_LIMIT:
        raise RuleBroken(f"must be {MAX_COUNT_LIMIT} at most; leave it out for no limit by count")
    return value


def check_positive_int(value: object) -> int:
    """*value*, a whole number of at least one.

    Raises:
        RuleBroken: Anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise RuleBroken(f"{value!r} must be a whole number of 1 or more")
    return value


def check_instant(value: object) -> datetime:
    """*value*, an RFC 3339 time with its offset, as aware UTC; parts finer than a microsecond are cut off.

    Raises:
        RuleBroken: Not a time, no offset, or outside the years 1 to 9999.
    """
    try:
        instant = datetime.fromisoformat(value) if isinstance(value, str) else None
        if instant is not None and instant.tzinfo is not None:
            return instant.astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    raise RuleBroken(f'{value!r} must be a time with its offset, like "2026-03-09T01:00:00Z"')


def format_instant(instant: datetime) -> str:
    """RFC 3339 in UTC with ``Z``."""
    return instant.astimezone(UTC).isoformat().replace("+00:00", "Z")


def _exactly(wanted: type, word: str) -> Callable[[object], Any]:
    def check(value: object) -> Any:
        if type(value) is wanted:
            return value
        raise RuleBroken(f"{value!r} must be {word}")

    return check


def check_backend_name(value: object) -> str:
    """*value*, a string; one object of all that are the same, as many schedules have the same backend.

    Raises:
        RuleBroken: Anything else.
    """
    if type(value) is not str:
        raise RuleBroken(f"{value!r} must be a string")
    return sys.intern(value)


def check_path(value: object) -> Path:
    """*value*, a file name; ``~`` stands for the home directory.

    Raises:
        RuleBroken: Not a string, empty, with a NUL, or in the home directory of nobody.
    """
    if not isinstance(value, str) or not value or "\0" in value:
        raise RuleBroken(f"{value!r} must be a path")
    try:
        return Path(value).expanduser()
    except RuntimeError:
        raise RuleBroken(f"{value!r} must be a path, but there is no such home directory") from None


def _check_number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RuleBroken(f"{value!r} must be a number")
    return float(value)


RULES: dict[Any, Callable[[object], Any]] = {
    bool: _exactly(bool, "true or false"),
    int: _exactly(int, "a whole number"),
    str: _exactly(str, "a string"),
    float: _check_number,
    timedelta: check_duration,
    datetime: check_instant,
    Path: check_path,
    InstanceId: check_instance_id,
    "interval": check_interval,
    "positive duration": check_positive_duration,
    "max_age": check_max_age,
    "max_count": check_max_count,
    "positive int": check_positive_int,
    "name_prefix": check_prefix,
    "first_run": check_first_run,
    "size": parse_size,
    "metadata": check_metadata,
    "backend name": check_backend_name,
}
"""What a field may hold, by its type, or by the name that an Annotated type of `model` carries."""
