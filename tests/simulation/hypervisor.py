"""The model of a hypervisor: machines, captures that go on by themselves, snapshots. It outlives hypemand's processes.

What a process asks of it, and how the answers go wrong, is in `client`.
"""

from collections.abc import Callable
from typing import Protocol

import trio
from attrs import define, evolve, field

from hypemand.backends.base import (
    BackendUnavailable,
    CaptureFailed,
    CaptureRequest,
    InstanceNotFound,
    InvalidState,
    Settled,
)
from hypemand.core.model import Freezer, InstanceId, InstanceState, RunStarted, Snapshot

OPERATOR = "operator"


@define
class Machine:
    """A guest. *paused_by*: the id of a run, or `OPERATOR`."""

    state: InstanceState = InstanceState.RUNNING
    paused_by: str | None = None
    before: InstanceState = InstanceState.RUNNING  # what a stale answer says


@define(eq=False)
class Capture:
    """A capture, from its beginning until it is published or cleared away.

    Attributes:
        ends_at: When the hypervisor is done with it; None: it was stopped half-way, only a part is there.
        torn_by: Who let the guest run during it.
        saved: All that `complete` does is done.
        has_client: The process that asked for it still waits for it, or does the work itself.
    """

    request: CaptureRequest
    instance: InstanceId
    ends_at: float | None
    torn_by: str | None = None
    saved: bool = True
    has_client: bool = True
    broke_off_at: float = 0.0

    @property
    def goes_on(self) -> bool:
        return self.ends_at is not None and self.ends_at > trio.current_time()

    @property
    def whole(self) -> bool:
        return self.ends_at is not None and not self.goes_on and self.saved


class Witness(Protocol):
    """Who is told of what happens to guests and snapshots; see `oracle.Oracle`."""

    def paused(self, hypervisor: "Hypervisor", instance: InstanceId, run_id: str) -> None: ...

    def resumed(self, hypervisor: "Hypervisor", instance: InstanceId, paused_by: str | None) -> None: ...

    def published(self, hypervisor: "Hypervisor", snapshot: Snapshot, torn_by: str | None) -> None: ...

    def deleted(self, hypervisor: "Hypervisor", snapshot: Snapshot, listed: list[Snapshot]) -> None: ...


