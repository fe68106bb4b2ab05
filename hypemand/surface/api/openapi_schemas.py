"""The documents of the API as JSON schemas: their patterns admit only what the rules of `core` take."""

from typing import Any

from hypemand.core.fields import MAX_COUNT_LIMIT
from hypemand.core.model import Outcome, SnapshotKind, Trigger
from hypemand.core.naming import PREFIX_MAX, TAG_KEY_MAX, TAG_VALUE_MAX, TAGS_MAX

# Whether a duration is long enough takes arithmetic that patterns can't do, and so does an overflow. These have a term
# of at least a minute by itself, and few enough terms and digits; the server takes all durations of Go besides.
_FRACTION = r"(\.[0-9]{1,9})?"
_TERM = rf"([0-9]{{1,5}}{_FRACTION}h|[0-9]{{1,7}}{_FRACTION}(m|s|ms|us|ns))"
_LONG_TERM = (
    rf"([1-9][0-9]{{0,4}}{_FRACTION}h|[1-9][0-9]{{0,6}}{_FRACTION}m|([6-9][0-9]|[1-9][0-9]{{2,6}}){_FRACTION}s)"
)
INTERVAL = rf"^{_TERM}{{0,4}}{_LONG_TERM}{_TERM}{{0,4}}$"
MAX_AGE = rf"^(0|{_TERM}{{1,9}})$"
WRITTEN_DURATION = r"^([0-9]+h)?([0-9]+m)?([0-9]+(\.[0-9]+)?(s|ms|us))?$"
INSTANCE_ID = r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}$"
_TAG_TEXT = "[A-Za-z0-9 _.:/=+@-]"
TAG_KEY = rf"^{_TAG_TEXT}{{1,{TAG_KEY_MAX}}}$"
TAG_VALUE = rf"^{_TAG_TEXT}{{0,{TAG_VALUE_MAX}}}$"
NAME_PREFIX = rf"^([a-z0-9]([a-z0-9-]{{0,{PREFIX_MAX - 2}}}[a-z0-9])?)?$"

INSTANCE = "qilviffnqzck2jrim1x6s2b1"
_ASKED = {
    "interval": "24h",
    "retention": {"max_age": "168h", "max_count": 7},
    "metadata": {"team": "backend", "env": "staging"},
    "name_prefix": "nightly",
}
_SCHEDULE = {
    "created_at": "2026-03-09T01:00:00Z",
    "instance_id": INSTANCE,
    "next_run_at": "2026-03-10T02:00:00Z",
    "updated_at": "2026-03-09T01:30:00Z",
    "last_error": "invalid state transition: stopped snapshot requires source in Stopped, got Running",
    "last_run_at": "2026-03-09T02:00:00Z",
    "last_snapshot_id": "q7z1w7l2af4l8y7q1h7g2m3s",
    **_ASKED,
}

Document = dict[str, Any]


def text(description: str, **more: Any) -> Document:
    """A schema of strings."""
    return {"type": "string", "description": description, **more}


def _time(description: str) -> Document:
    return text(description, format="date-time", pattern="Z$")


def object_of(required: tuple[str, ...], properties: Document, **more: Any) -> Document:
    """A schema of objects that have *properties* and no others."""
    return {
        "type": "object",
        "required": list(required),
        "properties": properties,
        "additionalProperties": False,
        **more,
    }


def ref(kind: str, name: str) -> Document:
    """A reference to a component of the document."""
    return {"$ref": f"#/components/{kind}/{name}"}


_METADATA = {
    "type": "object",
    "description": "User-defined key-value tags.",
    "maxProperties": TAGS_MAX,
    "propertyNames": {"pattern": TAG_KEY},
    "additionalProperties": {"type": "string", "pattern": TAG_VALUE},
}
_MAX_COUNT = {
    "type": "integer",
    "format": "int64",
    "minimum": 0,
    "maximum": MAX_COUNT_LIMIT,
    "description": "Keep at most this many scheduled snapshots (0 is no limit by count).",
}
_PREFIX = "Prefix of scheduled snapshots' names; `scheduled` where it is not set."
_RETENTION = "Automatic cleanup policy for scheduled snapshots. Without any limit all are kept."


