"""HTTP over the API socket of one VMM.

Time limits are the caller's: saving the memory of a guest takes minutes. A VMM
serves its requests one by one, so an answer means that what was asked before
is over.
"""

import contextlib
import errno
import importlib
import os
import socket as sockets
import struct
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import trio
from attrs import define, field, frozen

from hypemand.backends.base import BackendUnavailable
from hypemand.backends.vmm import processes
from hypemand.backends.vmm.place import Place, new_http, place_of

if TYPE_CHECKING:
    import httpx2

MOST_BYTES = 8 << 20
"""No answer of a VMM is longer than that."""
SAID_CHARS = 600
"""So much of what a VMM says of an error is told."""
LONGEST_PATH = 107
"""Longest path of a unix socket, in bytes: the kernel's limit."""
_NOBODY = frozenset({errno.ENOENT, errno.ECONNREFUSED, errno.ENOTDIR})
_BUSY = frozenset({429, 503})


class SocketAbsent(BackendUnavailable):
    """Nobody listens: there is no socket, or one that a process has left behind."""


class ConnectionLost(BackendUnavailable):
    """The connection broke before there was a whole answer."""


class Refused(BackendUnavailable):
    """The VMM answered that it can't or won't.

    Attributes:
        status: Of HTTP.
        reason: In the VMM's words.
    """

    def __init__(self, status: int, reason: str) -> None:
        self.status, self.reason = status, reason
        super().__init__(reason)


@frozen
class Peer:
    """The process that listens, as the kernel tells it of the socket; ids as they are seen from here.

    Attributes:
        started: When it began, in clock ticks after boot; None where that is not seen.
    """

    pid: int
    uid: int
    gid: int
    started: int | None = None

    @property
    def is_known(self) -> bool:
        """Whether it is told apart from others. The first process of all only passes sockets on."""
        return self.pid > 1

    def lives(self) -> bool:
        """Whether it is there, as far as that can be told."""
        return processes.lives(self.pid, self.started)

    def is_same(self, other: "Peer") -> bool:
        """Whether *other* is this process, and not a later one with its number."""
        return self.pid == other.pid and (None in (self.started, other.started) or self.started == other.started)


@define(eq=False)
class Client:
    """Asks the VMM at *socket*.

    Attributes:
        root: The VMM's root directory, where that is not ours: no link leads out of it.
        peer: Who listens there; known once an answer has come.
    """

    socket: Path
    root: Path | None = None
    peer: Peer | None = field(init=False, default=None)
    _http: "httpx2.AsyncClient | None" = field(init=False, default=None)
    _held: Place | None = field(init=False, default=None)
    _is_imported: bool = field(init=False, default=False)

    def has_ended(self) -> bool:
        """Whether the process that gave the last answer is known to be no more."""
        return self.peer is not None and not self.peer.lives()

    def is_alive(self) -> bool:
        """Whether that process is there, whatever has become of its socket."""
        return self.peer is not None and self.peer.is_known and self.peer.lives()

    async def hold(self) -> None:
        """From now on ask whoever listens now, whatever becomes of the socket's path.

        So a guest is resumed by the VMM that has paused it, also where
        somebody moves or removes its socket, or starts another VMM there.

        Raises:
            BackendUnavailable: There is no such socket.
        """
        await self.let_go()
        self._held = await self._place()

    async def let_go(self) -> None:
        """Ask whoever listens at the path."""
        if self._held is not None:
            held, self._held = self._held, None
            await held.end()

    async def get(self, path: str) -> Any:
        """What *path* has, as JSON. Asked twice where the connection breaks: asking changes nothing."""
        try:
            status, data = await self._ask("GET", path, None)
        except ConnectionLost:
            status, data = await self._ask("GET", path, None)
        _check_status(status, data, self.socket)
        try:
            return orjson.loads(data)
        except orjson.JSONDecodeError as error:
            raise BackendUnavailable(f"{self.socket} gives no JSON for {path}: {_said(data)}") from error

    async def send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> None:
        """Have the VMM do something, once.

        Cancelled, the connection is closed; what the VMM has begun it finishes,
        before it answers anything else.

        Raises:
            Refused: It said no.
            BackendUnavailable: No answer: it may be done, or not.
        """
        status, data = await self._ask(method, path, body)
        _check_status(status, data, self.socket)

    async def aclose(self) -> None:
        """Close what is open."""
        await self.let_go()
        if self._http is not None:
            http, self._http = self._http, None
            with trio.CancelScope(shield=True):  # nothing of it waits for the other side
                await http.aclose()

    async def _ask(self, method: str, path: str, body: Mapping[str, Any] | None) -> tuple[int, bytes]:
        content = None if body is None else orjson.dumps(body)
        headers = {} if body is None else {"Content-Type": "application/json"}
        async with self._asking() as http:
            with _as_unavailable(self.socket):
                async with http.stream(method, path, content=content, headers=headers) as response:
                    self._remember(response)
                    return response.status_code, await _read(response, self.socket)

    def _remember(self, response: "httpx2.Response") -> None:
        stream = response.extensions["network_stream"]
        format_ = "3i"
        raw = stream.get_extra_info("socket").getsockopt(
            sockets.SOL_SOCKET, sockets.SO_PEERCRED, struct.calcsize(format_)
        )
        pid, uid, gid = struct.unpack(format_, raw)
        self.peer = Peer(pid, uid, gid, processes.started_of(pid))

    @asynccontextmanager
    async def _asking(self) -> AsyncIterator["httpx2.AsyncClient"]:
        """Each request connects anew, so that a thousand guests hold no thousand sockets."""
        if self._held is not None:
            async with self._held.in_use() as http:
                yield http
        elif self.root is not None or len(os.fsencode(self.socket)) > LONGEST_PATH:
            place = await self._place()
            try:
                async with place.in_use() as http:
                    yield http
            finally:
                await place.end()
        else:
            await self._import_http()
            self._http = self._http or new_http(str(self.socket))
            yield self._http

    async def _place(self) -> Place:
        await self._import_http()
        try:
            return place_of(self.socket, self.root)
        except OSError as error:
            raise _no_answer(self.socket, error) from error

    async def _import_http(self) -> None:
        if not self._is_imported:
            await trio.to_thread.run_sync(importlib.import_module, "httpx2")  # a tenth of a second, once
            self._is_imported = True


