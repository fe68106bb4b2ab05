"""The backend of a VMM's guests: each behind the API socket of its own process, or, without one, in its disks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import structlog
import trio
from attrs import Factory, field, frozen

from hypemand.backends.base import (
    BackendUnavailable,
    Capabilities,
    Captured,
    CaptureRequest,
    Preparation,
    Settled,
    Status,
    Surroundings,
)
from hypemand.backends.catalog import Catalog
from hypemand.backends.ids import checked
from hypemand.backends.vmm.capturing import Capturing
from hypemand.backends.vmm.client import SocketAbsent
from hypemand.backends.vmm.dialect import Dialect
from hypemand.backends.vmm.guests import Guests
from hypemand.backends.vmm.preparing import Preparing
from hypemand.backends.vmm.settings import VmmSettings, absolute, connection
from hypemand.backends.vmm.thawing import thaw
from hypemand.core.model import Freezer, InstanceId, InstanceState, RunStarted, Snapshot, SnapshotKind

_log = structlog.get_logger()


@frozen(eq=False)
class VmmBackend:
    """Guests of one kind of VMM. See `hypemand.backends.base.Backend` for every method's promise.

    A VMM keeps no mark of whose pause it is. Within one process it is known;
    after a crash, `settle` goes by its argument *ours*, and by which process
    the VMM is (`hypemand.backends.vmm.origin`).
    """

    name: str
    guests: Guests
    _found_frozen: set[str] = Factory(set)
    _capturing: Capturing = field(init=False, default=Factory(lambda self: Capturing(self.guests), takes_self=True))

    @property
    def capabilities(self) -> Capabilities:
        """The engine freezes. A VMM goes on saving, whatever we do."""
        stopped = {SnapshotKind.STOPPED} if self.guests.settings.disks else set()
        return Capabilities(Freezer.ENGINE, abortable=False, kinds=frozenset({SnapshotKind.STANDBY, *stopped}))

    @property
    def connection(self) -> Mapping[str, Any]:
        """All settings in absolute values."""
        return connection(self.guests.dialect.type_name, self.guests.settings)

    async def open(self, *, first_use: bool) -> None:
        """Open the catalog."""
        await self.guests.threads.do(self.guests.catalog.open, first_use=first_use)

    async def instances(self) -> frozenset[InstanceId]:
        """Ids of the sockets and disks that fit the templates."""
        settings = self.guests.settings
        found = await self.guests.threads.ask(settings.find_instances)
        if not found:
            templates = ", ".join(map(str, (settings.socket, *settings.disks)))
            raise BackendUnavailable(f"nothing fits {templates}: no guest runs, or a directory is missing")
        return found

    async def state(self, instance: InstanceId) -> Status:
        """What the VMM says; Stopped without one."""
        try:
            look = await self.guests.dialect.look(self.guests.client(instance))
        except SocketAbsent as absent:
            await self.guests.files_of_stopped(instance, absent)
            return Status(InstanceState.STOPPED)
        return Status(look.state, look.detail)

    async def prepare(self, instance: InstanceId, kind: SnapshotKind) -> Preparation:
        """Look at the guest, its disks and the catalog."""
        return await Preparing(self.guests).prepare(checked(instance), kind)

    async def make_ready(self, instance: InstanceId, request: CaptureRequest) -> None:
        """Have directories for the copies, and one that the VMM may write into."""
        await self._capturing.make_ready(instance, request)

    async def pause(self, instance: InstanceId, request: CaptureRequest) -> None:
        """Have the VMM pause its guest."""
        await self._capturing.pause(instance, request)

    async def resume(self, instance: InstanceId) -> None:
        """Have it resume the guest."""
        await self._capturing.resume(instance)

    async def capture(self, instance: InstanceId, request: CaptureRequest) -> Captured:
        """Have it save memory and devices, and copy the disks."""
        return await self._capturing.capture(instance, request)

    async def complete(self, captured: Captured) -> Captured:
        """Take over what it has written."""
        return await self._capturing.complete(captured)

    async def publish(self, snapshot: Snapshot) -> None:
        """List it in the catalog."""
        await self.guests.threads.do(self.guests.catalog.publish, checked(snapshot.instance_id), snapshot.id)

    async def list_snapshots(self, instance: InstanceId) -> tuple[Snapshot, ...]:
        """What the catalog holds, whether the guest runs or not."""
        manifests = await self.guests.threads.ask(self.guests.catalog.manifests, checked(instance))
        return tuple(manifest.snapshot() for manifest in manifests)

    async def delete_snapshot(self, snapshot: Snapshot) -> None:
        """Delete it from the catalog."""
        await self.guests.threads.do(self.guests.catalog.delete, checked(snapshot.instance_id), snapshot.id)

    async def settle(self, run: RunStarted, *, ours: bool) -> Settled:
        """Thaw first; then look at the catalog. A partial snapshot is never complete here."""
        # The guest comes first: it has to run again even where the catalog is not there.
        notes: tuple[str, ...] = ()
        if run.freezes is Freezer.ENGINE:
            thawed = await thaw(self.guests, self._capturing, run, ours=ours)
            notes = thawed.notes
            if thawed.resumed:
                _log.warning("the guest was found frozen and was resumed", instance_id=run.instance_id)
                self._found_frozen.add(run.run_id)  # this settling may fail, and the next one has to know
        snapshot = await self.guests.threads.do(self._settle_snapshot, run)
        self._capturing.forget(run.instance_id)
        resumed = run.run_id in self._found_frozen
        self._found_frozen.discard(run.run_id)
        return Settled(snapshot, resumed=resumed, notes=notes)

    def _settle_snapshot(self, run: RunStarted) -> Snapshot | None:
        # In this order: what can't be discarded any more has been published.
        self.guests.catalog.discard(run.instance_id, run.run_id)
        self.guests.drop_saving(run.instance_id, run.run_id)
        manifest = self.guests.catalog.find(run.instance_id, run.run_id)
        return manifest.snapshot() if manifest is not None else None

    async def aclose(self) -> None:
        """Let go of what is held; no connection stays open."""
        self.guests.close()
        await trio.lowlevel.checkpoint()


def build(
    name: str, dialect: Dialect, settings: VmmSettings, surroundings: Surroundings, *, chroot: Path | None = None
) -> VmmBackend:
    """A backend of *dialect*. Does no I/O."""
    settings = absolute(settings, surroundings.state_dir / "catalog" / name)
    assert settings.snapshot_dir is not None
    catalog = Catalog(settings.snapshot_dir, settings.mode, settings.snapshot_group)
    return VmmBackend(name, Guests(dialect, settings, catalog, chroot))
