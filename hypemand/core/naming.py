"""Names and tags: what an instance, a prefix, a snapshot and a tag may be called.

Limits are those of Hypeman (lib/scheduledsnapshots and lib/tags there).
"""

import re
import sys
from collections.abc import Collection, Mapping
from datetime import datetime, timedelta
from functools import lru_cache

from hypemand.core.errors import RuleBroken, RulesBroken
from hypemand.core.model import InstanceId

DEFAULT_PREFIX = "scheduled"
PREFIX_MAX = 47
TAGS_MAX = 50
TAG_KEY_MAX = 128
TAG_VALUE_MAX = 256
SCHEDULED_TAG = "hypeman.scheduled"
INSTANCE_TAG = "hypeman.schedule_instance_id"

_INSTANCE_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
_PREFIX = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
_TAG_TEXT = re.compile(r"[A-Za-z0-9 _.:/=+@-]*")


def check_instance_id(value: object) -> InstanceId:
    """*value*, if it may name an instance (and so a file).

    Raises:
        RuleBroken: Empty, longer than 128, a leading dot, or another character.
    """
    if isinstance(value, str) and _INSTANCE_ID.fullmatch(value):
        return InstanceId(value)
    raise RuleBroken(f"{_shown(value)} must be 1 to 128 of A-Z a-z 0-9 . _ - without a leading dot")


def check_prefix(value: object) -> str:
    """*value*, if it may start a snapshot's name. An empty one stands for the default.

    Raises:
        RuleBroken: Longer than 47, not lower-case letters, digits and dashes, or a dash at an end.
    """
    if not isinstance(value, str):
        raise RuleBroken(f"{_shown(value)} must be a string")
    if len(value) > PREFIX_MAX:
        raise RuleBroken(f"has {len(value)} characters, {PREFIX_MAX} at most are allowed")
    if value and not _PREFIX.fullmatch(value):
        raise RuleBroken(f"{value!r} must be lower-case letters, digits and dashes, no dash at either end")
    return sys.intern(value)


def check_metadata(value: object) -> Mapping[str, str]:
    """*value*, if it can be kept as a snapshot's tags.

    Raises:
        RuleBroken, RulesBroken: Not a table, more than 50 tags, a key not 1 to
            128 or a value not 0 to 256 of the allowed characters.
    """
    if not isinstance(value, Mapping):
        raise RuleBroken(f"{_shown(value)} must be a table of strings")
    try:
        return _checked_metadata(tuple(value.items()))
    except TypeError:  # what can't be hashed is no text
        return _check_metadata(value)


@lru_cache(maxsize=1000)
def _checked_metadata(items: tuple[tuple[object, object], ...]) -> Mapping[str, str]:
    """One object of all that are the same, as those of many schedules are. Only texts equal texts."""
    return _check_metadata(dict(items))


def _check_metadata(value: Mapping[object, object]) -> Mapping[str, str]:
    broken = [problem for key, text in value.items() for problem in _tag_problems(key, text)]
    if len(value) > TAGS_MAX:
        broken.insert(0, RuleBroken(f"has {len(value)} tags, {TAGS_MAX} at most are allowed"))
    if broken:
        raise RulesBroken(broken)
    return {str(key): str(text) for key, text in value.items()}


def _tag_problems(key: object, text: object) -> list[RuleBroken]:
    problems = []
    where = _shown(key) if isinstance(key, str) else repr(key)
    if not isinstance(key, str) or not 1 <= len(key) <= TAG_KEY_MAX or not _TAG_TEXT.fullmatch(key):
        problems.append(RuleBroken(f"tag key {where} must be 1 to {TAG_KEY_MAX} of A-Z a-z 0-9 space _ . : / = + @ -"))
    if not isinstance(text, str) or len(text) > TAG_VALUE_MAX or not _TAG_TEXT.fullmatch(text):
        problems.append(
            RuleBroken(
                f"{_shown(text)} must be a string of 0 to {TAG_VALUE_MAX} of A-Z a-z 0-9 space _ . : / = + @ -",
                subpath=str(key),
            )
        )
    return problems


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text) - 2} characters)"


def scheduled_tags(instance: InstanceId, metadata: Mapping[str, str]) -> dict[str, str]:
    """Tags of a scheduled snapshot: the schedule's metadata and the two that mark it as scheduled."""
    return {**metadata, SCHEDULED_TAG: "true", INSTANCE_TAG: instance}


def is_scheduled(instance: InstanceId, tags: Mapping[str, str]) -> bool:
    """Whether *tags* are those of a snapshot that a schedule of *instance* made. Only such are ever pruned."""
    return tags.get(SCHEDULED_TAG) == "true" and tags.get(INSTANCE_TAG) == instance


def snapshot_name(prefix: str | None, run_at: datetime, taken: Collection[str] = ()) -> str:
    """``{prefix or "scheduled"}-{YYYYMMDD-HHMMSS}`` of *run_at*, aware UTC.

    A name in *taken* moves on to the next free second.
    """
    while True:
        name = f"{prefix or DEFAULT_PREFIX}-{run_at:%Y%m%d-%H%M%S}"
        if name not in taken:
            return name
        run_at += timedelta(seconds=1)
