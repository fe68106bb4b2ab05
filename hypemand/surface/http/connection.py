"""One client's connection: HTTP/1.1 over a stream on which everything has its time.

What a request sets off is not cut short when its client leaves.
"""

import contextlib
import math
import ssl
from collections.abc import Callable
from enum import Enum, auto
from typing import Any, cast

import h11
import structlog
import trio
from attrs import frozen
from hypercorn.config import Config as HttpConfig
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from hypercorn.utils import parse_socket_addr
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Scope

from hypemand.surface.http.http1 import Http1, Inbox

_RECEIVE_BYTES = 16 * 1024
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
        self._wire = Wire(socket)
        self._stream = self._wire if tls is None else trio.SSLStream(self._wire, tls, server_side=True)
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
        self._protocol = Http1(
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
            await self._part()
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

    async def _part(self) -> None:
        """Close it in peace, unless it has to make room."""
        if self._evicted:
            return
        self._closing = True
        self._wire.lingers = self._phase is Phase.HEAD or self._protocol.is_unread
        self._scope = trio.CancelScope()
        with self._scope, contextlib.suppress(trio.BrokenResourceError):
            self._enter(Phase.LEFT, self._limits.linger_s)
            await self._stream.aclose()

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
                        if not self._closing:  # else the client is gone, or has had its last answer
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
        inbox = Inbox(lambda: self._enter(Phase.ANSWER, math.inf))
        self._answered = trio.Event()
        self._apps.start_soon(self._answer, scope, inbox, send, self._answered)
        return inbox.put

    async def _answer(self, scope: Scope, inbox: Inbox, send: Callable[[Any], Any], answered: trio.Event) -> None:
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


class Wire(trio.abc.Stream):
    """A client's socket.

    Attributes:
        lingers: Before it is closed, the client's last words are read and dropped: a socket that is
            closed with something unread in it takes away what the client has not read yet.
    """

    def __init__(self, socket: trio.SocketStream) -> None:
        self._socket = socket
        self.lingers = False

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
        """Close it; at once when cancelled."""
        try:
            if self.lingers:
                await self._linger()
        finally:
            await self._socket.aclose()

    async def _linger(self) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.BusyResourceError, trio.ClosedResourceError):
            await self._socket.send_eof()
            left = _LINGER_BYTES
            while left > 0 and (dropped := await self._socket.receive_some(_RECEIVE_BYTES)):
                left -= len(dropped)


def _address(socket: trio.SocketStream, ask: Callable[[], Any]) -> tuple[str, int] | None:
    try:
        return parse_socket_addr(socket.socket.family, ask())
    except OSError:
        return None  # it is gone already
