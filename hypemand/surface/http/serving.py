"""The API's doors: the control socket always, TCP when it is configured; who comes in gets a connection.

A door that can't be opened is tried again. Schedules never wait for a client.
"""

import contextlib
import errno
import math
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from ssl import SSLContext
from typing import Any, TypeVar

import structlog
import trio
from attrs import field, frozen
from hypercorn.trio.worker_context import WorkerContext
from starlette.types import ASGIApp

from hypemand.engine.looking import until
from hypemand.surface.http.connection import Connection, Limits
from hypemand.surface.http.http1 import http_config
from hypemand.surface.http.inherited import Inherited
from hypemand.surface.http.sockets import BACKLOG, ControlSocket, SocketRefusedError, open_control_socket

T = TypeVar("T")
RETRY_S = 2.0
LOOK_EVERY = 5
"""So much seldomer it is looked whether the control socket is there still: nobody is waiting."""
_NOT_HERE = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})
_KEEP_ALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
)
"""For clients that vanish while they wait for a long answer; those who come in have it from who listens."""
_log = structlog.get_logger()


@frozen
class _Door:
    """One way to come in, and those who came."""

    app: ASGIApp
    tls: Callable[[], SSLContext | None]
    connections: set[Connection] = field(factory=set)
    changed: trio.lowlevel.ParkingLot = field(factory=trio.lowlevel.ParkingLot)

    def change(self) -> None:
        """Look again whether there is room."""
        self.changed.unpark_all()

    async def room(self, limits: Limits) -> None:
        """Wait until there is room for one more; who is without a request the longest makes it."""
        while len(self.connections) >= limits.connections:
            idle = [connection for connection in self.connections if connection.makes_room]
            wait_s = math.inf
            if idle:
                longest = min(idle, key=lambda connection: connection.since)
                wait_s = longest.since + limits.settle_s - trio.current_time()
                if wait_s <= 0:
                    longest.close()
                    wait_s = math.inf
            with trio.move_on_after(wait_s):
                await self.changed.park()


