"""QEMU's monitor protocol over a unix socket: framing without I/O, and one short connection on trio.

What the commands mean is the `qemu` backend's business. A monitor serves one
client at a time, so a connection is made for one operation and closed at once.
"""

import errno
import os
import socket as sockets
import struct
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import orjson
import trio
from attrs import frozen

from hypemand.backends.base import BackendError, BackendUnavailable

GREETING_PATIENCE_S = 5.0
MESSAGE_LIMIT = 16 * 1024 * 1024
_RECEIVE_SIZE = 64 * 1024
_REDIAL_S = 0.05


class QmpError(BackendError):
    """QEMU's own refusal of a command: its error class and its description."""

    def __init__(self, command: str, error_class: str, desc: str) -> None:
        self.command = command
        self.error_class = error_class
        self.desc = desc
        super().__init__(f"QEMU refuses {command}: {desc}")


class MonitorAbsent(BackendUnavailable):
    """No process listens: the socket is missing, or refuses. Whether a QEMU runs is for others to tell."""


class NotQmp(ValueError):
    """The bytes are not QMP."""


@frozen
class Event:
    """Something that QEMU told unasked. *at_s* is by QEMU's wall clock, in seconds since 1970."""

    name: str
    data: Mapping[str, Any]
    at_s: float


class MessageReader:
    """Bytes in, messages out; however the bytes were cut."""

    def __init__(self, limit: int = MESSAGE_LIMIT) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._searched = 0

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the stream."""
        self._buffer += data

    def next_message(self) -> dict[str, Any] | None:
        """The next complete message; None when more bytes are needed.

        Raises:
            NotQmp: A line that is no JSON object, or is longer than the limit.
        """
        while True:
            end = self._buffer.find(b"\n", self._searched)
            if (len(self._buffer) if end < 0 else end) > self._limit:
                raise NotQmp(f"a message of more than {self._limit} bytes")
            if end < 0:
                self._searched = len(self._buffer)
                return None
            line = bytes(self._buffer[:end]).strip()
            del self._buffer[: end + 1]
            self._searched = 0
            if line:
                return _parse(line)


def _parse(line: bytes) -> dict[str, Any]:
    try:
        message = orjson.loads(line)
    except orjson.JSONDecodeError:
        message = None
    if not isinstance(message, dict):
        raise NotQmp(f"{line[:60].decode(errors='replace')!r} is no JSON object")
    return message


_CREDENTIALS = struct.Struct("3i")  # process id, user, group of a unix socket's peer


class Monitor:
    """A connection that has its greeting. One call at a time; after a cancelled one it may be used on.

    Attributes:
        version: QEMU's, like ``7.2.22``.
        events: All that arrived on this connection, oldest first.
    """

    def __init__(self, path: Path, stream: trio.SocketStream) -> None:
        self.version = ""
        self.events: list[Event] = []
        self._path = path
        self._stream = stream
        self._reader = MessageReader()
        self._last_id = 0

    def peer_process(self) -> int | None:
        """The id of the QEMU at the other end; None where it is not to be known."""
        with suppress(OSError):
            credentials = self._stream.socket.getsockopt(sockets.SOL_SOCKET, sockets.SO_PEERCRED, _CREDENTIALS.size)
            return int(_CREDENTIALS.unpack(credentials)[0]) or None
        return None

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Run *command* and return its answer, however long QEMU takes.

        An underscore in an argument's name stands for QMP's dash. Answers to
        calls that were cancelled are passed over.

        Raises:
            QmpError: QEMU refuses.
            BackendUnavailable: The connection is cut, or does not speak QMP.
        """
        await self._send(self._encode(command, arguments))
        return await self._answer(command)

    async def hand_over(self, descriptor: int, command: str, **arguments: Any) -> Any:
        """Run *command*, which takes a file *descriptor*: QEMU gets a duplicate of it. Else like `execute`."""
        passed = [(sockets.SOL_SOCKET, sockets.SCM_RIGHTS, descriptor.to_bytes(4, sys.byteorder))]
        data = self._encode(command, arguments)
        try:
            sent = await self._stream.socket.sendmsg([data], passed)
        except OSError as error:
            raise self._cut() from error
        await self._send(data[sent:])
        return await self._answer(command)

    def _encode(self, command: str, arguments: Mapping[str, Any]) -> bytes:
        self._last_id += 1
        request: dict[str, Any] = {"execute": command, "id": self._last_id}
        if arguments:
            request["arguments"] = {name.replace("_", "-"): value for name, value in arguments.items()}
        return orjson.dumps(request) + b"\n"

    async def _answer(self, command: str) -> Any:
        while True:
            message = await self._receive()
            # QEMU gives no id back where it could not even read the command.
            if message.get("id", self._last_id) != self._last_id or "event" in message:
                continue
            match message:
                case {"return": answer}:
                    return answer
                case {"error": {"class": str(error_class), "desc": str(desc)}}:
                    raise QmpError(command, error_class, desc)
                case _:
                    raise self._not_qmp("it sent neither an answer nor an error")

    async def wait_event(self, name: str, **data: Any) -> Event:
        """The first event *name* on this connection whose data has all of *data*, once it is there.

        Raises:
            BackendUnavailable: The connection is cut, or does not speak QMP.
        """
        seen = 0
        while True:
            for event in self.events[seen:]:
                if event.name == name and data.items() <= event.data.items():
                    return event
            seen = len(self.events)
            await self._receive()

    def close(self) -> None:
        """Let go of the monitor, without waiting for anything. Idempotent."""
        self._stream.socket.close()

    async def greet(self) -> None:
        """Read the greeting and leave negotiation mode; `open_monitor` does it."""
        match await self._receive():
            case {"QMP": {"version": {"qemu": {"major": major, "minor": minor, "micro": micro}}}}:
                self.version = f"{major}.{minor}.{micro}"
            case _:
                raise self._not_qmp("it sent no greeting")
        await self.execute("qmp_capabilities")

    async def _send(self, data: bytes) -> None:
        try:
            await self._stream.send_all(data)
        except trio.BrokenResourceError as error:
            raise self._cut() from error

    async def _receive(self) -> dict[str, Any]:
        """The next message; an event is kept as well."""
        try:
            while (message := self._reader.next_message()) is None:
                data = await self._stream.receive_some(_RECEIVE_SIZE)
                if not data:
                    raise self._cut()
                self._reader.feed(data)
            if "event" in message:
                self.events.append(_event(message))
        except trio.BrokenResourceError as error:
            raise self._cut() from error
        except NotQmp as error:
            raise self._not_qmp(str(error)) from error
        return message

    def _cut(self) -> BackendUnavailable:
        return BackendUnavailable(f"the connection to the monitor {self._path} was cut: its QEMU has probably ended")

    def _not_qmp(self, what: str) -> BackendUnavailable:
        return BackendUnavailable(
            f"{self._path} does not speak QMP ({what}): point the setting socket at a monitor made with -qmp unix:..."
        )


