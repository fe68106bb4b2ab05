"""The libvirt backend: guests by their names, in libvirt's own words; libvirt freezes them, and keeps their snapshots.

Nothing is kept on our side: what hypemand has to know of a snapshot stands in
its description, where also an operator reads it.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import libvirt
import structlog
import trio
from attrs import Factory, field, frozen

from hypemand.backends.base import (
    BackendUnavailable,
    Capabilities,
    Captured,
    CaptureRequest,
    InstanceNotFound,
    InvalidState,
    Preparation,
    Settled,
    Status,
    Surroundings,
)
from hypemand.backends.libvirt import snapshots
from hypemand.backends.libvirt.capturing import Capturing, StillAtWork, thaw
from hypemand.backends.libvirt.connections import Connections, Turn
from hypemand.backends.libvirt.documents import Stage, snapshot_of
from hypemand.backends.libvirt.domains import find_domain, mark, marked_run, pause_of, status_of, word_for
from hypemand.backends.libvirt.preparing import prepare
from hypemand.backends.libvirt.settings import LibvirtSettings
from hypemand.backends.libvirt.settling import PATIENCE_S, Settling
from hypemand.backends.registry import connection_of
from hypemand.core.errors import RuleBroken
from hypemand.core.model import Freezer, InstanceId, InstanceState, RunStarted, Snapshot, SnapshotKind
from hypemand.core.naming import check_instance_id

T = TypeVar("T")
_LOOK_S = 0.1
_log = structlog.get_logger()


@frozen(eq=False)
class LibvirtBackend:
    """Guests of one libvirt. See `hypemand.backends.base.Backend` for every method's promise."""

    name: str
    settings: LibvirtSettings
    _connections: Connections = field(
        init=False, default=Factory(lambda self: Connections(self.settings), takes_self=True)
    )
    _capturing: Capturing = field(
        init=False, default=Factory(lambda self: Capturing(self._connections, self.settings.uri), takes_self=True)
    )
    _told: set[str] = field(init=False, factory=set)
    _found_frozen: set[str] = field(init=False, factory=set)

    @property
    def capabilities(self) -> Capabilities:
        """Freezing is libvirt's: it stops and resumes the guest by itself, and a save can't be interrupted."""
        return Capabilities(
            freezes=Freezer.HYPERVISOR,
            abortable=False,
            kinds=frozenset({SnapshotKind.STANDBY, SnapshotKind.STOPPED}),
        )

    @property
    def connection(self) -> Mapping[str, Any]:
        """The URI."""
        return {**connection_of("libvirt", self.settings), "uri": self.settings.uri}

    async def open(self, *, first_use: bool) -> None:
        """There is nothing to make; libvirt is reached when it is asked something."""
        del first_use
        await trio.lowlevel.checkpoint()

    async def instances(self) -> frozenset[InstanceId]:
        """The names of all domains; those that no instance can have are told once."""
        names = await self._connections.ask(lambda c: [domain.name() for domain in c.listAllDomains()])
        found = set()
        for name in names:
            try:
                found.add(check_instance_id(name))
            except RuleBroken as error:
                if name not in self._told:
                    self._told.add(name)
                    _log.warning("a domain is left out: no instance can have its name", domain=name, error=str(error))
        return frozenset(found)

    async def state(self, instance: InstanceId) -> Status:
        """What libvirt says; it knows without asking QEMU."""
        return await self._connections.ask(lambda c: status_of(find_domain(c, instance)))

    async def prepare(self, instance: InstanceId, kind: SnapshotKind) -> Preparation:
        """Check disks and firmware, and whether somebody else is at work on this guest."""
        here = self.settings.is_here
        return await self._connections.ask(lambda c: prepare(c, instance, kind, here=here), about=instance)

    async def make_ready(self, instance: InstanceId, request: CaptureRequest) -> None:
        """There is nothing to make ready."""
        del instance, request
        await trio.lowlevel.checkpoint()

    async def pause(self, instance: InstanceId, request: CaptureRequest) -> None:
        """Suspend the guest, with a mark in its metadata that says whose pause it is. A capture does without."""
        await self._connections.change(instance, partial(_pause, instance=instance, run_id=request.run_id))

    async def resume(self, instance: InstanceId) -> None:
        """Let the guest go on."""
        await self._connections.change(instance, partial(_resume, instance=instance))

    async def capture(self, instance: InstanceId, request: CaptureRequest) -> Captured:
        """Have libvirt make an internal snapshot."""
        return await self._capturing.capture(instance, request)

    async def complete(self, captured: Captured) -> Captured:
        """Look whether the guest goes on."""
        return await self._capturing.complete(captured)

    async def publish(self, snapshot: Snapshot) -> None:
        """Write into its description that it is listed."""
        await self._connections.change(snapshot.instance_id, partial(_publish, snapshot=snapshot))

    async def list_snapshots(self, instance: InstanceId) -> tuple[Snapshot, ...]:
        """What libvirt has with a note of ours. A domain that is not defined any more has none."""
        try:
            return await self._connections.ask(lambda c: _listed(c, instance, self.settings.uri))
        except InstanceNotFound:
            return ()

    async def delete_snapshot(self, snapshot: Snapshot) -> None:
        """Delete it; the guest stands still meanwhile. With its domain, it is gone."""
        try:
            await self._connections.change(snapshot.instance_id, partial(_delete, snapshot=snapshot))
        except InstanceNotFound:
            return

    async def settle(self, run: RunStarted, *, ours: bool) -> Settled:
        """Thaw the guest if libvirt left it paused in the middle of a snapshot; adopt the run's, or remove it."""
        del ours
        settling = Settling(run, self.settings.uri, nothing_made=run.run_id in self._capturing.nothing_made)
        try:
            # The guest comes first. Its mark, or libvirt's reason for the pause, tells whose that is.
            if await self._patiently(run.instance_id, settling.thaw):
                self._found_frozen.add(run.run_id)  # this settling may fail, and the next one has to know
            snapshot = await self._patiently(run.instance_id, settling.settle_snapshot)
        except InstanceNotFound as error:
            return Settled(notes=(str(error),))
        resumed = run.run_id in self._found_frozen
        self._found_frozen.discard(run.run_id)
        self._capturing.nothing_made.discard(run.run_id)
        return Settled(snapshot, resumed=resumed)

    async def _patiently(self, instance: InstanceId, work: Callable[[Turn], T]) -> T:
        """What *work* returns once libvirt is at nothing else with this guest."""
        until = trio.current_time() + PATIENCE_S
        while True:
            try:
                return await self._connections.change(instance, work)
            except StillAtWork:
                if trio.current_time() > until:
                    raise
            await trio.sleep(_LOOK_S)

    async def aclose(self) -> None:
        """Close connections."""
        await self._connections.aclose()


