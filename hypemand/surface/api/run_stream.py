"""A run that is told step by step to the client that asked for it, as JSON lines."""

import math
from contextlib import ExitStack
from typing import Any

import orjson
import trio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hypemand.core.model import InstanceId
from hypemand.engine.events import Event, RunStepped
from hypemand.engine.requests import Requests
from hypemand.state.codec import line_document

NDJSON = "application/x-ndjson"
KEEP_ALIVE_S = 10.0
LEFT_OPEN = (
    "the run did not end: it is left open until its hypervisor answers, or hypemand stops;"
    " the schedule's last_error and the history tell how it ended"
)


class RunStream(Response):
    """The steps of a run of *instance*, which begins with the answer. It goes on when the client goes away."""

    def __init__(self, requests: Requests, instance: InstanceId, client: str) -> None:
        super().__init__(media_type=NDJSON)
        del self.headers["content-length"]
        self._requests = requests
        self._instance = instance
        self._client = client

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - it is that of ASGI
        """Send them.

        Raises:
            RequestRefusedError: There is no such run to be had; nothing was sent.
        """
        lines, told = trio.open_memory_channel[dict[str, Any]](math.inf)

        def hear(event: Event) -> None:
            if isinstance(event, RunStepped) and event.instance_id == self._instance:
                lines.send_nowait({"step": event.step, **event.facts})

        with ExitStack() as hearing:
            hearing.enter_context(self._requests.engine.events.heard_by(hear))
            run = self._requests.begin_run(self._instance, self._client)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_cancel_when_gone, receive, nursery.cancel_scope)

                @nursery.start_soon
                async def end() -> None:
                    ended = await run.ended()
                    hearing.close()
                    if ended is None:
                        lines.send_nowait({"step": "left open", "message": LEFT_OPEN})
                    else:
                        lines.send_nowait({"step": "finished", "run": line_document(ended)})
                    lines.close()

                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await send({"type": "http.response.body", "body": b"", "more_body": True})
                await self._tell(told, send)
                nursery.cancel_scope.cancel()

    async def _tell(self, told: trio.MemoryReceiveChannel[dict[str, Any]], send: Send) -> None:
        while True:
            body = b"\n"
            with trio.move_on_after(KEEP_ALIVE_S):
                try:
                    body = orjson.dumps(await told.receive(), option=orjson.OPT_APPEND_NEWLINE)
                except trio.EndOfChannel:
                    break
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _cancel_when_gone(receive: Receive, scope: trio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()
