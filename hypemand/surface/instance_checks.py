"""What stands in the way of a capture of each scheduled instance, found before its first run has to find it."""

from collections.abc import Collection, Iterable, Iterator, Mapping

import structlog
import trio
from attrs import define, field

from hypemand.backends.base import Backend, BackendError, BackendUnavailable, Preparation
from hypemand.core.errors import StateForbidsRun
from hypemand.core.model import InstanceId
from hypemand.core.runstate import decide_steps
from hypemand.engine.limits import answer

AT_ONCE = 16
ANSWER_WITHIN_S = 5.0
ALL_WITHIN_S = 28.0
MOST_TOLD = 20
_log = structlog.get_logger()


@define
class InstanceChecks:
    """Asks each instance for its state, and its backend to prepare a capture, which changes nothing.

    Attributes:
        used: Backends through which something was captured before. What others keep their snapshots in is not there
            yet, and so they may be unable to prepare anything.
    """

    backends: Mapping[str, Backend]
    used: Collection[str]
    _found: dict[InstanceId, list[str]] = field(factory=dict)

    async def warnings(self, scheduled: Iterable[tuple[InstanceId, str]]) -> list[str]:
        """What was found of *scheduled*: instances, each with the name of its backend; a line for each finding."""
        wanted = sorted(scheduled)
        limiter = trio.CapacityLimiter(AT_ONCE)
        with trio.move_on_after(ALL_WITHIN_S):
            async with trio.open_nursery() as nursery:
                for instance, name in wanted:
                    nursery.start_soon(self._look, instance, self.backends[name], limiter)
        return [*self._lines(wanted)]

    def _lines(self, wanted: Iterable[tuple[InstanceId, str]]) -> Iterator[str]:
        found = [
            f"backends.{name}: {instance}: {text}"
            for instance, name in wanted
            for text in self._found.get(instance, ())
        ]
        yield from found[:MOST_TOLD]
        if len(found) > MOST_TOLD:
            yield f"and {len(found) - MOST_TOLD} more findings of this kind"
        if left := [instance for instance, _ in wanted if instance not in self._found]:
            yield f"{len(left)} instances were not looked at within {ALL_WITHIN_S:g} s, the first is {left[0]}"

    async def _look(self, instance: InstanceId, backend: Backend, limiter: trio.CapacityLimiter) -> None:
        async with limiter:
            try:
                ready = await self._prepared(instance, backend)
            except BackendError as error:
                self._found[instance] = [str(error)]
            except Exception as error:  # noqa: BLE001 - a bug in one backend keeps no other from being checked
                _log.exception("internal error of a backend", backend=backend.name, instance_id=instance)
                self._found[instance] = [f"internal error: {error!r}"]
            else:
                self._found[instance] = [*ready.warnings, *ready.advice]

    async def _prepared(self, instance: InstanceId, backend: Backend) -> Preparation:
        status = await answer("state", ANSWER_WITHIN_S, lambda: backend.state(instance))
        try:
            steps = decide_steps(status.state, backend.capabilities.freezes, status.detail)
        except StateForbidsRun:
            return Preparation()  # it may be in another state when its run is due; `status` tells
        if steps.kind not in backend.capabilities.kinds:
            return Preparation(
                advice=(f"is {status.state}; this backend makes no {steps.kind} snapshots as it is configured",)
            )
        try:
            return await answer("prepare", ANSWER_WITHIN_S, lambda: backend.prepare(instance, steps.kind))
        except BackendUnavailable:
            if backend.name in self.used:
                raise
            return Preparation()
