"""The qemu backend: each guest behind its monitor socket, or, while that is silent for good, in its disks.

In mode internal QEMU itself stops the guest, saves memory, devices and disks
at one instant, and resumes it, whatever becomes of hypemand meanwhile. The
disks keep the data; a catalog keeps what they have no place for.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import structlog
import trio
from attrs import Factory, evolve, field, frozen

from hypemand.backends.base import (
    BackendUnavailable,
    Capabilities,
    Captured,
    CaptureRequest,
    Preparation,
    Settled,
    Status,
    Surroundings,
    Unsupported,
)
from hypemand.backends.catalog import Catalog, Manifest
from hypemand.backends.qemu import images, settling
from hypemand.backends.qemu.capturing import Capturing
from hypemand.backends.qemu.deleting import Deleting
from hypemand.backends.qemu.disks import Disk, read_disks
from hypemand.backends.qemu.manifest import MEMORY, files_of, is_listed
from hypemand.backends.qemu.monitors import Monitors
from hypemand.backends.qemu.preparing import prepare_running, prepare_stopped
from hypemand.backends.qemu.settings import BACKGROUND, QemuSettings
from hypemand.backends.qemu.threads import in_thread
from hypemand.backends.qmp import MonitorAbsent
from hypemand.backends.registry import connection_of
from hypemand.core.model import Freezer, InstanceId, InstanceState, RunStarted, Snapshot, SnapshotKind

SETTLE_PATIENCE_S = 30.0
_CLOCK_SLACK = timedelta(seconds=5)
_STATES = {
    "running": InstanceState.RUNNING,
    "paused": InstanceState.PAUSED,
    "prelaunch": InstanceState.CREATED,
    "inmigrate": InstanceState.INITIALIZING,
    "shutdown": InstanceState.SHUTDOWN,
}
_BUSY = frozenset({"save-vm", "finish-migrate", "restore-vm"})
_log = structlog.get_logger()


@frozen(eq=False)
class QemuBackend:
    """QEMU guests. See `hypemand.backends.base.Backend` for every method's promise.

    A guest is Stopped when nobody listens at its monitor and its disks are
    where the settings say. QEMU's own lock on the disks makes that safe.
    """

    name: str
    settings: QemuSettings
    catalog: Catalog
    monitors: Monitors
    _found_frozen: set[str] = Factory(set)
    _capturing: Capturing = field(
        init=False, default=Factory(lambda self: Capturing(self.catalog, self.monitors), takes_self=True)
    )
    _deleting: Deleting = field(
        init=False,
        default=Factory(lambda self: Deleting(self.catalog, self.monitors, self._stopped_disks), takes_self=True),
    )

    @property
    def capabilities(self) -> Capabilities:
        """In mode internal QEMU freezes and thaws by itself, and a save can't be interrupted."""
        in_background = self.settings.mode == BACKGROUND
        stopped = {SnapshotKind.STOPPED} if self.settings.disks else set()
        return Capabilities(
            freezes=Freezer.ENGINE if in_background else Freezer.HYPERVISOR,
            abortable=in_background,
            kinds=frozenset({SnapshotKind.STANDBY, *stopped}),
        )

    @property
    def connection(self) -> Mapping[str, Any]:
        """All settings in absolute values."""
        disks = [str(template) for template in self.settings.disks]
        return {**connection_of("qemu", self.settings), "disks": disks, "mode": self.settings.mode}

    async def open(self, *, first_use: bool) -> None:
        """Open the catalog."""
        await in_thread(partial(self.catalog.open, first_use=first_use))

    async def instances(self) -> frozenset[InstanceId]:
        """Ids of the sockets and disks that fit the templates."""
        found = await in_thread(self.settings.find_instances)
        if not found:
            templates = ", ".join(map(str, (self.settings.socket, *self.settings.disks)))
            raise BackendUnavailable(f"nothing fits {templates}: no guest runs, or a directory is missing")
        return found

    async def state(self, instance: InstanceId) -> Status:
        """The run state of the guest's QEMU; Stopped without one."""
        try:
            async with self.monitors.use(instance) as monitor:
                word = str((await monitor.execute("query-status"))["status"])
        except MonitorAbsent as absent:
            await self._files_of_stopped(instance, absent)
            return Status(InstanceState.STOPPED)
        if word in _BUSY:
            raise BackendUnavailable(f"QEMU is busy: {word}")
        return Status(_STATES[word]) if word in _STATES else Status(InstanceState.UNKNOWN, word)

    async def _files_of_stopped(self, instance: InstanceId, absent: MonitorAbsent) -> list[Path]:
        """The disks of a guest at whose monitor nobody listens. Without any, nothing is known of it."""
        files = await in_thread(self.settings.disks_of, instance)
        if files:
            return files
        if not self.settings.disks:
            raise absent
        patterns = ", ".join(str(path) for path in self.settings.disks)
        raise BackendUnavailable(f"{absent}; and no disk fits {patterns}: is a filesystem not mounted?") from absent

    async def prepare(self, instance: InstanceId, kind: SnapshotKind) -> Preparation:
        """Check the disks, and whether somebody else is at work in this QEMU."""
        await in_thread(self.catalog.check)
        files = await in_thread(self.settings.disks_of, instance)
        if kind is SnapshotKind.STOPPED:
            if not self.settings.disks:
                raise Unsupported(
                    "to have a stopped guest captured, say where its disks are: the backend's setting disks"
                )
            return await prepare_stopped(files)
        async with self.monitors.use(instance) as monitor:
            return await prepare_running(monitor, self.settings.mode, self.catalog.root, files)

    async def make_ready(self, instance: InstanceId, request: CaptureRequest) -> None:
        """Have draft and memory file there, and QEMU set up for a save in the background."""
        await self._capturing.make_ready(instance, request)

    async def pause(self, instance: InstanceId, request: CaptureRequest) -> None:
        """Stop the guest's vCPUs, with a mark inside QEMU that says whose stop it is."""
        await self._capturing.pause(instance, request)

    async def resume(self, instance: InstanceId) -> None:
        """Let the guest's vCPUs go on."""
        await self._capturing.resume(instance)

    async def capture(self, instance: InstanceId, request: CaptureRequest) -> Captured:
        """Save into the disks; in the background, begin to save the memory."""
        files: Sequence[Path] = ()
        if request.kind is SnapshotKind.STOPPED:
            files = await in_thread(self.settings.disks_of, instance)
        return await self._capturing.capture(instance, request, files)

    async def complete(self, captured: Captured) -> Captured:
        """Wait for the memory, and look at the guest."""
        return await self._capturing.complete(captured)

    async def publish(self, snapshot: Snapshot) -> None:
        """List it in the catalog."""
        await in_thread(self.catalog.publish, snapshot.instance_id, snapshot.id)

    async def list_snapshots(self, instance: InstanceId) -> tuple[Snapshot, ...]:
        """What is in the catalog and still on the disks, whether the guest runs or not."""
        manifests = await in_thread(self.catalog.manifests, instance)
        disks: Sequence[Disk]
        try:
            async with self.monitors.use(instance) as monitor:
                disks = await read_disks(monitor)
        except MonitorAbsent as absent:
            disks = await self._stopped_disks(instance, absent, manifests)
        for manifest in manifests:
            if (
                manifest.files
                and not is_listed(disks, manifest)
                and not await in_thread(self._deleting.is_marked, manifest)
            ):
                _log.warning(
                    "a snapshot is gone from its disk; its memory is left in the catalog, delete it by hand",
                    instance_id=instance,
                    snapshot_name=manifest.name,
                    path=str(self.catalog.home(instance, manifest.id)),
                )
        return tuple(manifest.snapshot() for manifest in manifests if is_listed(disks, manifest))

    async def _stopped_disks(
        self, instance: InstanceId, absent: MonitorAbsent, manifests: Sequence[Manifest]
    ) -> Sequence[Disk]:
        """The disks that fit the settings, and those beside them that manifests name."""
        files = await self._files_of_stopped(instance, absent)
        named = dict.fromkeys(file for manifest in manifests for file in files_of(manifest))
        others = [path for path in await in_thread(images.present, named) if path not in files]
        return await images.read_images([*files, *others])

    async def delete_snapshot(self, snapshot: Snapshot) -> None:
        """Delete it from the disks that have it, then from the catalog. Another one by its name is left alone."""
        await in_thread(self.catalog.check)
        manifest = await in_thread(self.catalog.find, snapshot.instance_id, snapshot.id)
        if manifest is None:
            return
        await self._deleting.finish(snapshot.instance_id)
        await self._deleting.delete(manifest)

    async def settle(self, run: RunStarted, *, ours: bool) -> Settled:  # noqa: ARG002 - a mark in QEMU tells whose pause it is
        """Thaw the guest if the run's mark is there; adopt its snapshot whole, or remove it."""
        # The guest comes first: it has to run again even where the catalog is not there.
        if run.freezes is Freezer.ENGINE and await self._thaw(run):
            _log.warning("the guest was found frozen and was resumed", instance_id=run.instance_id)
            self._found_frozen.add(run.run_id)  # this settling may fail, and the next one has to know
        found = await self._settle_snapshot(run)
        await self._deleting.finish(run.instance_id)
        return await self._settled(run, found, resumed=run.run_id in self._found_frozen)

    async def _thaw(self, run: RunStarted) -> bool:
        try:
            async with self.monitors.use(run.instance_id, patience_s=SETTLE_PATIENCE_S) as monitor:
                return await settling.thaw(monitor, run.run_id)
        except MonitorAbsent:
            return False  # whether its QEMU has ended is seen by its disks

    async def _settle_snapshot(self, run: RunStarted) -> settling.Found:
        await in_thread(self.catalog.check)
        published = await in_thread(self.catalog.find, run.instance_id, run.run_id)
        draft = await in_thread(self.catalog.draft, run.instance_id, run.run_id)
        if draft is None and run.freezes is not Freezer.ENGINE:
            return settling.Found(published)
        if run.run_id in self._capturing.nothing_made and run.kind is SnapshotKind.STOPPED:
            return settling.Found()
        memory = self.catalog.partial(run.instance_id, run.run_id) / MEMORY
        try:
            async with self.monitors.use(run.instance_id, patience_s=SETTLE_PATIENCE_S) as monitor:
                if draft is not None and run.run_id in self._capturing.nothing_made:
                    await settling.tidy(monitor, draft)
                    return settling.Found()
                if draft is not None:
                    since = run.started_at - _CLOCK_SLACK
                    return await settling.settle_draft(monitor, draft, memory, not_before=since)
                if published is not None:
                    await settling.tidy(monitor, published)
        except MonitorAbsent as absent:
            return await self._settle_stopped(run, draft, published, absent)
        return settling.Found(published)

    async def _settle_stopped(
        self, run: RunStarted, draft: Manifest | None, published: Manifest | None, absent: MonitorAbsent
    ) -> settling.Found:
        """QEMU has ended, which its lock on the disks proves: by them it is seen what became of the capture."""
        manifest = draft or published
        if manifest is None:
            return settling.Found()
        files = await in_thread(images.present, files_of(manifest))
        files = files or await in_thread(self.settings.disks_of, run.instance_id)
        if not files:
            raise absent
        disks = await images.read_images(files, unlocked=True)
        if draft is None:
            return settling.Found(published)
        memory = self.catalog.partial(run.instance_id, run.run_id) / MEMORY
        return await settling.settle_stopped(disks, draft, memory, not_before=run.started_at - _CLOCK_SLACK)

    async def _settled(self, run: RunStarted, found: settling.Found, *, resumed: bool) -> Settled:
        self._found_frozen.discard(run.run_id)
        self._capturing.forget(run.instance_id)
        self._capturing.nothing_made.discard(run.run_id)
        if found.whole is None:
            await in_thread(self.catalog.discard, run.instance_id, run.run_id)
            return Settled(resumed=resumed, notes=found.notes)
        if await in_thread(self.catalog.draft, run.instance_id, run.run_id) is not None:
            await in_thread(self.catalog.write_manifest, found.whole)
            await in_thread(self.catalog.publish, run.instance_id, run.run_id)
        else:  # it may have been killed while it pruned: what that left goes as well
            await in_thread(self.catalog.discard, run.instance_id, run.run_id)
        return Settled(found.whole.snapshot(), resumed=resumed)

    async def aclose(self) -> None:
        """Let go of what is held."""
        self.monitors.close()
        await trio.lowlevel.checkpoint()


def _build(name: str, settings: QemuSettings, surroundings: Surroundings) -> QemuBackend:
    catalog = (settings.snapshot_dir or surroundings.state_dir / "catalog" / name).absolute()
    settings = evolve(
        settings,
        socket=settings.socket.absolute(),
        disks=tuple(template.absolute() for template in settings.disks),
        snapshot_dir=catalog,
    )
    return QemuBackend(name, settings, Catalog(catalog), Monitors(settings.socket_of))


@frozen
class _Type:
    settings: type[QemuSettings] = QemuSettings
    build: Callable[[str, QemuSettings, Surroundings], QemuBackend] = _build


TYPE = _Type()
