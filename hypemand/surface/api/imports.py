"""Where ``import-hypeman`` hands schedules to the daemon, one at a time, over the unix socket alone."""

from collections.abc import Mapping
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hypemand.core.errors import InvalidInput, Problem
from hypemand.engine.importing import Wish, bring_in
from hypemand.engine.requests import Requests
from hypemand.state.codec import schedule_document, schedule_of, to_json
from hypemand.surface.api.bodies import read_body
from hypemand.surface.client import FORMAT, FORMAT_HEADER

IMPORT = "/control/import"


def wish_document(wish: Wish) -> dict[str, Any]:
    """*wish* as JSON values."""
    return {"schedule": schedule_document(wish.schedule), "replace": wish.replace, "dry_run": wish.dry_run}


def wish_of(document: Mapping[str, Any]) -> Wish:
    """The wish that `wish_document` tells.

    Raises:
        InvalidInput: A later version told it.
    """
    schedule, replace, dry_run = (document.get(key) for key in ("schedule", "replace", "dry_run"))
    if not isinstance(schedule, dict) or not isinstance(replace, bool) or not isinstance(dry_run, bool):
        raise InvalidInput([Problem("", "must have a schedule, replace and dry_run")])
    return Wish(schedule=schedule_of(schedule), replace=replace, dry_run=dry_run)


def import_route(requests: Requests) -> Route:
    """The route that takes a schedule in, by the rules that clients of *requests* are held to."""

    async def bring(request: Request) -> Response:
        try:
            document = orjson.loads(await read_body(request))
        except orjson.JSONDecodeError:
            document = None
        if not isinstance(document, dict):
            raise InvalidInput([Problem("", "the body must be a JSON object")])
        brought = await bring_in(requests, wish_of(document))
        told = to_json({"outcome": brought.outcome.value, "reason": brought.reason})
        return Response(told, media_type="application/json", headers={FORMAT_HEADER: FORMAT})

    return Route(IMPORT, bring, methods=["POST"])
