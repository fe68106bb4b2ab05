"""What the API serves, as an OpenAPI 3.1 document: its patterns admit only what the rules of `core` take."""

from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hypemand import __version__
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

_INSTANCE = "qilviffnqzck2jrim1x6s2b1"
_ASKED = {
    "interval": "24h",
    "retention": {"max_age": "168h", "max_count": 7},
    "metadata": {"team": "backend", "env": "staging"},
    "name_prefix": "nightly",
}
_SCHEDULE = {
    "created_at": "2026-03-09T01:00:00Z",
    "instance_id": _INSTANCE,
    "next_run_at": "2026-03-10T02:00:00Z",
    "updated_at": "2026-03-09T01:30:00Z",
    "last_error": "invalid state transition: stopped snapshot requires source in Stopped, got Running",
    "last_run_at": "2026-03-09T02:00:00Z",
    "last_snapshot_id": "q7z1w7l2af4l8y7q1h7g2m3s",
    **_ASKED,
}

Document = dict[str, Any]


def _text(description: str, **more: Any) -> Document:
    return {"type": "string", "description": description, **more}


def _time(description: str) -> Document:
    return _text(description, format="date-time", pattern="Z$")


def _object(required: tuple[str, ...], properties: Document, **more: Any) -> Document:
    return {
        "type": "object",
        "required": list(required),
        "properties": properties,
        "additionalProperties": False,
        **more,
    }


def _ref(kind: str, name: str) -> Document:
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


def _schemas() -> Document:
    schedule = {
        "instance_id": _text("Source instance ID.", pattern=INSTANCE_ID),
        "interval": _text("Snapshot interval (Go duration format).", pattern=WRITTEN_DURATION, minLength=2),
        "retention": _object(
            (),
            {
                "max_age": _text("Scheduled snapshots older than this go.", pattern=WRITTEN_DURATION, minLength=2),
                "max_count": _MAX_COUNT,
            },
            description=_RETENTION,
        ),
        "created_at": _time("Schedule creation timestamp."),
        "updated_at": _time("Schedule update timestamp."),
        "next_run_at": _time("Next scheduled run time."),
        "last_run_at": _time("Last schedule execution time."),
        "last_error": _text("Last schedule run error, if any."),
        "last_snapshot_id": _text("Snapshot ID produced by the last successful run."),
        "metadata": _METADATA,
        "name_prefix": _text(_PREFIX, pattern=NAME_PREFIX, minLength=1),
    }
    asked = {
        "interval": _text(
            "Snapshot interval: a Go duration of at least 1m. The pattern is the part of them that needs no adding up.",
            pattern=INTERVAL,
        ),
        "retention": _object(
            (),
            {
                "max_age": _text("Scheduled snapshots older than this Go duration go (0 is no limit by age).")
                | {"pattern": MAX_AGE},
                "max_count": _MAX_COUNT,
            },
            description=_RETENTION,
        ),
        "metadata": _METADATA,
        "name_prefix": _nullable("string", pattern=NAME_PREFIX, description=_PREFIX),
    }
    return {
        "SnapshotSchedule": _object(tuple(schedule)[:6], schedule, examples=[_SCHEDULE]),
        "SetSnapshotScheduleRequest": _object(
            ("interval", "retention"), asked, examples=[_ASKED, {"interval": "24h", "retention": {}}]
        ),
        "Run": _run_schema(),
        "Error": _object(("code", "message"), {"code": _text("What kind of error."), "message": _text("For people.")}),
        "Health": _object(("status",), {"status": {"const": "ok"}}),
    }