@define(eq=False, kw_only=True)
class Hypervisor:
    """One hypervisor.

    Attributes:
        marks: It knows its own pauses from an operator's.
        goes_on: A capture whose client died goes on by itself; else the client did the work, and a part stays.
        adopts: A complete capture that was not published is kept by `settle`.
        complete_s: What a capture needs after the thaw.
        available: Answers at all.
        refuses_resume: Instances that can't be resumed for a while.
        pending: Requests whose clients are gone, and which take hold late, in their order.
    """

    name: str
    witness: Witness
    freezes: Freezer = Freezer.ENGINE
    abortable: bool = True
    marks: bool = True
    goes_on: bool = False
    adopts: bool = True
    complete_s: float | None = None
    available: bool = True
    version: int = 1
    machines: dict[InstanceId, Machine] = field(factory=dict)
    away: dict[InstanceId, Machine] = field(factory=dict)
    snapshots: dict[InstanceId, dict[str, Snapshot]] = field(factory=dict)
    captures: dict[str, Capture] = field(factory=dict)
    refuses_resume: set[InstanceId] = field(factory=set)
    pending: dict[InstanceId, list[Callable[[], None]]] = field(factory=dict)

    def machine(self, instance: InstanceId) -> Machine:
        if instance not in self.machines:
            raise InstanceNotFound(f"no instance {instance}")
        return self.machines[instance]

    def take_hold(self, instance: InstanceId) -> None:
        """Do what was asked for earlier: requests keep their order."""
        for effect in self.pending.pop(instance, []):
            effect()

    def set_state(self, instance: InstanceId, state: InstanceState, paused_by: str | None = None) -> None:
        machine = self.machines[instance]
        machine.before = machine.state
        machine.state, machine.paused_by = state, paused_by

    def let_run(self, instance: InstanceId, by: str) -> None:
        """The guest runs again: a capture of its frozen state that is not over is torn."""
        machine = self.machines[instance]
        paused_by = machine.paused_by
        self.set_state(instance, InstanceState.RUNNING)
        for capture in self.captures.values():
            if capture.instance == instance and capture.goes_on and capture.request.freezes is Freezer.ENGINE:
                capture.torn_by = by
        if by != OPERATOR:
            self.witness.resumed(self, instance, paused_by)

    # What clients ask for

    def pause(self, instance: InstanceId, run_id: str) -> None:
        machine = self.machine(instance)
        if machine.state not in (InstanceState.RUNNING, InstanceState.PAUSED):
            raise InvalidState(f"instance is {machine.state}")
        if machine.state is InstanceState.PAUSED:
            if self.marks and machine.paused_by == OPERATOR:
                raise InvalidState("instance is paused by somebody else")
            return
        self.set_state(instance, InstanceState.PAUSED, run_id)
        self.witness.paused(self, instance, run_id)

    def resume(self, instance: InstanceId) -> None:
        machine = self.machine(instance)
        if machine.state not in (InstanceState.PAUSED, InstanceState.RUNNING):
            raise InvalidState(f"instance is {machine.state}")
        if machine.state is InstanceState.RUNNING or (self.marks and machine.paused_by == OPERATOR):
            return
        self.let_run(instance, "hypemand")

    def busy_with(self, instance: InstanceId) -> Capture | None:
        """A capture of *instance* that goes on and can't be interrupted."""
        if self.abortable:
            return None
        return next((c for c in self.captures.values() if c.instance == instance and c.goes_on), None)

    def publish(self, snapshot: Snapshot) -> None:
        capture = self.captures.pop(snapshot.id, None)
        held = self.snapshots.setdefault(snapshot.instance_id, {})
        if capture is None:
            if snapshot.id in held:
                return
            raise CaptureFailed("there is nothing to publish")
        if not capture.whole:
            raise AssertionError("published before it was whole")
        held[snapshot.id] = snapshot
        self.witness.published(self, snapshot, capture.torn_by)

    def listed(self, instance: InstanceId) -> list[Snapshot]:
        return sorted(self.snapshots.get(instance, {}).values(), key=lambda s: (s.created_at, s.id))

    def delete(self, snapshot: Snapshot) -> None:
        held = self.snapshots.get(snapshot.instance_id, {})
        if snapshot.id in held:
            self.witness.deleted(self, snapshot, self.listed(snapshot.instance_id))
            del held[snapshot.id]

    def settle(self, run: RunStarted, *, ours: bool) -> Settled:
        capture = self.captures.get(run.run_id)
        if capture is not None and capture.goes_on and not capture.has_client:
            if not self.abortable:
                raise BackendUnavailable("the hypervisor is still saving")
            capture.ends_at = None
        resumed = False
        machine = self.machines.get(run.instance_id)
        if machine is not None and machine.state is InstanceState.PAUSED:
            resumed = machine.paused_by not in (OPERATOR, None) if self.marks else ours
        if resumed and run.instance_id in self.refuses_resume:
            raise BackendUnavailable("resume refused")
        if resumed:
            self.let_run(run.instance_id, "hypemand")
        if capture is None or not (capture.has_client and capture.goes_on):
            self.captures.pop(run.run_id, None)
        if capture is not None and capture.whole and self.adopts and not capture.torn_by:
            self.captures[run.run_id] = capture
            self.publish(snapshot_of(capture))
        return Settled(self.snapshots.get(run.instance_id, {}).get(run.run_id), resumed)

    # What happens by itself, and at an operator's hand

    def restart(self) -> None:
        """The host went down and came up: guests boot anew, captures are parts, requests are forgotten."""
        self.pending.clear()
        self.refuses_resume.clear()
        for capture in self.captures.values():
            if capture.goes_on:
                capture.ends_at = None
        for instance, machine in self.machines.items():
            if machine.state is InstanceState.PAUSED:
                paused_by = machine.paused_by
                self.set_state(instance, InstanceState.RUNNING)
                if paused_by != OPERATOR:
                    self.witness.resumed(self, instance, paused_by)

    def vanish(self, instance: InstanceId) -> bool:
        """Undefine *instance*; its snapshots stay. Not while somebody works with it."""
        if any(c.instance == instance for c in self.captures.values()) or self.machines[instance].paused_by:
            return False
        self.away[instance] = self.machines.pop(instance)
        return True

    def come_back(self, instance: InstanceId) -> None:
        self.machines[instance] = evolve(self.away.pop(instance), state=InstanceState.RUNNING, paused_by=None)


def snapshot_of(capture: Capture) -> Snapshot:
    request = capture.request
    return Snapshot(
        id=request.run_id,
        instance_id=capture.instance,
        name=request.name,
        kind=request.kind,
        created_at=request.created_at,
        size_bytes=1000,
        tags=request.tags,
    )
