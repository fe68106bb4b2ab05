"""Fakes for what can't run in virtual time: a hypervisor, a clock, a disk with room. Tested in test_fakes.py."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any

import trio
from attrs import define, evolve, field

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
from hypemand.core.model import (
    Freezer,
    InstanceId,
    InstanceState,
    RunStarted,
    Snapshot,
    SnapshotKind,
)
from hypemand.engine.leases import NoGuardError
from hypemand.engine.space import Filesystem

START = datetime(2026, 3, 9, 1, 0, tzinfo=UTC)


@define
class FakeClock:
    """Follows trio's clock from `START`. Make it inside the event loop.

    `jump` moves the wall clock alone; `suspend` moves wall clock and boot-time clock, and trio's stands still;
    `reboot` has the boot-time clock begin anew.
    """

    start: datetime = START
    synced: bool | None = None
    offset: timedelta = timedelta(0)
    suspended: timedelta = timedelta(0)
    local: tzinfo = UTC
    began: float = field(factory=trio.current_time)
    earlier_boots_s: float = 0.0

    def now(self) -> datetime:
        return self.start + self.offset + timedelta(seconds=self._went_by())

    def boot_s(self) -> float:
        return self._went_by() - self.earlier_boots_s

    def _went_by(self) -> float:
        return trio.current_time() - self.began + self.suspended.total_seconds()

    def synchronised(self) -> bool | None:
        return self.synced

    def zone(self) -> tzinfo:
        return self.local

    def jump(self, by: timedelta) -> None:
        self.offset += by

    def suspend(self, span: timedelta) -> None:
        self.suspended += span

    def reboot(self) -> None:
        self.earlier_boots_s = self._went_by()


@define
class FakeInstance:
    """A guest. *saving*: ids of unpublished snapshots that are not whole yet."""

    state: InstanceState = InstanceState.RUNNING
    paused_by_us: bool = False
    snapshots: dict[str, Snapshot] = field(factory=dict)
    unpublished: dict[str, Snapshot] = field(factory=dict)
    saving: set[str] = field(factory=set)


@define
class Fault:
    """What a call does instead of working: hang, or raise; *times* calls long (None: always)."""

    error: Exception | None = None
    hang: bool = False
    times: int | None = None


@define(eq=False)
class FakeBackend:
    """A hypervisor in memory, which follows the protocol's docstrings and can be told to misbehave.

    Attributes:
        frozen: Instances that stand still now, by hypemand or in the hypervisor's own capture.
        calls: Every call with the time it was made, for asserting order and lateness.
        marks: Whether it knows its own pauses from an operator's; else `pause` takes any, and `settle` goes by *ours*.
        abandoned: Captures that go on in the hypervisor though their caller is gone.
        make_ready_s: How long `make_ready` takes.
        complete_s: How long `complete` takes, or None where `capture` does all there is to do.
        size_bytes, whole_bytes: Of a snapshot after `capture`, and after a `complete` that takes time.
        measured_s: The freeze as the hypervisor itself measures it, where the engine freezes; told by `capture`.
        measured_late_s: The same, told by `complete`.
        settled_freeze_s: How long the guest was frozen, as `settle` tells it.
        rooms, prepared_as, warnings: Parts of every `Preparation`. *captured_warnings*: those of every `Captured`,
            *completed_warnings*: those that `complete` has instead.
        requests: What `make_ready`, `pause` and `capture` were asked for, with the call's name.
    """

    clock: FakeClock
    name: str = "fake"
    freezes: Freezer = Freezer.ENGINE
    abortable: bool = True
    capture_s: float = 1.0
    complete_s: float | None = None
    make_ready_s: float = 0.0
    kinds: frozenset[SnapshotKind] = frozenset(SnapshotKind)
    machines: dict[InstanceId, FakeInstance] = field(factory=dict)
    faults: dict[tuple[str, str], Fault] = field(factory=dict)
    calls: list[tuple[float, str, str]] = field(factory=list)
    frozen: set[InstanceId] = field(factory=set)
    longest_frozen: float = 0.0
    capturing: int = 0
    most_capturing: int = 0
    completing: int = 0
    most_completing: int = 0
    size_bytes: int = 100
    whole_bytes: int = 1000
    measured_s: float | None = None
    measured_late_s: float | None = None
    settled_freeze_s: float | None = None
    rooms: tuple[Room, ...] = (Room(Path("/fake"), 100),)
    prepared_as: Freezer | None = None
    warnings: tuple[str, ...] = ()
    captured_warnings: tuple[str, ...] = ()
    completed_warnings: tuple[str, ...] | None = None
    requests: list[tuple[str, CaptureRequest]] = field(factory=list)
    taken_names: set[str] = field(factory=set)
    abandoned: dict[str, float] = field(factory=dict)
    marks: bool = True
    unavailable: bool = False
    closed: bool = False
    settings: dict[str, Any] = field(factory=dict)
    _frozen_since: dict[InstanceId, float] = field(factory=dict)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(freezes=self.freezes, abortable=self.abortable, kinds=self.kinds)

    @property
    def connection(self) -> Mapping[str, Any]:
        return {"type": "fake", "name": self.name, **self.settings}

    def add(self, *names: str, state: InstanceState = InstanceState.RUNNING) -> None:
        for name in names:
            self.machines[InstanceId(name)] = FakeInstance(state)

    def fail(self, call: str, instance: str, error: Exception | None = None, *, times: int | None = None) -> None:
        """Let *call* on *instance* raise *error*, or hang where there is none."""
        self.faults[call, instance] = Fault(error, hang=error is None, times=times)

    def heal(self, call: str, instance: str) -> None:
        self.faults.pop((call, instance), None)

    async def open(self, *, first_use: bool) -> None:
        await self._called("open", f"first_use={first_use}")

    async def instances(self) -> frozenset[InstanceId]:
        await self._called("instances", "")
        return frozenset(self.machines)

    async def state(self, instance: InstanceId) -> Status:
        await self._called("state", instance)
        return Status(self._machine(instance).state)

    async def prepare(self, instance: InstanceId, kind: SnapshotKind) -> Preparation:
        await self._called("prepare", instance)
        names = {s.name for s in self._machine(instance).snapshots.values()}
        return Preparation(self.rooms, names | self.taken_names, self.prepared_as, self.warnings)

    async def make_ready(self, instance: InstanceId, request: CaptureRequest) -> None:
        self.requests.append(("make_ready", request))
        if self.make_ready_s:
            await trio.sleep(self.make_ready_s)
        await self._called("make_ready", instance)

    async def pause(self, instance: InstanceId, request: CaptureRequest) -> None:
        self.requests.append(("pause", request))
        machine = self._machine(instance)
        if machine.state not in (InstanceState.RUNNING, InstanceState.PAUSED):
            raise InvalidState(f"instance is {machine.state}")
        if machine.state is InstanceState.PAUSED and self.marks and not machine.paused_by_us:
            raise InvalidState("instance is paused by somebody else")
        refused = isinstance(self._error("pause", instance), (CaptureFailed, InvalidState))
        if machine.state is InstanceState.RUNNING and not refused:
            machine.state, machine.paused_by_us = InstanceState.PAUSED, True
            self._freeze(instance)
        await self._called("pause", instance)

    async def resume(self, instance: InstanceId) -> None:
        await self._called("resume", instance)
        machine = self._machine(instance)
        if machine.state not in (InstanceState.PAUSED, InstanceState.RUNNING):
            raise InvalidState(f"instance is {machine.state}")
        machine.state, machine.paused_by_us = InstanceState.RUNNING, False
        self._thaw(instance)

    async def capture(self, instance: InstanceId, request: CaptureRequest) -> Captured:
        self.requests.append(("capture", request))
        state = self._machine(instance).state
        if request.freezes is Freezer.ENGINE and state is InstanceState.RUNNING:
            raise AssertionError("the engine was to freeze the guest, and it runs")
        self.capturing += 1
        self.most_capturing = max(self.most_capturing, self.capturing)
        by_itself = request.freezes is Freezer.HYPERVISOR and state is InstanceState.RUNNING
        began = trio.current_time()
        try:
            if by_itself:
                self._freeze(instance)
            await self._called("capture", instance)
            await trio.sleep(self.capture_s)
            snapshot = _snapshot(instance, request, self.size_bytes)
            machine = self._machine(instance)
            machine.unpublished[request.run_id] = snapshot
            if self.complete_s is not None:
                machine.saving.add(request.run_id)
            freeze_s = trio.current_time() - began if by_itself else self.measured_s
            return Captured(snapshot, freeze_s, self.captured_warnings)
        except trio.Cancelled:
            if not self.abortable:
                self.abandoned[request.run_id] = began + self.capture_s
            raise
        finally:
            self.capturing -= 1
            if by_itself:
                self._thaw(instance)

    async def complete(self, captured: Captured) -> Captured:
        snapshot = captured.snapshot
        machine = self._machine(snapshot.instance_id)
        self.completing += 1
        self.most_completing = max(self.most_completing, self.completing)
        try:
            await self._called("complete", snapshot.instance_id)
            if self.complete_s is None:
                return captured
            await trio.sleep(self.complete_s)
        finally:
            self.completing -= 1
        machine.saving.remove(snapshot.id)
        whole = machine.unpublished[snapshot.id] = evolve(snapshot, size_bytes=self.whole_bytes)
        warnings = captured.warnings if self.completed_warnings is None else self.completed_warnings
        return Captured(whole, self.measured_late_s or captured.freeze_s, warnings)

    async def publish(self, snapshot: Snapshot) -> None:
        await self._called("publish", snapshot.instance_id)
        machine = self._machine(snapshot.instance_id)
        if snapshot.id in machine.saving:
            raise AssertionError("published before it was complete")
        machine.snapshots[snapshot.id] = machine.unpublished.pop(snapshot.id, snapshot)

    async def list_snapshots(self, instance: InstanceId) -> tuple[Snapshot, ...]:
        await self._called("list_snapshots", instance)
        held = self.machines.get(instance, FakeInstance()).snapshots.values()
        return tuple(sorted(held, key=lambda s: (s.created_at, s.id)))

    async def delete_snapshot(self, snapshot: Snapshot) -> None:
        await self._called("delete_snapshot", snapshot.name)
        self.machines[snapshot.instance_id].snapshots.pop(snapshot.id, None)

    async def settle(self, run: RunStarted, *, ours: bool) -> Settled:
        await self._called("settle", run.instance_id)
        if self.abandoned.get(run.run_id, 0.0) > trio.current_time():
            raise BackendUnavailable("the hypervisor is still saving")
        machine = self._machine(run.instance_id)
        resumed = machine.paused_by_us if self.marks else ours and machine.state is InstanceState.PAUSED
        if resumed:
            machine.state, machine.paused_by_us = InstanceState.RUNNING, False
            self._thaw(run.instance_id)
        machine.unpublished.pop(run.run_id, None)
        machine.saving.discard(run.run_id)
        return Settled(machine.snapshots.get(run.run_id), resumed, self.settled_freeze_s)

    async def aclose(self) -> None:
        self.closed = True

    async def _called(self, call: str, instance: str) -> None:
        self.calls.append((trio.current_time(), call, instance))
        await trio.lowlevel.checkpoint()
        if self.unavailable:
            raise BackendUnavailable("connection refused")
        fault = self._fault(call, instance)
        if fault is None:
            return
        if fault.times is not None:
            fault.times -= 1
            if fault.times < 0:
                return
        if fault.hang:
            await trio.sleep_forever()
        assert fault.error is not None
        raise fault.error

    def _fault(self, call: str, instance: str) -> Fault | None:
        return self.faults.get((call, instance)) or self.faults.get((call, "*"))

    def _error(self, call: str, instance: str) -> Exception | None:
        """What the next such call raises."""
        fault = self._fault(call, instance)
        if fault is None or (fault.times is not None and fault.times <= 0):
            return None
        return fault.error

    def _machine(self, instance: InstanceId) -> FakeInstance:
        if instance not in self.machines:
            raise InstanceNotFound(f"no instance {instance}")
        return self.machines[instance]

    def _freeze(self, instance: InstanceId) -> None:
        self.frozen.add(instance)
        self._frozen_since[instance] = trio.current_time()

    def _thaw(self, instance: InstanceId) -> None:
        if instance in self.frozen:
            self.frozen.discard(instance)
            self.longest_frozen = max(self.longest_frozen, trio.current_time() - self._frozen_since[instance])

    def times(self, call: str, instance: str) -> list[float]:
        """When *call* was made on *instance*."""
        return [at for at, name, of in self.calls if (name, of) == (call, instance)]

    def names(self, instance: str) -> list[str]:
        """Names of the published snapshots of *instance*, oldest first."""
        held = self.machines[InstanceId(instance)].snapshots.values()
        return [s.name for s in sorted(held, key=lambda s: (s.created_at, s.id))]


def _snapshot(instance: InstanceId, request: CaptureRequest, size_bytes: int) -> Snapshot:
    return Snapshot(
        id=request.run_id,
        instance_id=instance,
        name=request.name,
        kind=request.kind,
        created_at=request.created_at,
        size_bytes=size_bytes,
        tags=request.tags,
    )


def seeded_snapshot(instance: str, number: int, created_at: datetime, tags: Mapping[str, str]) -> Snapshot:
    """A snapshot that was there before the test began."""
    return Snapshot(
        id=f"seed{number}",
        instance_id=InstanceId(instance),
        name=f"seed-{number}",
        kind=SnapshotKind.STANDBY,
        created_at=created_at,
        size_bytes=100,
        tags=tags,
    )


@define
class FakeLeases:
    """A guard that notes what it is told. *missing*: there is none.

    Attributes:
        held: Open leases, with the time by trio's clock at which their budgets end.
        told: Everything, in order.
    """

    missing: bool = False
    acknowledge_s: float = 0.0
    held: dict[str, float] = field(factory=dict)
    told: list[tuple[float, str, str]] = field(factory=list)

    async def check(self) -> None:
        await trio.lowlevel.checkpoint()
        if self.missing:
            raise NoGuardError("there is no guard")

    async def open(self, run_id: str, within_s: float) -> None:
        await self.check()
        await trio.sleep(self.acknowledge_s)
        self.held[run_id] = trio.current_time() + within_s
        self.told.append((trio.current_time(), "open", run_id))

    def close(self, run_id: str) -> None:
        if self.held.pop(run_id, None) is not None:
            self.told.append((trio.current_time(), "close", run_id))


@define
class FakeRoom:
    """A filesystem with so much room, and *others* by the paths on them. It hangs so many times before it answers."""

    free_bytes: int = 10**12
    others: dict[Path, Filesystem] = field(factory=dict)
    hangs: int = 0

    async def measure(self, path: Path) -> Filesystem:
        await trio.lowlevel.checkpoint()
        if self.hangs:
            self.hangs -= 1
            await trio.sleep_forever()
        return self.others.get(path) or Filesystem(1, self.free_bytes)
