"""One client's connection: hypercorn's HTTP/1.1 over a stream on which everything has its time.

What a request sets off is not cut short when its client leaves.
"""

import contextlib
import math
import ssl
from collections.abc import Callable
from enum import Enum, auto
from typing import Any, cast

import h11
import orjson
import structlog
import trio
from attrs import frozen
from hypercorn.config import Config as HttpConfig
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.logging import Logger
from hypercorn.protocol.events import Request
from hypercorn.protocol.h11 import STREAM_ID, H11Protocol
from hypercorn.protocol.http_stream import HTTPStream
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from hypercorn.utils import parse_socket_addr
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Scope

_RECEIVE_BYTES = 16 * 1024
_PIECES = 2
"""How much of a body waits for the app, in pieces as received: what it does not take is not read."""
_LINGER_BYTES = 1024**2
_log = structlog.get_logger()


@frozen(kw_only=True)
class Limits:
    """What one client may have. Times in seconds.

    Attributes:
        connections: Open at once, of the clients that come one way.
        settle_s: Without a request, before it may be closed to make room for others.
        idle_s: Without a request.
        head_s: From the first byte of a request to the end of its head.
        body_s: From there to the end of its body.
        send_s: For the client to take in one piece of an answer.
        linger_s: For the client to read the last answer, before the connection is torn down.
    """

    connections: int = 64
    settle_s: float = 1.0
    head_bytes: int = 16 * 1024
    handshake_s: float = 10.0
    idle_s: float = 65.0
    head_s: float = 10.0
    body_s: float = 30.0
    send_s: float = 60.0
    linger_s: float = 2.0


class Phase(Enum):
    """What a connection is about."""

    HANDSHAKE = auto()
    IDLE = auto()
    HEAD = auto()
    BODY = auto()
    ANSWER = auto()
    LEFT = auto()


_MAKES_ROOM = frozenset({Phase.HANDSHAKE, Phase.IDLE, Phase.HEAD, Phase.LEFT})
"""When others want to come in, a connection may be closed that has no request which is waited for."""


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


def http_config(limits: Limits) -> HttpConfig:
    """The settings of hypercorn."""
    config = HttpConfig()
    config.accesslog = config.errorlog = None
    config.logger_class = _Logger
    config.h11_max_incomplete_size = limits.head_bytes
    config.include_server_header = False
    return config


