"""A client that speaks HTTP/1.1 byte by byte, so that it can do what no proper client does. A helper, not a test."""

import json
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trio
from attrs import frozen

from hypemand.surface.http.sockets import short_path
from tests.processes import PATIENCE_S

Stream = trio.SocketStream | trio.SSLStream[trio.SocketStream]


@frozen
class Answer:
    """What came back, in order."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


async def connect(to: Path | int) -> trio.SocketStream:
    """A connection to the socket at a path, or to a port of this machine."""
    with trio.fail_after(PATIENCE_S):
        if isinstance(to, int):
            return await trio.open_tcp_stream("127.0.0.1", to)
        client = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with short_path(to) as name:
                await client.connect(name)
        except BaseException:
            client.close()
            raise
        return trio.SocketStream(client)


def head(method: str = "GET", path: str = "/health", *lines: str) -> bytes:
    """The head of a request."""
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: here", *lines, "", ""]).encode()


async def rest(stream: Stream) -> bytes:
    """All that comes until the server closes the connection."""
    received = bytearray()
    with trio.fail_after(PATIENCE_S):
        try:
            while data := await stream.receive_some():
                received += data
        except trio.BrokenResourceError:
            pass  # it closed while something was on its way to it
    return bytes(received)


async def answer(stream: Stream) -> Answer:
    """The next answer; it must have a Content-Length."""
    received = b""
    with trio.fail_after(PATIENCE_S):
        while b"\r\n\r\n" not in received:
            data = bytes(await stream.receive_some(1))
            assert data, f"closed after {received!r}"
            received += data
        lines = received.decode().split("\r\n")
        headers = {
            name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:] if line)
        }
        status = int(lines[0].split()[1])
        if status == 100:
            return await answer(stream)
        body = b""
        while len(body) < int(headers.get("content-length", 0)):
            body += bytes(await stream.receive_some(int(headers["content-length"]) - len(body)))
    return Answer(status, headers, body)


async def ask(
    to: Path | int, path: str = "/health", *lines: str, method: str = "GET", body: bytes | None = None
) -> Answer:
    """One request on a connection of its own."""
    length = () if body is None else (f"Content-Length: {len(body)}", "Content-Type: application/json")
    stream = await connect(to)
    async with stream:
        with trio.fail_after(PATIENCE_S):
            await stream.send_all(head(method, path, *lines, *length) + (body or b""))
        return await answer(stream)


def free_port() -> int:
    """A port at which nobody listens at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
