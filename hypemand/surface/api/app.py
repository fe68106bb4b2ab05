"""The HTTP API: routes for schedules and runs, and the app around any routes. Who listens where is `serving`'s."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

import orjson
import structlog
import trio
from attrs import frozen
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hypemand.core.duration import format_duration
from hypemand.core.errors import InvalidInput, Problem, RuleBroken
from hypemand.core.fields import format_instant
from hypemand.core.model import InstanceId, Schedule
from hypemand.core.naming import check_instance_id
from hypemand.core.structure import new_converter
from hypemand.engine.changes import SetSchedule
from hypemand.engine.refusals import ConflictError, NotFoundError, UnavailableError
from hypemand.engine.requests import Requests
from hypemand.state.codec import line_document
from hypemand.surface.api.bodies import BodyTooLargeError, NotJsonError, problems_text, read_document, read_nothing
from hypemand.surface.api.run_stream import LEFT_OPEN, NDJSON, RunStream

PUBLIC = frozenset({"/health", "/openapi.json"})
"""Paths that need no token: they tell nothing of instances."""
LOCAL_CLIENT = "socket"
"""Name of whoever may open the unix socket."""
_CLIENT = "hypemand.client"
_NO_RETRY = {"x-should-retry": "false"}
_CONVERTER = new_converter()
_STATUS: dict[type[Exception], tuple[int, str]] = {
    InvalidInput: (400, "invalid_request"),
    NotFoundError: (404, "not_found"),
    ConflictError: (409, "conflict"),
    BodyTooLargeError: (413, "too_large"),
    NotJsonError: (415, "unsupported_media_type"),
    UnavailableError: (503, "unavailable"),
}
_PIECE = 50
"""After so many schedules in a row others have a turn."""
_INTERNAL = (500, "internal_error")
_log = structlog.get_logger()

Authenticate = Callable[[str | None], str | None]
"""From a request's Authorization header, or None, to the client's name, or None where nobody is known by it."""


class Json(Response):
    """*content* as JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The bytes of *content*."""
        return orjson.dumps(content)


def client_of(request: Request) -> str:
    """Name of the client that sent *request*."""
    client: str = request.scope[_CLIENT]
    return client


def instance_of(request: Request) -> InstanceId:
    """The instance in the path of *request*: its ``{id}``, percent-decoded only now, so that a slash in it is no path.

    Raises:
        InvalidInput: It may not name an instance.
    """
    try:
        return check_instance_id(unquote(request.path_params["id"], errors="backslashreplace"))
    except RuleBroken as error:
        raise InvalidInput([Problem("id", str(error))]) from None


def schedule_answer(schedule: Schedule) -> dict[str, Any]:
    """*schedule* with the documented keys alone; optional ones that are not set are left out."""
    retention = schedule.retention
    kept = {
        "max_age": None if retention.max_age is None else format_duration(retention.max_age),
        "max_count": retention.max_count,
    }
    answer = {
        "instance_id": schedule.instance_id,
        "interval": format_duration(schedule.interval),
        "retention": _set_ones(kept),
        "created_at": format_instant(schedule.created_at),
        "updated_at": format_instant(schedule.updated_at),
        "next_run_at": format_instant(schedule.next_run_at),
        "last_run_at": None if schedule.last_run_at is None else format_instant(schedule.last_run_at),
        "last_error": schedule.last_error,
        "last_snapshot_id": schedule.last_snapshot_id,
        "metadata": dict(schedule.metadata) or None,
        "name_prefix": schedule.name_prefix or None,
    }
    return _set_ones(answer)


def _set_ones(document: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if value is not None}


async def _all_answers(requests: Requests, turn: trio.Lock) -> list[dict[str, Any]]:
    """What there is of every schedule: one list at a time, in small pieces, so that many who ask delay no run."""
    answers = []
    async with turn:
        for number, schedule in enumerate(requests.all(), 1):
            answers.append(schedule_answer(schedule))
            if number % _PIECE == 0:
                await trio.lowlevel.checkpoint()
    return answers


def api_routes(requests: Requests) -> list[Route]:
    """The documented API, and what hypemand has beside it, for *requests*."""
    turn = trio.Lock()

    async def health(_: Request) -> Response:
        return Json({"status": "ok"})

    async def get_all(_: Request) -> Response:
        return Json(await _all_answers(requests, turn))

    async def get(request: Request) -> Response:
        return Json(schedule_answer(requests.get(instance_of(request))))

    async def put(request: Request) -> Response:
        instance = instance_of(request)
        wanted = await read_document(request, _CONVERTER, SetSchedule, nullable=("name_prefix",))
        return Json(schedule_answer(await requests.put(instance, wanted, client_of(request))))

    async def delete(request: Request) -> Response:
        await requests.delete(instance_of(request), client_of(request))
        return Response(status_code=204)

    async def run(request: Request) -> Response:
        instance = instance_of(request)
        await read_nothing(request)
        if NDJSON in request.headers.get("accept", ""):
            return RunStream(requests, instance, client_of(request))
        ended = await requests.run_now(instance, client_of(request))
        if ended is None:
            return _error(503, "unavailable", LEFT_OPEN, _NO_RETRY)
        return Json(line_document(ended))

    schedule = "/instances/{id}/snapshot-schedule"
    return [
        Route("/health", health),
        Route("/snapshot-schedules", get_all),
        Route(schedule, get),
        Route(schedule, put, methods=["PUT"]),
        Route(schedule, delete, methods=["DELETE"]),
        Route(f"{schedule}/run", run, methods=["POST"]),
    ]


def make_app(routes: Sequence[Route], authenticate: Authenticate | None = None) -> ASGIApp:
    """An app of *routes*, whose errors are all ``{"code", "message"}``, without inner details.

    Args:
        authenticate: None where everybody who gets here is trusted.
    """
    return _App(tuple(routes), authenticate)


@frozen(eq=False)
class _App:
    routes: tuple[Route, ...]
    authenticate: Authenticate | None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
        elif scope["type"] == "http":
            await self._serve(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def noting_send(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._find(scope)(scope, receive, noting_send)
        except ClientDisconnect:
            return
        except Exception as error:  # noqa: BLE001 - whatever goes wrong for one client is no other's trouble
            answer = _answer_to(error, scope)
            if not begun:
                await answer(scope, receive, send)

    def _find(self, scope: Scope) -> ASGIApp:
        """The route for *scope*, or the answer that there is none for this client."""
        # Paths are matched as they were sent: an encoded slash separates nothing, dots lead nowhere.
        path = scope["path"] = scope["raw_path"].decode("latin-1")
        scope[_CLIENT] = LOCAL_CLIENT
        if self.authenticate is not None and path not in PUBLIC:
            scope[_CLIENT] = self.authenticate(_authorization(scope))
            if scope[_CLIENT] is None:
                return _error(401, "unauthorized", "a valid token is required", {"www-authenticate": "Bearer"})
        allowed: set[str] = set()
        for route in self.routes:
            match, matched = route.matches(scope)
            if match is Match.FULL:
                scope.update(matched)
                return route.handle
            if match is Match.PARTIAL:
                allowed |= route.methods or set()
        return _refusal(allowed)


def _refusal(allowed: Iterable[str]) -> Response:
    methods = ", ".join(sorted(allowed))
    if methods:
        return _error(405, "method_not_allowed", f"allowed here: {methods}", {"allow": methods})
    return _error(404, "not_found", "there is nothing at this path")


def _authorization(scope: Scope) -> str | None:
    values = [value for name, value in scope["headers"] if name == b"authorization"]
    return values[0].decode("latin-1") if len(values) == 1 else None


async def _live(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


def _error(status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> Response:
    return Json({"code": code, "message": message}, status_code=status, headers=headers)


def _answer_to(error: Exception, scope: Scope) -> Response:
    status, code = next((known for kind, known in _STATUS.items() if isinstance(error, kind)), _INTERNAL)
    if status == 500:
        _log.error("internal error in a request", method=scope["method"], path=scope["path"], exc_info=error)
        return _error(status, code, "an internal error; hypemand's log has the details")
    message = problems_text(error) if isinstance(error, InvalidInput) else str(error)
    lasting = isinstance(error, ConflictError) and error.lasting
    return _error(status, code, message, _NO_RETRY if lasting else None)