def _event(message: Mapping[str, Any]) -> Event:
    match message:
        case {"event": str(name), "timestamp": {"seconds": int(seconds), "microseconds": int(microseconds)}}:
            data = message.get("data")
            return Event(name, data if isinstance(data, dict) else {}, seconds + microseconds / 1_000_000)
        case _:
            raise NotQmp("an event without its name or its time")


async def open_monitor(path: Path, *, patience_s: float = GREETING_PATIENCE_S) -> Monitor:
    """A connection to the monitor at *path*, ready for commands; the caller closes it.

    Args:
        patience_s: How long to wait for the greeting. There is none while
            another client holds the monitor, and none while QEMU is busy.

    Raises:
        MonitorAbsent: No socket, or nobody behind it.
        BackendUnavailable: No greeting, not QMP, or not to be opened; the text says which.
    """
    with ExitStack() as stack:
        with trio.move_on_after(patience_s) as waiting:
            monitor = Monitor(path, await _dial(path))
            stack.callback(monitor.close)
            await monitor.greet()
        if waiting.cancelled_caught:
            raise BackendUnavailable(
                f"the monitor {path} gave no greeting within {patience_s:g} s: another client holds it"
                " (give hypemand a monitor of its own: one more -qmp), or the guest is saving or frozen"
            )
        stack.pop_all()
    return monitor


@asynccontextmanager
async def connect(path: Path, *, patience_s: float = GREETING_PATIENCE_S) -> AsyncIterator[Monitor]:
    """`open_monitor`, until the end of the block."""
    monitor = await open_monitor(path, patience_s=patience_s)
    try:
        yield monitor
    finally:
        monitor.close()


async def _dial(path: Path) -> trio.SocketStream:
    while True:
        with ExitStack() as stack:
            socket = stack.enter_context(trio.socket.socket(trio.socket.AF_UNIX))
            try:
                await socket.connect(os.fspath(path))
                # With its queue full, a unix socket is neither connected nor refused.
                socket.getpeername()
            except OSError as error:
                if error.errno != errno.ENOTCONN:
                    raise _unreachable(path, error) from error
            else:
                stack.pop_all()
                return trio.SocketStream(socket)
        await trio.sleep(_REDIAL_S)


def _unreachable(path: Path, error: OSError) -> BackendUnavailable:
    match error:
        case FileNotFoundError():
            return MonitorAbsent(
                f"there is no monitor {path}: start the guest with -qmp unix:{path},server=on,wait=off"
            )
        case ConnectionRefusedError():
            return MonitorAbsent(f"the monitor {path} refuses: its QEMU has ended")
        case PermissionError():
            what = f"the monitor {path} may not be opened by this user: give its group write permission"
        case _:
            what = f"the monitor {path} can't be opened: {error.strerror or error}"
    return BackendUnavailable(what)
