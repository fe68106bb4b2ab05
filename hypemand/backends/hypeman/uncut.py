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
    due_by: float
    over: trio.Event = Factory(trio.Event)
    answer: Answer | None = None
    error: Exception | None = None


@define(eq=False)
class Uncut:
    """One request at a time for each instance, in a task of its own that ends with the process alone."""

    _under_way: dict[InstanceId, _Request] = Factory(dict)

    async def do(self, instance: InstanceId, ask: Callable[[], Awaitable[Answer]], *, on_its_way_s: float) -> Answer:
        """What *ask* returns or raises. Cancelled, it goes on nevertheless, and its answer is nobody's.

        Args:
            on_its_way_s: How long it may take until the server begins with it.
        """
        await self.over(instance)
        request = self._under_way[instance] = _Request(trio.current_time() + on_its_way_s)
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
            self._forget(instance, request)
            request.over.set()

    async def over(self, instance: InstanceId) -> None:
        """Wait until no request is under way for *instance*."""
        while (request := self._under_way.get(instance)) is not None:
            await request.over.wait()

    async def let_go(self, instance: InstanceId, *, begun: bool, wait_s: float) -> bool:
        """Wait until no request is under way for *instance*, or its connection is taken for a silent one.

        It is then left to itself, not cut short: nobody waits for its answer any more.

        Args:
            begun: It is not on its way any more.
            wait_s: How long one is waited for that the server is done with.

        Returns:
            Whether there was one.
        """
        found = instance in self._under_way
        while (request := self._under_way.get(instance)) is not None:
            left_s = wait_s if begun else max(request.due_by - trio.current_time(), wait_s)
            with trio.move_on_after(left_s) as waiting:
                await request.over.wait()
            if waiting.cancelled_caught:
                _log.warning("a request that the server is done with has no answer", instance_id=instance)
                self._forget(instance, request)
        return found

    def _forget(self, instance: InstanceId, request: _Request) -> None:
        if self._under_way.get(instance) is request:
            del self._under_way[instance]