class Serving:
    """Serves the API from `serve` on until `stop`.

    Attributes:
        path: Of the control socket.
        listen: Host and port for TCP, if it is served.
        unreachable: Why it does not listen where it should, by place.
        listening: Set once it listens wherever it should.
        over: Set once the last connection is closed.
    """

    def __init__(
        self,
        *,
        path: Path,
        socket_app: ASGIApp,
        listen: str | None = None,
        tcp_app: ASGIApp | None = None,
        tls: Callable[[], SSLContext | None] = lambda: None,
        inherited: Inherited | None = None,
        limits: Limits | None = None,
        retry_s: float = RETRY_S,
    ) -> None:
        self.path = path
        self.listen = listen
        self._inherited = inherited or Inherited()
        self._limits = limits or Limits()
        self._retry_s = retry_s
        self._http = http_config(self._limits.head_bytes)
        self._context = WorkerContext(None)
        self._socket_door = _Door(socket_app, lambda: None)
        self._tcp_door = None if tcp_app is None else _Door(tcp_app, tls)
        self._accepting = trio.CancelScope()
        self._stopped = False
        self.unreachable: dict[str, str] = {}
        self.listening = trio.Event()
        self._open: set[str] = set()
        self.over = trio.Event()

    async def serve(self) -> None:
        """Open the doors, and serve who comes in until `stop`; then answer what has been asked.

        May be called again after it has failed.
        """
        self._accepting, self.over = trio.CancelScope(), trio.Event()
        if self._stopped:
            self._accepting.cancel()
        try:
            async with trio.open_nursery() as clients:
                with self._accepting:
                    async with trio.open_nursery() as doors:
                        doors.start_soon(self._keep_control_socket, clients)
                        if self.listen is not None and self._tcp_door is not None:
                            doors.start_soon(self._keep_tcp, self.listen, self._tcp_door, clients)
                await self._context.terminated.set()
                for door in (self._socket_door, self._tcp_door):
                    for connection in [*door.connections] if door else ():
                        if connection.makes_room:
                            connection.close()
        finally:
            self.over.set()

    def stop(self) -> None:
        """Let nobody in any more, and have idle connections closed. Requests under way go on until they are answered.

        Called before `serve`, nobody is let in at all.
        """
        self._stopped = True
        self._accepting.cancel()

    async def _keep_control_socket(self, clients: trio.Nursery) -> None:
        place = str(self.path)
        while True:
            made = await self._opened(place, self._control_socket)
            try:
                async with trio.open_nursery() as nursery:
                    listener = trio.socket.from_stdlib_socket(made.socket)
                    nursery.start_soon(self._accept, listener, self._socket_door, clients)
                    _log.info("API serves", socket=place)
                    self._is_open(place)
                    await until(made.is_lost, LOOK_EVERY * self._retry_s)
                    nursery.cancel_scope.cancel()
            finally:
                made.close()
            _log.warning("the API's socket was removed or replaced by somebody; making it again", socket=place)

    async def _control_socket(self) -> ControlSocket:
        def taken_or_made() -> ControlSocket:
            return self._inherited.take_control_socket(self.path) or open_control_socket(self.path)

        return await trio.to_thread.run_sync(taken_or_made)

    def _is_open(self, place: str) -> None:
        self._open.add(place)
        serves_tcp = self.listen is not None and self._tcp_door is not None
        if len(self._open) == (2 if serves_tcp else 1):
            self._inherited.refuse_rest()
            self.listening.set()

    async def _keep_tcp(self, listen: str, door: _Door, clients: trio.Nursery) -> None:
        listeners = await self._opened(listen, partial(open_tcp, listen, self._inherited))
        try:
            async with trio.open_nursery() as nursery:
                for listener in listeners:
                    nursery.start_soon(self._accept, listener, door, clients)
                _log.info("API serves", listen=listen, tls=door.tls() is not None)
                self._is_open(listen)
        finally:
            for listener in listeners:
                listener.close()

    async def _opened(self, place: str, opening: Callable[[], Awaitable[T]]) -> T:
        """What *opening* makes; tried again until it does, for schedules matter more than who asks about them."""
        while True:
            try:
                opened = await opening()
            except (OSError, SocketRefusedError) as error:
                why = _why(place, error)
            else:
                self.unreachable.pop(place, None)
                return opened
            if why != self.unreachable.get(place):
                _log.error("API not reachable here; schedules go on, trying again", at=place, error=why)
                self.unreachable[place] = why
            await trio.sleep(self._retry_s)

    async def _accept(self, listener: trio.socket.SocketType, door: _Door, clients: trio.Nursery) -> None:
        while True:
            try:
                client, _ = await listener.accept()
            except OSError as error:  # who wanted to come in is gone, or there are too many open files
                _log.warning("a client could not come in", error=error.strerror)
                await trio.sleep(min(1.0, self._retry_s))
                continue
            try:
                await door.room(self._limits)
                connection = Connection(
                    trio.SocketStream(client),
                    door.app,
                    tls=door.tls(),
                    config=self._http,
                    context=self._context,
                    limits=self._limits,
                    apps=clients,
                    on_change=door.change,
                )
            except BaseException:
                client.close()
                raise
            door.connections.add(connection)
            clients.start_soon(self._serve_client, connection, door)

    async def _serve_client(self, connection: Connection, door: _Door) -> None:
        try:
            await connection.run()
        except Exception:  # noqa: BLE001 - whatever one client sends, hypemand and the other clients go on
            _log.exception("connection failed", client=connection.client)
        finally:
            door.connections.discard(connection)
            door.change()


def _why(place: str, error: Exception) -> str:
    if not isinstance(error, OSError):
        return str(error)
    if error.errno == errno.EADDRINUSE:
        return f"another program listens at {place}: stop it, or set api.listen to another port"
    if isinstance(error, PermissionError):
        return f"{error.strerror}: let the user that hypemand runs as do this, or set another place in [api]"
    return error.strerror or str(error)


def address_of(listen: str) -> tuple[str, int]:
    """Host and port of *listen*, as the config has it."""
    host, _, port = listen.rpartition(":")
    return host.strip("[]"), int(port)


async def open_tcp(listen: str, inherited: Inherited | None = None) -> list[trio.socket.SocketType]:
    """Listen at each address that *listen* stands for; one that this machine does not have is left out.

    Where one of them was *inherited*, those that were are all.

    Raises:
        OSError: There is none to listen at, or one is taken.
    """
    host, port = address_of(listen)
    found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    taken = inherited.take_tcp(address for *_, address in found) if inherited is not None else []
    if taken:
        return [_kept_alive(trio.socket.from_stdlib_socket(made)) for made in taken]
    opened: list[trio.socket.SocketType] = []
    missing: list[OSError] = []
    with contextlib.ExitStack() as on_error:
        for family, _, _, _, address in dict.fromkeys(found):
            try:
                opened.append(await _listen(family, address))
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
                missing.append(error)
            else:
                on_error.callback(opened[-1].close)
        if not opened:
            raise missing[0]
        on_error.pop_all()
    return opened


async def _listen(family: int, address: tuple[Any, ...]) -> trio.socket.SocketType:
    listener = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _kept_alive(listener)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # the other one has a socket of its own
        await listener.bind(address)
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _kept_alive(listener: trio.socket.SocketType) -> trio.socket.SocketType:
    for level, option, value in _KEEP_ALIVE:
        listener.setsockopt(level, option, value)
    return listener
