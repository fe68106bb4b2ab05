"""Requests that go on when whoever asked has given up: to cut one short would leave a guest down."""

from collections.abc import Awaitable, Callable

import structlog
import trio
from attrs import Factory, define

from hypemand.backends.hypeman.server import Answer
from hypemand.core.model import InstanceId

_log = structlog.get_logger()


@define(eq=False)
class _Request:
    over: trio.Event = Factory(trio.Event)
    answer: Answer | None = None
    error: Exception | None = None


@define(eq=False)
class Uncut:
    """One request at a time for each instance, in a task of its own that ends with the process alone."""

    _under_way: dict[InstanceId, _Request] = Factory(dict)

    async def do(self, instance: InstanceId, ask: Callable[[], Awaitable[Answer]]) -> Answer:
        """What *ask* returns or raises. Cancelled, it goes on nevertheless, and its answer is nobody's."""
        await self.over(instance)
        request = self._under_way[instance] = _Request()
        trio.lowlevel.spawn_system_task(self._do, instance, request, ask)
        await request.over.wait()
        if request.error is not None:
            raise request.error
        assert request.answer is not None
        return request.answer

    async def _do(self, instance: InstanceId, request: _Request, ask: Callable[[], Awaitable[Answer]]) -> None:
        try:
            request.answer = await ask()
        except Exception as error:  # noqa: BLE001 - it is whoever asked that has to know
            request.error = error
        finally:
            del self._under_way[instance]
            request.over.set()

    async def over(self, instance: InstanceId) -> None:
        """Wait until no request is under way for *instance*."""
        while (request := self._under_way.get(instance)) is not None:
            await request.over.wait()
