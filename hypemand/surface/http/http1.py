"""Hypercorn's HTTP/1.1, set up: no upgrades, errors in the API's own form, nothing of a body held that nobody reads."""

import contextlib
from collections.abc import Callable
from typing import Any

import h11
import orjson
import structlog
import trio
from hypercorn.config import Config as HttpConfig
from hypercorn.events import Closed
from hypercorn.logging import Logger
from hypercorn.protocol.events import Event, Request
from hypercorn.protocol.h11 import STREAM_ID, H11Protocol
from hypercorn.protocol.http_stream import HTTPStream
from starlette.types import Message

_PIECES = 2
"""How much of a body waits for the app, in pieces as received: what it does not take is not read."""
_REFUSALS = {
    400: "this is no valid request in HTTP/1.1",
    408: "the request did not arrive in time",
    431: "the head of the request is too large",
}
_log = structlog.get_logger()


class _Logger(Logger):
    """Tells of requests for those who look for trouble. Neither headers nor queries: there are secrets in them."""

    async def access(self, request: Any, response: Any, request_time: float) -> None:
        _log.debug(
            "request",
            method=request["method"],
            path=request["path"],
            status=response["status"] if response else None,
            took_s=request_time,
        )


def http_config(head_bytes: int) -> HttpConfig:
    """The settings of hypercorn."""
    config = HttpConfig()
    config.accesslog = config.errorlog = None
    config.logger_class = _Logger
    config.h11_max_incomplete_size = head_bytes
    config.include_server_header = False
    return config


class Http1(H11Protocol):
    """HTTP/1.1 and nothing else; what is none is refused in the API's own form."""

    _refused = False

    @property
    def has_more(self) -> bool:
        """Whether something of the next request is here already."""
        return bool(self.connection.trailing_data[0])

    @property
    def is_unread(self) -> bool:
        """Whether the client may be sending something that nobody wants."""
        return self.has_more or self.connection.their_state in {h11.SEND_BODY, h11.ERROR}

    async def refuse(self, status: int) -> None:
        """Answer that there is no request that could be answered, if it is time for an answer."""
        if self.connection.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
            self._refused = True
            await self._send_error_response(status)

    async def stream_send(self, event: Event) -> None:
        """Send what the app answers, unless the client has had its answer."""
        if not self._refused:
            await super().stream_send(event)

    async def _check_protocol(self, event: h11.Request) -> None:
        """No upgrade is taken: a client that offers one is answered as if it had not."""

    async def _create_stream(self, request: h11.Request) -> None:
        if _head_bytes(request) > self.config.h11_max_incomplete_size:  # h11 sees to heads that come bit by bit
            await self.refuse(431)
            await self.send(Closed())
            return
        self.stream = HTTPStream(
            self.app,
            self.config,
            self.context,
            self.task_group,
            self.ssl,
            self.client,
            self.server,
            self.stream_send,
            STREAM_ID,
        )
        await self.stream.handle(
            Request(
                stream_id=STREAM_ID,
                headers=list(request.headers),
                http_version=request.http_version.decode(),
                method=request.method.decode("ascii").upper(),
                raw_path=request.target,
                state=self.connection_state,
            )
        )
        self.keep_alive_requests += 1

    async def _send_error_response(self, status_code: int) -> None:
        body = orjson.dumps({"code": "invalid_request", "message": _REFUSALS.get(status_code, _REFUSALS[400])})
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
            *self.config.response_headers("h11"),
        ]
        await self._send_h11_event(h11.Response(status_code=status_code, headers=headers))
        await self._send_h11_event(h11.Data(data=body))
        await self._send_h11_event(h11.EndOfMessage())


def _head_bytes(request: h11.Request) -> int:
    line = len(request.method) + len(request.target) + len(b"  HTTP/1.1\r\n\r\n")
    return line + sum(len(name) + len(value) + len(b": \r\n") for name, value in request.headers)


class Inbox:
    """The pieces of a request on their way to the app. What it does not take waits for it, and so does who sends it."""

    def __init__(self, on_complete: Callable[[], None]) -> None:
        self._on_complete = on_complete
        self._in, self._out = trio.open_memory_channel[Message](_PIECES)

    async def put(self, message: Message) -> None:
        """Take in a piece, or that the client has gone, which never waits. Dropped once the app is done."""
        if message["type"] == "http.disconnect":
            self._in.close()
            return
        if not message["more_body"]:
            self._on_complete()
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self._in.send(message)

    async def receive(self) -> Message:
        """The next piece; for the app."""
        try:
            return await self._out.receive()
        except trio.EndOfChannel:
            return {"type": "http.disconnect"}

    def close(self) -> None:
        """The app is done."""
        self._in.close()
        self._out.close()
