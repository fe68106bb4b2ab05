"""HTTP over the API socket of one VMM.

Time limits are the caller's: saving the memory of a guest takes minutes. A VMM
serves its requests one by one, so an answer means that what was asked before
is over.
"""

import contextlib
import errno
import importlib
import os
import select
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

if TYPE_CHECKING:
    import httpx2

AT_ONCE = 4
"""Connections to one VMM: both take ten in all, and refuse others."""
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
    """The process that listens, as the kernel tells it of the socket; ids as they are seen from here."""

    pid: int
    uid: int
    gid: int


@define(eq=False)
class Client:
    """Asks the VMM at *socket*.

    Attributes:
        peer: Who listens there; known once an answer has come.
    """

    socket: Path
    peer: Peer | None = field(init=False, default=None)
    _http: "httpx2.AsyncClient | None" = field(init=False, default=None)

    def has_ended(self) -> bool:
        """Whether the process that gave the last answer is known to be no more."""
        return self.peer is not None and not _exists(self.peer.pid)

    def is_alive(self) -> bool:
        """Whether that process is there, whatever has become of its socket. The first one only passes sockets on."""
        return self.peer is not None and self.peer.pid > 1 and _exists(self.peer.pid)

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
        self.peer = Peer(*struct.unpack(format_, raw))

    @asynccontextmanager
    async def _asking(self) -> AsyncIterator["httpx2.AsyncClient"]:
        """Each request connects anew: to whoever listens there now, and a thousand guests hold no thousand sockets."""
        if self._http is None:
            await trio.to_thread.run_sync(importlib.import_module, "httpx2")  # a tenth of a second, once
        if len(os.fsencode(self.socket)) > LONGEST_PATH:
            async with _reached_by_directory(self.socket) as http:
                yield http
            return
        self._http = self._http or _new_http(str(self.socket))
        yield self._http


@asynccontextmanager
async def _reached_by_directory(socket: Path) -> AsyncIterator["httpx2.AsyncClient"]:
    """For a path that is too long for a socket."""
    try:
        directory = os.open(socket.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _no_answer(socket, error) from error
    try:
        async with _new_http(f"/proc/self/fd/{directory}/{socket.name}") as http:
            yield http
    finally:
        os.close(directory)


def _exists(process: int) -> bool:
    """Whether there is such a process, and not just what is left of one. What can't be told may be there."""
    try:
        descriptor = os.pidfd_open(process)
    except ProcessLookupError:
        return False
    except OSError:  # of another namespace: it has no number here
        return True
    try:
        ended = select.poll()
        ended.register(descriptor, select.POLLIN)
        return not ended.poll(0)
    finally:
        os.close(descriptor)


def _new_http(path: str) -> "httpx2.AsyncClient":
    import httpx2  # not for commands that ask no VMM

    transport = httpx2.AsyncHTTPTransport(
        uds=path,
        verify=False,  # there is no TLS on a unix socket, and certificates take time to load
        limits=httpx2.Limits(max_connections=AT_ONCE, max_keepalive_connections=0),
    )
    return httpx2.AsyncClient(
        transport=transport,
        base_url="http://localhost",
        headers={"Accept": "application/json", "Accept-Encoding": "identity"},
        timeout=None,  # that is the caller's
        trust_env=False,
    )


async def _read(response: "httpx2.Response", socket: Path) -> bytes:
    announced = response.headers.get("Content-Length", "0")
    too_long = not announced.isdecimal() or int(announced) > MOST_BYTES
    data = bytearray()
    if not too_long:
        async for chunk in response.aiter_raw():  # to its end: broken off, its connection would not be closed in order
            if len(data) <= MOST_BYTES:
                data += chunk
    if too_long or len(data) > MOST_BYTES:
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
