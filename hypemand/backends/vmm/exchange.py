"""One request of HTTP/1.1 to whoever listens at a unix socket, on a connection of its own."""

import errno
import os
import socket as sockets
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import h11
import trio
from attrs import frozen

MOST_BYTES = 8 << 20
"""No answer of a VMM is longer than that."""
_PIECE = 64 << 10
_CREDENTIALS = struct.Struct("3i")


class BrokenError(Exception):
    """The connection broke before there was a whole answer, or what came is none."""


class TooLongError(Exception):
    """The answer is longer than `MOST_BYTES`."""


@frozen
class Answer:
    """What was answered, and by whom.

    Attributes:
        listener: Process, user and group that made the socket, as the kernel tells it.
    """

    status: int
    data: bytes
    listener: tuple[int, int, int]


async def exchange(path: str, method: str, target: str, body: bytes | None = None) -> Answer:
    """The answer to one request. Cancelled, the connection is closed.

    Args:
        body: JSON, or None for a request without a body.

    Raises:
        OSError: Nobody could be reached at *path*; nothing was asked.
        BrokenError: It may have been done, or not.
        TooLongError: Likewise.
    """
    async with await trio.open_unix_socket(path) as stream:
        listener = _CREDENTIALS.unpack(stream.getsockopt(sockets.SOL_SOCKET, sockets.SO_PEERCRED, _CREDENTIALS.size))
        if listener[1] == -1:  # there is no other end: so many wait that none was taken, of which trio hears nothing
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), path)
        connection = h11.Connection(h11.CLIENT)
        with _as_broken():
            with suppress(trio.BrokenResourceError):  # who takes no more requests may have said so before
                await stream.send_all(_request(connection, method, target, body))
            status, data = await _answer(connection, stream)
        return Answer(status, data, listener)


def _request(connection: h11.Connection, method: str, target: str, body: bytes | None) -> bytes:
    headers = [("Host", "localhost"), ("Accept", "application/json")]
    if body is not None:
        headers += [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
    head = connection.send(h11.Request(method=method, target=target, headers=headers))
    content = b"" if body is None else connection.send(h11.Data(body))
    return (head or b"") + (content or b"") + (connection.send(h11.EndOfMessage()) or b"")


async def _answer(connection: h11.Connection, stream: trio.SocketStream) -> tuple[int, bytes]:
    status, data = 0, bytearray()
    while True:
        match connection.next_event():
            case h11.NEED_DATA:
                connection.receive_data(await stream.receive_some(_PIECE))
            case h11.Response(status_code=status, headers=headers):
                _check_length(int(dict(headers).get(b"content-length", b"0")))
            case h11.Data(data=piece):
                data += piece
                _check_length(len(data))
            case h11.EndOfMessage():
                return status, bytes(data)
            case h11.PAUSED | h11.ConnectionClosed():
                raise BrokenError("it was closed")


def _check_length(length: int) -> None:
    if length > MOST_BYTES:
        raise TooLongError


@contextmanager
def _as_broken() -> Iterator[None]:
    try:
        yield
    except (trio.BrokenResourceError, h11.RemoteProtocolError) as error:
        raise BrokenError(str(error) or type(error).__name__) from error