# In a worker thread:


def _pause(turn: Turn, instance: InstanceId, run_id: str) -> None:
    domain = find_domain(turn.connection, instance)
    status = status_of(domain)
    if status.state is InstanceState.PAUSED and marked_run(domain) == run_id:
        return
    if status.state is not InstanceState.RUNNING:
        word = f" ({status.detail})" if status.detail else ""
        raise InvalidState(f"the guest is {status.state}{word}, and not by this run")
    mark(domain, run_id)
    turn.check_wanted()
    domain.suspend()


def _resume(turn: Turn, instance: InstanceId) -> None:
    domain = find_domain(turn.connection, instance)
    if thaw(turn, instance):
        return
    status = status_of(domain)
    if status.state not in (InstanceState.RUNNING, InstanceState.PAUSED):
        raise InvalidState(f"the guest is {status.state}: only a paused one can be resumed")
    ours = marked_run(domain) is not None
    if status.state is InstanceState.PAUSED and not ours:
        _log.warning("the guest was paused by somebody else; it is left so", instance_id=instance)
    elif pause_of(domain) is not None:
        domain.resume()
    if ours:
        mark(domain, None)


def _listed(connection: libvirt.virConnect, instance: InstanceId, uri: str) -> tuple[Snapshot, ...]:
    domain = find_domain(connection, instance)
    found = [one for one in snapshots.find_all(domain) if one.note.stage is Stage.LISTED]
    listed = [snapshot_of(instance, one.name, one.note, uri=uri, word=word_for(domain)) for one in found]
    return tuple(sorted(listed, key=lambda snapshot: (snapshot.created_at, snapshot.id)))


def _publish(turn: Turn, snapshot: Snapshot) -> None:
    domain = find_domain(turn.connection, snapshot.instance_id)
    found = snapshots.find(domain, snapshot.name, snapshot.id)
    if found is None:
        raise BackendUnavailable(f"libvirt has no snapshot {snapshot.name} of this run any more: somebody deleted it")
    snapshots.publish(domain, found)


def _delete(turn: Turn, snapshot: Snapshot) -> None:
    snapshots.delete(find_domain(turn.connection, snapshot.instance_id), snapshot.name, snapshot.id)


def _build(name: str, settings: LibvirtSettings, surroundings: Surroundings) -> LibvirtBackend:
    del surroundings
    return LibvirtBackend(name, settings)


@frozen
class _Type:
    settings: type[LibvirtSettings] = LibvirtSettings
    build: Callable[[str, LibvirtSettings, Surroundings], LibvirtBackend] = _build


TYPE = _Type()