def _nullable(*kinds: str, **more: Any) -> Document:
    return {"type": [*kinds, "null"], **more}


def schemas() -> Document:
    """The schemas among the document's components."""
    schedule = {
        "instance_id": text("Source instance ID.", pattern=INSTANCE_ID),
        "interval": text("Snapshot interval (Go duration format).", pattern=WRITTEN_DURATION, minLength=2),
        "retention": object_of(
            (),
            {
                "max_age": text("Scheduled snapshots older than this go.", pattern=WRITTEN_DURATION, minLength=2),
                "max_count": _MAX_COUNT,
            },
            description=_RETENTION,
        ),
        "created_at": _time("Schedule creation timestamp."),
        "updated_at": _time("Schedule update timestamp."),
        "next_run_at": _time("Next scheduled run time."),
        "last_run_at": _time("Last schedule execution time."),
        "last_error": text("Last schedule run error, if any."),
        "last_snapshot_id": text("Snapshot ID produced by the last successful run."),
        "metadata": _METADATA,
        "name_prefix": text(_PREFIX, pattern=NAME_PREFIX, minLength=1),
    }
    asked = {
        "interval": text(
            "Snapshot interval: a Go duration of at least 1m. The pattern is the part of them that needs no adding up.",
            pattern=INTERVAL,
        ),
        "retention": object_of(
            (),
            {
                "max_age": text("Scheduled snapshots older than this Go duration go (0 is no limit by age).")
                | {"pattern": MAX_AGE},
                "max_count": _MAX_COUNT,
            },
            description=_RETENTION,
        ),
        "metadata": _METADATA,
        "name_prefix": _nullable("string", pattern=NAME_PREFIX, description=_PREFIX),
    }
    return {
        "SnapshotSchedule": object_of(tuple(schedule)[:6], schedule, examples=[_SCHEDULE]),
        "SetSnapshotScheduleRequest": object_of(
            ("interval",), asked, examples=[_ASKED, {"interval": "24h", "retention": {}}, {"interval": "1h30m"}]
        ),
        "Run": _run_schema(),
        "Error": object_of(("code", "message"), {"code": text("What kind of error."), "message": text("For people.")}),
        "Health": object_of(("status",), {"status": {"const": "ok"}}),
    }


def _run_schema() -> Document:
    pruned = object_of(
        ("snapshot_id", "reasons"),
        {"snapshot_id": {"type": "string"}, "reasons": {"type": "array", "items": {"type": "string"}}},
    )
    seconds = _nullable("number", minimum=0)
    properties = {
        "run_id": {"type": "string"},
        "instance_id": {"type": "string"},
        "due_at": _time("When it was due, or asked for."),
        "started_at": _time("When it began."),
        "finished_at": _time("When it was over."),
        "outcome": {"enum": [str(word) for word in Outcome]},
        "trigger": {"enum": [str(word) for word in Trigger]},
        "kind": {"enum": [*(str(word) for word in SnapshotKind), None]},
        "snapshot_id": _nullable("string"),
        "snapshot_name": _nullable("string"),
        "size_bytes": _nullable("integer"),
        "freeze_s": {**seconds, "description": "How long the guest stood still."},
        "found_frozen": {"type": "boolean"},
        "capture_s": seconds,
        "late_s": {"type": "number"},
        "missed": {"type": "integer", "minimum": 0},
        "pruned": {"type": "array", "items": pruned},
        "error": _nullable("string"),
        "warnings": {"type": "array", "items": {"type": "string"}},
    }
    return object_of(tuple(properties), properties, description="A line of the history.")