async def _read(response: "httpx2.Response", socket: Path) -> bytes:
    import httpx2

    announced = response.headers.get("Content-Length", "0")
    too_long = not announced.isdecimal() or int(announced) > MOST_BYTES
    data = bytearray()
    try:
        if not too_long:
            async for chunk in response.aiter_raw():
                data += chunk
                if len(data) > MOST_BYTES:
                    too_long = True  # an answer may never end; left to its end it is, but by that of its connection
                    await response.extensions["network_stream"].aclose()
    except httpx2.HTTPError:
        if not too_long:
            raise
    if too_long:
        raise BackendUnavailable(f"{socket} gives an answer of more than {MOST_BYTES >> 20} MiB: is that a VMM?")
    return bytes(data)


@contextlib.contextmanager
def _as_unavailable(socket: Path) -> Iterator[None]:
    import httpx2

    try:
        yield
    except httpx2.ConnectError as error:
        raise _no_answer(socket, _os_error(error)) from error
    except (httpx2.NetworkError, httpx2.RemoteProtocolError) as error:
        told = str(error) or type(error).__name__
        raise ConnectionLost(f"{socket}: the connection broke before the answer was there ({told})") from error
    except httpx2.HTTPError as error:
        raise BackendUnavailable(f"{socket}: {str(error) or type(error).__name__}") from error


def _os_error(error: BaseException) -> OSError:
    """The system's error behind *error*."""
    below: BaseException | None = error
    while below is not None:
        if isinstance(below, OSError):
            return below
        below = below.__cause__ or below.__context__
    return OSError(errno.EIO, str(error))


def _no_answer(socket: Path, error: OSError) -> BackendUnavailable:
    if error.errno in _NOBODY:
        left = "the socket is left over" if error.errno == errno.ECONNREFUSED else "there is no such socket"
        return SocketAbsent(f"nobody listens at {socket}: {left}")
    if error.errno in (errno.EACCES, errno.EPERM):
        return BackendUnavailable(f"{socket} may not be opened: it takes the right to write to it")
    reason = "it is too busy to take another connection" if error.errno == errno.EAGAIN else error.strerror or error
    return BackendUnavailable(f"{socket} can't be reached: {reason}")


def _check_status(status: int, data: bytes, socket: Path) -> None:
    if status in _BUSY:
        raise BackendUnavailable(f"{socket} is busy: {_said(data) or status}")
    if not 200 <= status < 300:
        raise Refused(status, _said(data) or f"HTTP status {status}")


def _said(data: bytes) -> str:
    """What a VMM says of an error: a list of causes, an object with the message in it, or plain text."""
    try:
        content = orjson.loads(data)
    except orjson.JSONDecodeError:
        content = data.decode(errors="replace")
    if isinstance(content, Mapping):
        content = next((content[key] for key in ("fault_message", "message", "error") if key in content), content)
    text = ": ".join(map(str, content)) if isinstance(content, list) else str(content)
    words = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return words if len(words) <= SAID_CHARS else f"{words[:SAID_CHARS]} ..."
