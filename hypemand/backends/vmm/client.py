"""HTTP over the API socket of one VMM.

Time limits are the caller's: saving the memory of a guest takes minutes. A VMM
serves its requests one by one, so an answer means that what was asked before
is over. Each request connects anew, so that a thousand guests hold no thousand
sockets, and by a descriptor of the socket's file: its path may be of any length.
"""

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
import trio
from attrs import define, field, frozen

from hypemand.backends.base import BackendUnavailable
from hypemand.backends.vmm import processes
from hypemand.backends.vmm.exchange import MOST_BYTES, BrokenError, TooLongError, exchange
from hypemand.backends.vmm.handles import Handle, held_below

AT_ONCE = 4
"""Connections to one VMM: both take ten in all, and refuse others."""
SAID_CHARS = 600
"""So much of what a VMM says of an error is told."""
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
    _held: Handle | None = field(init=False, default=None)
    _at_once: trio.Semaphore = field(init=False, factory=lambda: trio.Semaphore(AT_ONCE))

    def has_ended(self) -> bool:
        """Whether the process that gave the last answer is known to be no more."""
        return self.peer is not None and not self.peer.lives()

    def is_alive(self) -> bool:
        """Whether that process is there, whatever has become of its socket."""
        return self.peer is not None and self.peer.is_known and self.peer.lives()

    def hold(self) -> None:
        """From now on ask whoever listens now, whatever becomes of the socket's path.

        So a guest is resumed by the VMM that has paused it, also where
        somebody moves or removes its socket, or starts another VMM there.

        Raises:
            BackendUnavailable: There is no such socket.
        """
        try:
            self._held = self._place()
        except OSError as error:
            raise _no_answer(self.socket, error) from error

    def let_go(self) -> None:
        """Ask whoever listens at the path."""
        self._held = None

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

    async def _ask(self, method: str, path: str, body: Mapping[str, Any] | None) -> tuple[int, bytes]:
        content = None if body is None else orjson.dumps(body)
        async with self._at_once:
            try:
                held = self._held or self._place()  # kept until it is over: its number would be another file's then
                answer = await exchange(f"/proc/self/fd/{held.fileno()}", method, path, content)
            except OSError as error:
                raise _no_answer(self.socket, error) from error
            except BrokenError as error:
                told = f"{self.socket}: the connection broke before the answer was there ({error})"
                raise ConnectionLost(told) from error
            except TooLongError as error:
                told = f"{self.socket} gives an answer of more than {MOST_BYTES >> 20} MiB: is that a VMM?"
                raise BackendUnavailable(told) from error
        pid, uid, gid = answer.listener
        self.peer = Peer(pid, uid, gid, processes.started_of(pid))
        return answer.status, answer.data

    def _place(self) -> Handle:
        """The socket's file. Nobody else ever listens at it: another process would have to make another file."""
        if self.root is not None and self.socket.is_relative_to(self.root):
            return held_below(self.root, str(self.socket.relative_to(self.root)))[0]
        return Handle(os.open(self.socket, os.O_PATH | os.O_CLOEXEC))


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