class Connection:
    """A client that has come in; `run` serves it.

    Attributes:
        client: Its address; None on the control socket.
        since: When it began to be without a request, in trio's time.
    """

    def __init__(
        self,
        socket: trio.SocketStream,
        app: ASGIApp,
        *,
        tls: ssl.SSLContext | None,
        config: HttpConfig,
        context: WorkerContext,
        limits: Limits,
        apps: trio.Nursery,
        on_change: Callable[[], None],
    ) -> None:
        wire = Wire(socket, limits.linger_s)
        self._stream = wire if tls is None else trio.SSLStream(wire, tls, server_side=True)
        self._tls = tls is not None
        self._app = app
        self._limits = limits
        self._apps = apps
        self._on_change = on_change
        self._scope = trio.CancelScope()
        self._reading = trio.CancelScope()
        self._sending = trio.Lock()
        self._answered = trio.Event()
        self._closing = False
        self._evicted = False
        self._phase = Phase.HANDSHAKE
        self.since = trio.current_time()
        self.client = _address(socket, socket.socket.getpeername)
        server = _address(socket, socket.socket.getsockname)
        self._protocol = _Http1(
            cast("Any", app),  # called by `_answer`, not by hypercorn
            config,
            context,
            cast("Any", self),
            ConnectionState({}),
            self._tls,
            self.client,
            server,
            self._send,
        )

    @property
    def makes_room(self) -> bool:
        """Whether nobody waits for an answer on it."""
        return self._phase in _MAKES_ROOM

    def close(self) -> None:
        """Have it closed at once."""
        self._evicted = True
        self._scope.cancel()

    async def run(self) -> None:
        """Answer requests until the client leaves, takes too long, or has to make room for others."""
        try:
            with self._scope:
                await self._talk()
            if self._scope.cancelled_caught and not self._evicted and self._phase in {Phase.HEAD, Phase.BODY}:
                with trio.move_on_after(self._limits.linger_s):
                    await self._protocol.refuse(408)
            await self._protocol.handle(Closed())
            if not self._evicted:
                with trio.move_on_after(self._limits.linger_s), contextlib.suppress(trio.BrokenResourceError):
                    await self._stream.aclose()
        finally:
            await trio.aclose_forcefully(self._stream)

    async def _talk(self) -> None:
        self._enter(Phase.HANDSHAKE, self._limits.handshake_s)
        if isinstance(self._stream, trio.SSLStream):
            try:
                await self._stream.do_handshake()
            except trio.BrokenResourceError as error:
                _log.debug("no TLS with a client", client=self.client, error=str(error.__cause__ or error))
                return
        self._enter(Phase.IDLE, self._limits.idle_s)
        with self._reading, contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self._read()
        if not self._closing and self._phase in {Phase.BODY, Phase.ANSWER}:
            # It has said all that it has to say, or is gone. The app may be about to answer.
            await self._protocol.handle(Closed())
            self._enter(Phase.LEFT, math.inf)
            await self._answered.wait()

    async def _read(self) -> None:
        while True:
            data = await self._stream.receive_some(_RECEIVE_BYTES)
            if data and self._phase is Phase.IDLE:
                self._enter(Phase.HEAD, self._limits.head_s)
            await self._protocol.handle(RawData(bytes(data)))
            if not data:
                return

    def _enter(self, phase: Phase, within_s: float) -> None:
        if phase in _MAKES_ROOM and not self.makes_room:
            self.since = trio.current_time()
        self._phase = phase
        self._scope.deadline = trio.current_time() + within_s
        self._on_change()

    async def _send(self, event: Event) -> None:
        """What hypercorn's protocol has to say, from the task that reads or from that of the app."""
        if isinstance(event, RawData):
            try:
                with trio.fail_after(self._limits.send_s):
                    async with self._sending:
                        await self._stream.send_all(event.data)
            except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
                self._read_no_more()
        elif isinstance(event, Updated):
            if not event.idle:
                self._enter(Phase.BODY, self._limits.body_s)
            elif self._protocol.has_more:
                self._enter(Phase.HEAD, self._limits.head_s)
            else:
                self._enter(Phase.IDLE, self._limits.idle_s)
        elif isinstance(event, Closed):
            self._read_no_more()

    def _read_no_more(self) -> None:
        self._closing = True
        self._reading.cancel()

    async def spawn_app(
        self, _app: object, _config: object, scope: Scope, send: Callable[[Any], Any]
    ) -> Callable[[Message], Any]:
        """Have the app answer a request, in a task that outlives the connection. hypercorn calls this.

        Returns:
            What takes in the pieces of the request.
        """
        inbox = _Inbox(lambda: self._enter(Phase.ANSWER, math.inf))
        self._answered = trio.Event()
        self._apps.start_soon(self._answer, scope, inbox, send, self._answered)
        return inbox.put

    async def _answer(self, scope: Scope, inbox: "_Inbox", send: Callable[[Any], Any], answered: trio.Event) -> None:
        try:
            try:
                await self._app(scope, inbox.receive, send)
            except ClientDisconnect:
                pass  # in the middle of its request
            except Exception:  # noqa: BLE001 - whatever goes wrong with one request, hypemand goes on
                _log.exception("request failed", method=scope["method"], path=scope["path"])
            finally:
                inbox.close()
            with contextlib.suppress(h11.LocalProtocolError):  # the client broke off
                await send(None)
        finally:
            answered.set()


class _Http1(H11Protocol):
    """HTTP/1.1 and nothing else; what is none is refused in the API's own form."""

    @property
    def has_more(self) -> bool:
        """Whether something of the next request is here already."""
        return bool(self.connection.trailing_data[0])

    async def refuse(self, status: int) -> None:
        """Answer that there is no request that could be answered, if it is time for an answer."""
        if self.connection.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
            await self._send_error_response(status)

    async def _check_protocol(self, event: h11.Request) -> None:
        """No upgrade is taken: a client that offers one is answered as if it had not."""

    async def _create_stream(self, request: h11.Request) -> None:
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


_REFUSALS = {
    400: "this is no valid request in HTTP/1.1",
    408: "the request did not arrive in time",
    431: "the head of the request is too large",
}


class _Inbox:
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


class Wire(trio.abc.Stream):
    """A client's socket. When it is closed, the client has some time to read what was sent last.

    A socket that is closed with something unread in it takes that away from the client.
    """

    def __init__(self, socket: trio.SocketStream, linger_s: float) -> None:
        self._socket = socket
        self._linger_s = linger_s

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send *data*."""
        await self._socket.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until `send_all` is likely to take something."""
        await self._socket.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """What has come, up to *max_bytes*; nothing at the end."""
        return await self._socket.receive_some(max_bytes)

    async def aclose(self) -> None:
        """Send the end, drop what still comes until the client's, and close. At once when cancelled."""
        try:
            with (
                trio.move_on_after(self._linger_s),
                contextlib.suppress(trio.BrokenResourceError, trio.BusyResourceError),
            ):
                await self._socket.send_eof()
                left = _LINGER_BYTES
                while left > 0 and (dropped := await self._socket.receive_some(_RECEIVE_BYTES)):
                    left -= len(dropped)
        except trio.ClosedResourceError:
            pass
        finally:
            await self._socket.aclose()


def _address(socket: trio.SocketStream, ask: Callable[[], Any]) -> tuple[str, int] | None:
    try:
        return parse_socket_addr(socket.socket.family, ask())
    except OSError:
        return None  # it is gone already