def _run_schema() -> Document:
    pruned = _object(
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
    return _object(tuple(properties), properties, description="A line of the history.")


def _json(schema: str | Document, description: str, **more: Any) -> Document:
    found = _ref("schemas", schema) if isinstance(schema, str) else schema
    return {"description": description, "content": {"application/json": {"schema": found}}, **more}


def _header(description: str, **schema: Any) -> Document:
    return {"description": description, "schema": {"type": "string", **schema}}


def _responses() -> Document:
    retry = _header("`false` where asking again changes nothing; clients of Hypeman obey it.", enum=["false"])
    challenge = _header("The scheme that is asked for.", enum=["Bearer"]) | {"required": True}
    return {
        "invalid": _json("Error", "The request breaks rules; the message names each field and its rule."),
        "unauthorized": _json(
            "Error", "No valid token. Not on the unix socket.", headers={"WWW-Authenticate": challenge}
        ),
        "missing": _json("Error", "There is no such schedule, or no such instance."),
        "conflict": _json("Error", "The config manages it, or a run is under way.", headers={"x-should-retry": retry}),
        "large": _json("Error", "The body is longer than 64 KiB."),
        "media": _json("Error", "The body is not JSON by its Content-Type."),
        "internal": _json("Error", "An internal error; hypemand's log has the details."),
        "unavailable": _json("Error", "Not now: no answer, no room, or it stops.", headers={"x-should-retry": retry}),
    }


def _answers(good: Document, **others: str) -> Document:
    named = {"s401": "unauthorized", "s500": "internal", **others}
    errors = {status[1:]: _ref("responses", name) for status, name in named.items()}
    return dict(sorted({**good, **errors}.items()))


_TRY = {"s400": "invalid", "s404": "missing"}
_WRITE = {**_TRY, "s409": "conflict", "s413": "large", "s503": "unavailable"}


def _paths() -> Document:
    instance = {
        "name": "id",
        "in": "path",
        "required": True,
        "description": "Instance ID.",
        "schema": {"type": "string", "pattern": INSTANCE_ID},
        "example": _INSTANCE,
    }
    schedule = _json("SnapshotSchedule", "The schedule.")
    every = {"type": "array", "items": _ref("schemas", "SnapshotSchedule")}
    run = _json("Run", "How the run ended, well or not.")
    run["content"]["application/x-ndjson"] = {
        "schema": _text(
            'Where `Accept` asks for it: a line for each step as it happens, `{"step": "begun", ...}`; the last one is'
            ' `{"step": "finished", "run": {...}}` or `{"step": "left open", "message": "..."}`. Empty lines come'
            " while it takes long."
        )
    }
    nothing = {"content": {"application/json": {"schema": _object((), {}, maxProperties=0)}}}
    asked = _ref("schemas", "SetSnapshotScheduleRequest")
    return {
        "/instances/{id}/snapshot-schedule": {
            "parameters": [instance],
            "get": _operation("Get snapshot schedule for an instance", "getSnapshotSchedule", {"200": schedule}, _TRY),
            "put": _operation(
                "Create or update snapshot schedule for an instance",
                "setSnapshotSchedule",
                {"200": schedule},
                {**_WRITE, "s415": "media"},
                requestBody={"required": True, "content": {"application/json": {"schema": asked}}},
            ),
            "delete": _operation(
                "Delete snapshot schedule for an instance; its snapshots stay",
                "deleteSnapshotSchedule",
                {"204": {"description": "It is deleted."}},
                {**_TRY, "s409": "conflict", "s503": "unavailable"},
            ),
        },
        "/instances/{id}/snapshot-schedule/run": {
            "parameters": [instance],
            "post": _operation(
                "Do a run at once and wait for it", "runSnapshotSchedule", {"200": run}, _WRITE, requestBody=nothing
            ),
        },
        "/snapshot-schedules": {
            "get": _operation(
                "All snapshot schedules, by instance", "listSnapshotSchedules", {"200": _json(every, "The schedules.")}
            )
        },
        "/health": {"get": _open("Health check", "checkHealth", _json("Health", "The server answers."))},
        "/openapi.json": {"get": _open("This document", "getDocument", _json({"type": "object"}, "This document."))},
    }


def _operation(summary: str, name: str, good: Document, others: dict[str, str] | None = None, **more: Any) -> Document:
    return {"operationId": name, "summary": summary, "responses": _answers(good, **others or {}), **more}


def _open(summary: str, name: str, answer: Document) -> Document:
    return {"operationId": name, "summary": summary, "security": [], "responses": {"200": answer}}


def document() -> Document:
    """The whole document."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "hypemand",
            "version": __version__,
            "description": "Periodic VM snapshots: the snapshot schedules of the Hypeman API, and a few routes beside.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/"}],
        "security": [{"token": []}],
        "paths": _paths(),
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer", "description": "A client's token."}},
            "schemas": _schemas(),
            "responses": _responses(),
        },
    }


def openapi_route() -> Route:
    """``GET /openapi.json``."""
    content = orjson.dumps(document())

    async def answer(_: Request) -> Response:
        return Response(content, media_type="application/json")

    return Route("/openapi.json", answer)
