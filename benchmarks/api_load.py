"""A client that asks as fast as answers come: HTTP/1.1 over kept connections, as little of it as is needed.

None of it is hypemand's, so that one client measures hypemand and what it is
compared with, and costs both the same.
"""

from collections.abc import Iterator, Mapping
from functools import partial

import trio
from attrs import define, field, frozen


class UnexpectedAnswerError(Exception):
    """The server did not answer as it should have; the text has the answer."""


@frozen
class Target:
    """Where the server listens on 127.0.0.1, and the token that it wants, if any."""

    port: int
    token: str | None = None

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """One request, ready to be sent."""
        lines = [f"{method} {path} HTTP/1.1", f"Host: 127.0.0.1:{self.port}", f"Content-Length: {len(body)}"]
        lines += ["Content-Type: application/json"] if body else []
        lines += [f"Authorization: Bearer {self.token}"] if self.token else []
        return "\r\n".join([*lines, "", ""]).encode() + body


@define
class Load:
    """What came of it.

    Attributes:
        took_s: Of each request, from its first byte sent to the last one received.
        seconds: From the first request to the last answer.
    """

    took_s: list[float] = field(factory=list)
    seconds: float = 0.0

    @property
    def per_s(self) -> float:
        """Requests per second."""
        return len(self.took_s) / self.seconds


class Connection:
    """One kept connection, one request at a time."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._buffer = bytearray()

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Status and body of the answer to *request*."""
        await self._stream.send_all(request)
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            await self._receive()
        head, *lines = bytes(self._buffer[:end]).decode("latin-1").split("\r\n")
        del self._buffer[: end + 4]
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = self._length(headers)
        while len(self._buffer) < length:
            await self._receive()
        body = bytes(self._buffer[:length])
        del self._buffer[:length]
        return int(head.split()[1]), body

    @staticmethod
    def _length(headers: Mapping[str, str]) -> int:
        if "transfer-encoding" in headers:
            raise UnexpectedAnswerError("an answer in chunks")
        return int(headers.get("content-length", "0"))

    async def _receive(self) -> None:
        received = await self._stream.receive_some()
        if not received:
            raise UnexpectedAnswerError("the connection was closed")
        self._buffer += received


async def ask_all(target: Target, requests: Iterator[bytes], connections: int) -> Load:
    """Send *requests*, each connection its next one once it has the answer to the one before.

    Raises:
        UnexpectedAnswerError: An answer was not 200.
    """
    load = Load()
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(connections):
            nursery.start_soon(partial(_ask_on, target, requests, load))
    load.seconds = trio.current_time() - began
    return load


async def _ask_on(target: Target, requests: Iterator[bytes], load: Load) -> None:
    async with await trio.open_tcp_stream("127.0.0.1", target.port) as stream:
        connection = Connection(stream)
        for request in requests:
            began = trio.current_time()
            status, body = await connection.ask(request)
            if status != 200:
                raise UnexpectedAnswerError(f"{request[:80]!r}: {status} {body[:200]!r}")
            load.took_s.append(trio.current_time() - began)


def repeated(request: bytes, seconds: float) -> Iterator[bytes]:
    """*request* again and again, for so long."""
    until = trio.current_time() + seconds
    while trio.current_time() < until:
        yield request
