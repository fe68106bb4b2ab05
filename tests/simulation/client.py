"""A process's connection to a hypervisor: the backend protocol, with answers that fail, lie, are lost or never come."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import trio

from hypemand.backends.base import (
    BackendUnavailable,
    Capabilities,
    Captured,
    CaptureFailed,
    CaptureRequest,
    InstanceNotFound,
    InvalidState,
    Preparation,
    Room,
    Settled,
    Status,
)
from hypemand.core.model import Freezer, InstanceId, InstanceState, RunStarted, Snapshot, SnapshotKind
from tests.simulation.hypervisor import OPERATOR, Capture, Hypervisor, snapshot_of

if TYPE_CHECKING:
    from tests.simulation.process import Life

T = TypeVar("T")
ROOMS = (Room(Path("/sim"), 100),)
ORDERED = frozenset({"pause", "resume", "settle", "capture"})
STUCK_S = 300.0
"""How long a capture that hangs keeps the hypervisor busy."""


class Trouble(Protocol):
    """Who decides what goes wrong with a hypervisor; see `chaos.Chaos`."""

    def answer_delay(self, name: str) -> float: ...

    def slow(self) -> float: ...

    def hypervisor_fault(self, name: str, step: str) -> str | None: ...

    def capture_s(self, name: str) -> float: ...

    def crash_point(self, life: "Life", step: str, when: str) -> None: ...

    def told(self, step: str, instance: str, answer: str) -> None: ...

    def in_trouble(self, name: str, instance: str, until: float) -> None: ...

    def later(self, effect: Callable[[], None]) -> None: ...

    def lied(self, instance: str) -> None: ...


class Client:
    """Follows the protocol's docstrings, as far as the hypervisor lets it."""

    def __init__(self, hypervisor: Hypervisor, life: "Life", trouble: Trouble) -> None:
        self.hypervisor = hypervisor
        self.name = hypervisor.name
        self._life = life
        self._trouble = trouble
        self._connection = {"type": "sim", "name": self.name, "version": hypervisor.version}

    @property
    def capabilities(self) -> Capabilities:
        known = self.hypervisor
        return Capabilities(freezes=known.freezes, abortable=known.abortable, kinds=frozenset(SnapshotKind))

    @property
    def connection(self) -> Mapping[str, Any]:
        return self._connection

    async def _ask(self, step: str, instance: str, effect: Callable[[], T]) -> T:
        trouble, life, hypervisor = self._trouble, self._life, self.hypervisor
        await life.gate()
        life.check()
        trouble.crash_point(life, step, "before")
        fault = trouble.hypervisor_fault(self.name, step)
        await self._take_time(instance, fault)
        await life.gate()
        life.check()
        if fault in ("error", "hang") or not hypervisor.available:
            await self._no_answer(step, instance, fault or "unavailable")
        if fault == "late":
            await self._take_hold_later(instance, effect)
        if step in ORDERED:
            hypervisor.take_hold(InstanceId(instance))
        try:
            result = effect()
        except Exception as error:
            trouble.told(step, instance, f"{type(error).__name__}: {error}")
            if isinstance(error, BackendUnavailable):
                trouble.in_trouble(self.name, instance, trio.current_time())
            raise
        trouble.crash_point(life, step, "after")
        if fault in ("lost", "mute"):
            await self._no_answer(step, instance, fault)
        trouble.told(step, instance, "ok")
        return result

    async def _take_time(self, instance: str, fault: str | None) -> None:
        if fault != "slow":
            await trio.sleep(self._trouble.answer_delay(self.name))
            return
        self._trouble.in_trouble(self.name, instance, math.inf)
        try:
            await trio.sleep(self._trouble.slow())
        finally:
            self._trouble.in_trouble(self.name, instance, trio.current_time())

    async def _no_answer(self, step: str, instance: str, fault: str) -> None:
        self._trouble.told(step, instance, fault)
        self._trouble.in_trouble(self.name, instance, math.inf)
        try:
            if fault in ("hang", "mute"):
                await trio.sleep_forever()
            raise BackendUnavailable("connection reset" if fault == "lost" else "connection refused")
        finally:
            self._trouble.in_trouble(self.name, instance, trio.current_time())

    async def _take_hold_later(self, instance: str, effect: Callable[[], object]) -> None:
        def try_effect() -> None:
            try:
                effect()
            except (InvalidState, InstanceNotFound, BackendUnavailable):
                self._trouble.told("late effect", instance, "refused")

        self.hypervisor.pending.setdefault(InstanceId(instance), []).append(try_effect)
        self._trouble.later(lambda: self.hypervisor.take_hold(InstanceId(instance)))
        await self._no_answer("pause", instance, "mute")

    async def open(self, *, first_use: bool) -> None:
        await self._ask("open", "", lambda: None)

    async def instances(self) -> frozenset[InstanceId]:
        return await self._ask("instances", "", lambda: frozenset(self.hypervisor.machines))

    async def state(self, instance: InstanceId) -> Status:
        status = await self._ask("state", instance, lambda: Status(self.hypervisor.machine(instance).state))
        if self._trouble.hypervisor_fault(self.name, "stale state") is not None:
            self._trouble.lied(instance)
            self._trouble.told("state", instance, "stale")
            return Status(self.hypervisor.machine(instance).before)
        return status

    async def prepare(self, instance: InstanceId, kind: SnapshotKind) -> Preparation:
        return await self._ask("prepare", instance, lambda: self._preparation(instance))

    def _preparation(self, instance: InstanceId) -> Preparation:
        self.hypervisor.machine(instance)
        return Preparation(ROOMS, {s.name for s in self.hypervisor.listed(instance)})

    async def make_ready(self, instance: InstanceId, request: CaptureRequest) -> None:
        await self._ask("make_ready", instance, lambda: self.hypervisor.machine(instance))

    async def pause(self, instance: InstanceId, request: CaptureRequest) -> None:
        await self._ask("pause", instance, lambda: self.hypervisor.pause(instance, request.run_id))

    async def resume(self, instance: InstanceId) -> None:
        await self._ask("resume", instance, lambda: self._resume(instance))

    def _resume(self, instance: InstanceId) -> None:
        busy = self.hypervisor.busy_with(instance)
        if busy is not None:
            raise BackendUnavailable("busy saving")
        if instance in self.hypervisor.refuses_resume:
            raise BackendUnavailable("resume refused")
        self.hypervisor.resume(instance)

    async def capture(self, instance: InstanceId, request: CaptureRequest) -> Captured:
        capture = await self._ask("capture", instance, lambda: self._begin(instance, request))
        assert capture.ends_at is not None
        began = trio.current_time()
        fault = self._trouble.hypervisor_fault(self.name, "capturing")
        try:
            if fault == "partial":
                await trio.sleep((capture.ends_at - began) / 2)
                capture.ends_at, capture.broke_off_at = None, trio.current_time()
                capture.has_client = False
                raise CaptureFailed("no space left on the hypervisor")
            if fault == "hang":
                capture.ends_at = began + STUCK_S
            await trio.sleep(capture.ends_at - began)
        except trio.Cancelled:
            self._given_up(capture)
            raise
        await self._life.gate()
        self._trouble.crash_point(self._life, "capture", "done")
        freeze_s = trio.current_time() - began if request.freezes is Freezer.HYPERVISOR else None
        return Captured(snapshot_of(capture), freeze_s)

    def _begin(self, instance: InstanceId, request: CaptureRequest) -> Capture:
        state = self.hypervisor.machine(instance).state
        if request.freezes is not Freezer.HYPERVISOR and state is InstanceState.RUNNING:
            raise CaptureFailed("the guest runs: what is saved would be torn")
        ends_at = trio.current_time() + self._trouble.capture_s(self.name)
        saved = self.hypervisor.complete_s is None
        capture = Capture(request=request, instance=instance, ends_at=ends_at, saved=saved)
        self.hypervisor.captures[request.run_id] = capture
        return capture

    def _given_up(self, capture: Capture) -> None:
        """The client is gone. What comes of the capture depends on who does its work."""
        capture.has_client = False
        try:
            self._life.check()
        except BaseException:  # noqa: BLE001 - it is dead: whoever does the work goes on or stops half-way
            if not self.hypervisor.goes_on:
                capture.ends_at = None
            return
        if self.hypervisor.abortable:
            capture.ends_at = None

    async def complete(self, captured: Captured) -> Captured:
        run_id, instance = captured.snapshot.id, captured.snapshot.instance_id
        await self._ask("complete", instance, lambda: None)
        if self.hypervisor.complete_s is not None:
            await trio.sleep(self.hypervisor.complete_s)
            await self._life.gate()
        self._life.check()
        capture = self.hypervisor.captures.get(run_id)
        if capture is None:
            raise CaptureFailed("the capture is not there any more")
        if capture.torn_by == OPERATOR:
            raise CaptureFailed("somebody let the guest run during the capture")
        capture.saved = True
        return captured

    async def publish(self, snapshot: Snapshot) -> None:
        await self._ask("publish", snapshot.instance_id, lambda: self.hypervisor.publish(snapshot))

    async def list_snapshots(self, instance: InstanceId) -> tuple[Snapshot, ...]:
        return await self._ask("list_snapshots", instance, lambda: tuple(self.hypervisor.listed(instance)))

    async def delete_snapshot(self, snapshot: Snapshot) -> None:
        await self._ask("delete_snapshot", snapshot.instance_id, lambda: self.hypervisor.delete(snapshot))

    async def settle(self, run: RunStarted, *, ours: bool) -> Settled:
        return await self._ask("settle", run.instance_id, lambda: self.hypervisor.settle(run, ours=ours))

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()
