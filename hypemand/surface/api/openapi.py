"""What the API serves, as an OpenAPI 3.1 document."""

from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hypemand import __version__
from hypemand.surface.api.openapi_schemas import INSTANCE, INSTANCE_ID, Document, object_of, ref, schemas, text


def _json(schema: str | Document, description: str, **more: Any) -> Document:
    found = ref("schemas", schema) if isinstance(schema, str) else schema
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
    errors = {status[1:]: ref("responses", name) for status, name in named.items()}
    return dict(sorted({**good, **errors}.items()))


_TRY = {"s400": "invalid", "s404": "missing"}
_WRITE = {**_TRY, "s409": "conflict", "s413": "large", "s503": "unavailable"}


_METRICS = {
    "description": "Metrics, in the format that `Accept` asks for.",
    "content": {
        "text/plain": {"schema": {"type": "string"}},
        "application/openmetrics-text": {"schema": {"type": "string"}},
    },
}


def _paths() -> Document:
    instance = {
        "name": "id",
        "in": "path",
        "required": True,
        "description": "Instance ID.",
        "schema": {"type": "string", "pattern": INSTANCE_ID},
        "example": INSTANCE,
    }
    schedule = _json("SnapshotSchedule", "The schedule.")
    every = {"type": "array", "items": ref("schemas", "SnapshotSchedule")}
    run = _json("Run", "How the run ended, well or not.")
    run["content"]["application/x-ndjson"] = {
        "schema": text(
            'Where `Accept` asks for it: a line for each step as it happens, `{"step": "begun", ...}`; the last one is'
            ' `{"step": "finished", "run": {...}}` or `{"step": "left open", "message": "..."}`. Empty lines come'
            " while it takes long."
        )
    }
    nothing = {"content": {"application/json": {"schema": object_of((), {}, maxProperties=0)}}}
    asked = ref("schemas", "SetSnapshotScheduleRequest")
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
        "/metrics": {
            "get": _operation("Metrics for Prometheus", "getMetrics", {"200": _METRICS}),
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
            "schemas": schemas(),
            "responses": _responses(),
        },
    }


def openapi_route() -> Route:
    """``GET /openapi.json``."""
    content = orjson.dumps(document())

    async def answer(_: Request) -> Response:
        return Response(content, media_type="application/json")

    return Route("/openapi.json", answer)
