"""Asking an ASGI app without a server: requests as bytes on the wire would make them, in virtual time too."""

import json
import math
from collections.abc import Mapping
from typing import Any

import trio
from attrs import define, field
from starlette.types import ASGIApp, Message


@define
class Answer:
    """What an app has answered so far. *parts*: of the body, each as it came, with trio's time."""

    status: int = 0
    headers: dict[str, str] = field(factory=dict)
    parts: list[tuple[float, bytes]] = field(factory=list)
    over: bool = False

    @property
    def body(self) -> bytes:
        return b"".join(part for _, part in self.parts)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def lines(self) -> list[Any]:
        """Its JSON lines, without the empty ones."""
        return [json.loads(line) for line in self.body.splitlines() if line]

    def take(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            assert self.status == 0
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            assert len(self.headers) == len(message["headers"])
        elif message["type"] == "http.response.body":
            assert self.status, "no body before the headers"
            assert not self.over
            self.parts.append((trio.current_time(), message.get("body", b"")))
            self.over = not message.get("more_body", False)


async def ask(
    app: ASGIApp,
    method: str,
    target: str,
    body: Any = None,
    *,
    headers: Mapping[str, str] | None = None,
    chunks: list[bytes] | None = None,
    unfinished: bool = False,
    leaves_after: float = math.inf,
    slow_s: float = 0.0,
    answer: Answer | None = None,
) -> Answer:
    """The answer of *app* to ``METHOD target``, of which the path is taken as it stands.

    Args:
        body: Bytes, or what is made JSON of.
        chunks: The body in these parts instead. *unfinished*: and more, which never come.
        leaves_after: Seconds after which the client goes away.
        slow_s: How long the client takes for each part of the answer.
        answer: To be filled, for who wants to look at it meanwhile.
    """
    answer = answer or Answer()
    if chunks is None:
        chunks = [body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()]
    path, _, query = target.partition("?")
    raw = {**({"content-type": "application/json"} if body is not None or chunks != [b""] else {}), **(headers or {})}
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": "never looked at",
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(name.lower().encode(), value.encode()) for name, value in raw.items()],
        "client": None,
        "server": None,
    }
    messages = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    messages[-1]["more_body"] = unfinished
    leaves_at = trio.current_time() + leaves_after

    async def receive() -> Message:
        if messages:
            return messages.pop(0)
        await trio.sleep_until(leaves_at)
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        answer.take(message)
        await trio.sleep(slow_s)

    await app(scope, receive, send)
    assert answer.over or trio.current_time() >= leaves_at
    return answer
