"""What can go wrong at a step of a run, as seen from the engine."""

import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import trio
from attrs import frozen

from hypemand.backends.base import BackendUnavailable
from hypemand.conformance.bench import Running
from hypemand.conformance.leaping import LeapingClock
from hypemand.conformance.steps import Call, Step
from hypemand.conformance.subject import Subject, Traits
from hypemand.core.model import Freezer

AWAY_S = 0.2
MIDST_S = 0.005


@frozen
class Scene:
    """Where a fault happens. *aside* is for what goes on beside the engine."""

    subject: Subject
    running: Running
    aside: trio.Nursery


@frozen
class Fault:
    """Something that goes wrong in this process.

    Attributes:
        happens: In place of the call.
        ends_engine: Whether the engine is over then.
        operator: Whether the guest is left paused, by an operator.
    """

    name: str
    happens: Callable[[Scene, Call], Awaitable[Any]]
    ends_engine: bool = False
    operator: bool = False

    def is_possible(self, step: Step, traits: Traits) -> bool:
        """Whether this can go wrong at *step* of a run on a backend of *traits*.

        An operator who pauses a guest that stands still already leaves no
        trace, and right before our own pause only a mark tells the two apart.
        """
        if not self.operator:
            return True
        if step.name == "pause":
            return traits.marks
        return step.name not in ("capture", "resume") or traits.freezes is Freezer.HYPERVISOR


async def _error(scene: Scene, call: Call) -> Any:
    del scene, call
    raise BackendUnavailable("a fault: not asked at all")


async def _lost_answer(scene: Scene, call: Call) -> Any:
    del scene
    await call()
    raise BackendUnavailable("a fault: done, and the answer is lost")


async def _bug(scene: Scene, call: Call) -> Any:
    del scene
    await call()
    raise RuntimeError("a fault: a bug in the backend")


async def _hang(scene: Scene, call: Call) -> Any:
    del scene
    await call()
    limit, clock = trio.current_effective_deadline(), trio.lowlevel.current_clock()
    assert limit < trio.current_time() + 1e6, "the engine sets no time limit"
    assert isinstance(clock, LeapingClock)
    clock.leap_to(limit)
    await trio.sleep_forever()


async def _stop(scene: Scene, call: Call) -> Any:
    stopped = trio.Event()

    async def stop_in_its_midst() -> None:
        await trio.sleep(MIDST_S)
        scene.running.engine.stop(0)
        stopped.set()

    scene.aside.start_soon(stop_in_its_midst)
    try:
        return await call()
    finally:
        with trio.CancelScope(shield=True):
            await stopped.wait()


async def _unreachable(scene: Scene, call: Call) -> Any:
    async def come_back() -> None:
        await trio.sleep(AWAY_S)
        await scene.subject.come_back()

    await scene.subject.go_away()
    scene.aside.start_soon(come_back)
    return await call()


async def _operator_pauses(scene: Scene, call: Call) -> Any:
    await scene.subject.operator_pauses()
    return await call()


FAULTS = (
    Fault("error", _error),
    Fault("lost-answer", _lost_answer),
    Fault("bug", _bug),
    Fault("hang", _hang),
    Fault("cancelled", _stop, ends_engine=True),
    Fault("unreachable", _unreachable),
    Fault("operator-pauses", _operator_pauses, operator=True),
)


async def _killed_before(call: Call) -> Any:
    del call
    os.kill(os.getpid(), signal.SIGKILL)


async def _killed_in(call: Call) -> Any:
    async def kill_in_its_midst() -> None:
        await trio.sleep(MIDST_S)
        os.kill(os.getpid(), signal.SIGKILL)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(kill_in_its_midst)
        await call()
        await trio.sleep_forever()


async def _killed_after(call: Call) -> Any:
    await call()
    os.kill(os.getpid(), signal.SIGKILL)


KILLS = {"killed-before": _killed_before, "killed-in": _killed_in, "killed-after": _killed_after}
"""What happens in a process of its own, which does not live to tell."""
