"""QEMU guests, each behind its monitor socket, captured by internal snapshots in their own qcow2 disks.

QEMU itself stops the guest, saves memory, devices and disks at one instant,
and resumes it, whatever becomes of hypemand meanwhile. The disks keep the
data; a catalog keeps what they have no place for.
"""

import glob
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import structlog
import trio
from attrs import Factory, evolve, frozen

from hypemand.backends import qmp
from hypemand.backends.base import (
    BackendError,
    BackendUnavailable,
    Capabilities,
    Captured,
    CaptureFailed,
    CaptureRequest,
    InvalidState,
    Preparation,
    Settled,
    Status,
    Surroundings,
    Unsupported,
)
from hypemand.backends.catalog import Catalog, Manifest, sync_tree
from hypemand.backends.qemu_disks import check_capturable, delete, dismiss, memory_entry, read_disks, save, shares
from hypemand.backends.qemu_manifest import clear, completed, known_entry, new_draft, save_job, settle_save
from hypemand.backends.registry import connection_of
from hypemand.core.errors import RuleBroken, RulesBroken
from hypemand.core.model import Freezer, InstanceId, InstanceState, RunStarted, Snapshot, SnapshotKind
from hypemand.core.naming import check_instance_id

PLACEHOLDER = "{instance}"
SETTLE_PATIENCE_S = 30.0
_CLOCK_SLACK = timedelta(seconds=5)
_MARGIN = 64 * 1024 * 1024
_STATES = {
    "running": InstanceState.RUNNING,
    "paused": InstanceState.PAUSED,
    "prelaunch": InstanceState.CREATED,
    "inmigrate": InstanceState.INITIALIZING,
    "shutdown": InstanceState.SHUTDOWN,
}
_BUSY = frozenset({"save-vm", "finish-migrate", "restore-vm"})
_log = structlog.get_logger()
T = TypeVar("T")


@frozen(kw_only=True)
class QemuSettings:
    """Keys of a backend of this type.

    Attributes:
        socket: Every guest's monitor, with ``{instance}`` where its id stands.
        snapshot_dir: The catalog; the default is below the state directory.
        mode: ``internal`` is the only one in this version.
    """

    socket: Path
    snapshot_dir: Path | None = None
    mode: str = "internal"

    def __attrs_post_init__(self) -> None:
        """Check what a type alone does not say."""
        broken = []
        if PLACEHOLDER not in str(self.socket):
            broken.append(RuleBroken(f"{str(self.socket)!r} must have {PLACEHOLDER} where an id stands", "socket"))
        if self.mode != "internal":
            broken.append(RuleBroken(f"{self.mode!r} is not known to this version; 'internal' is", "mode"))
        if broken:
            raise RulesBroken(broken)


@frozen(eq=False)
class QemuBackend:
    """QEMU guests by internal snapshots. See `hypemand.backends.base.Backend` for every method's promise.

    Attributes:
        patience_s: How long to wait for a monitor before it counts as busy.
    """

    name: str
    settings: QemuSettings
    catalog: Catalog
    patience_s: float = qmp.GREETING_PATIENCE_S
    _locks: dict[InstanceId, trio.Lock] = Factory(dict)

    @property
    def capabilities(self) -> Capabilities:
        """QEMU freezes and thaws by itself, and a save can't be interrupted."""
        return Capabilities(Freezer.HYPERVISOR, abortable=False, kinds=frozenset({SnapshotKind.STANDBY}))

    @property
    def connection(self) -> Mapping[str, Any]:
        """All settings in absolute values."""
        return {**connection_of("qemu", self.settings), "mode": self.settings.mode}

    async def open(self, *, first_use: bool) -> None:
        """Open the catalog."""
        await _in_thread(partial(self.catalog.open, first_use=first_use))

    async def instances(self) -> frozenset[InstanceId]:
        """Ids of the sockets that fit the template."""
        found = await trio.to_thread.run_sync(_find_instances, str(self.settings.socket), abandon_on_cancel=True)
        if not found:
            raise BackendUnavailable(
                f"no monitor fits {self.settings.socket}: no guest runs, or its directory is missing"
            )
        return found

    async def state(self, instance: InstanceId) -> Status:
        """The run state of the guest's QEMU."""
        async with self._monitor(instance) as monitor:
            return _status(await _run_state(monitor))

    async def prepare(self, instance: InstanceId, kind: SnapshotKind) -> Preparation:
        """Check the disks; the memory goes into the first of them."""
        if kind is not SnapshotKind.STANDBY:
            raise Unsupported("this version captures a guest only while its QEMU runs: start it")
        await _in_thread(self.catalog.check)
        async with self._monitor(instance) as monitor:
            disks = await read_disks(monitor)
            memory = await monitor.execute("query-memory-size-summary")
            peer_directory = monitor.peer_directory()
        check_capturable(disks)
        ram = memory["base-memory"] + memory.get("plugged-memory", 0)
        file = peer_directory / disks[0].file
        # QEMU may see other files than this process does, and of a device no free space is to be had.
        seen = file.is_absolute() and await trio.to_thread.run_sync(file.is_file, abandon_on_cancel=True)
        if not seen:
            _log.warning("free space is not checked: the guest's disk is not seen from here", disk=disks[0].file)
        return Preparation(
            needed_bytes=ram + ram // 16 + _MARGIN,
            path=file if seen else None,
            taken_names=frozenset(entry.tag for disk in disks for entry in disk.entries),
        )

    async def pause(self, instance: InstanceId) -> None:
        """Stop the guest's vCPUs."""
        async with self._monitor(instance) as monitor:
            match await _run_state(monitor):
                case "paused":
                    return
                case "running":
                    await monitor.execute("stop")
                case word:
                    raise InvalidState(f"QEMU is in state {word}: only a running guest can be paused")

    async def resume(self, instance: InstanceId) -> None:
        """Let the guest's vCPUs go on."""
        async with self._monitor(instance) as monitor:
            match await _run_state(monitor):
                case "running":
                    return
                case "paused":
                    await monitor.execute("cont")
                case word:
                    raise InvalidState(f"QEMU is in state {word}: only a paused guest can be resumed")

    async def capture(self, instance: InstanceId, request: CaptureRequest) -> Captured:
        """Save into the disks. The draft of the manifest comes first, so that a tag found later is known for ours."""
        async with self._monitor(instance) as monitor:
            disks = await read_disks(monitor)
            check_capturable(disks)
            if holders := [disk.device for disk in disks if disk.find(request.name)]:
                raise CaptureFailed(f"there is a snapshot {request.name} already, on {', '.join(holders)}")
            uuid = (await monitor.execute("query-uuid"))["UUID"]
            draft = new_draft(instance, request, disks, {"name": "qemu", "version": monitor.version, "uuid": uuid})
            await _in_thread(self._begin, draft)
            try:
                entry, freeze_s = await save(monitor, save_job(request.run_id), request.name, disks)
                whole = completed(draft, entry)
                await trio.to_thread.run_sync(self.catalog.write_manifest, whole, abandon_on_cancel=True)
            except (CaptureFailed, OSError) as error:
                raise CaptureFailed(f"{error}{await self._undo(monitor, draft)}") from error
            await dismiss(monitor, save_job(request.run_id))
        return Captured(whole.snapshot(), freeze_s)

    def _begin(self, draft: Manifest) -> None:
        directory = self.catalog.begin(draft.instance_id, draft.id)
        self.catalog.write_manifest(draft)
        # After a power failure a tag on the disks must not be without it.
        sync_tree(directory)
        sync_tree(directory.parent, deep=False)
        sync_tree(self.catalog.root, deep=False)

    async def _undo(self, monitor: qmp.Monitor, draft: Manifest) -> str:
        """Remove what a failed capture left. No disk had the name before, so all that have it now have it by us."""
        try:
            await clear(monitor, draft.id, draft.name, [d for d in await read_disks(monitor) if d.find(draft.name)])
            await _in_thread(self.catalog.discard, draft.instance_id, draft.id)
        except BackendError as error:
            return f"; what is left of it is removed when the run is settled ({error})"
        return ""

    async def publish(self, snapshot: Snapshot) -> None:
        """List it in the catalog."""
        await _in_thread(self.catalog.publish, snapshot.instance_id, snapshot.id)

    async def list_snapshots(self, instance: InstanceId) -> tuple[Snapshot, ...]:
        """What is in the catalog and still on the disks."""
        manifests = await _in_thread(self.catalog.manifests, instance)
        async with self._monitor(instance) as monitor:
            disks = await read_disks(monitor)
        return tuple(m.snapshot() for m in manifests if memory_entry(shares(disks, known_entry(m)), m.name))

    async def delete_snapshot(self, snapshot: Snapshot) -> None:
        """Delete it from the disks that have it, then from the catalog. Another one by its name is left alone."""
        await _in_thread(self.catalog.check)
        manifest = await _in_thread(self.catalog.find, snapshot.instance_id, snapshot.id)
        if manifest is None:
            return
        async with self._monitor(snapshot.instance_id) as monitor:
            disks = await read_disks(monitor)
            ours = shares(disks, known_entry(manifest))
            if ours:
                await delete(monitor, f"hypemand-delete-{manifest.id}", manifest.name, ours)
        if others := [disk.device for disk in disks if disk.find(manifest.name) and disk not in ours]:
            _log.warning("another snapshot has the name of a deleted one; left alone", tag=manifest.name, disks=others)
        await _in_thread(self.catalog.delete, snapshot.instance_id, snapshot.id)

    async def settle(self, run: RunStarted, *, ours: bool) -> Settled:  # noqa: ARG002 - QEMU thaws by itself
        """Wait for the run's save; adopt it whole, or remove it. A pause that is found is an operator's."""
        await _in_thread(self.catalog.check)
        if published := await _in_thread(self.catalog.find, run.instance_id, run.run_id):
            return Settled(published.snapshot())
        draft = await _in_thread(self.catalog.draft, run.instance_id, run.run_id)
        whole: Manifest | None = None
        notes: tuple[str, ...] = ()
        if draft is not None:
            async with self._monitor(run.instance_id, SETTLE_PATIENCE_S) as monitor:
                whole, notes = await settle_save(monitor, draft, not_before=run.started_at - _CLOCK_SLACK)
        if whole is None:
            await _in_thread(self.catalog.discard, run.instance_id, run.run_id)
            return Settled(notes=notes)
        await _in_thread(self.catalog.write_manifest, whole)
        await _in_thread(self.catalog.publish, run.instance_id, run.run_id)
        return Settled(whole.snapshot())

    async def aclose(self) -> None:
        """Nothing is kept open."""

    @asynccontextmanager
    async def _monitor(self, instance: InstanceId, patience_s: float | None = None) -> AsyncIterator[qmp.Monitor]:
        # A monitor serves one client: without the lock, hypemand would take itself for somebody else.
        lock = self._locks.setdefault(instance, trio.Lock())
        patience_s = patience_s or self.patience_s
        with trio.move_on_after(patience_s) as waiting:
            await lock.acquire()
        if waiting.cancelled_caught:
            raise BackendUnavailable(
                f"the monitor of {instance} is in use by hypemand itself, for a capture or a deletion"
            )
        try:
            path = Path(str(self.settings.socket).replace(PLACEHOLDER, instance))
            async with qmp.connect(path, patience_s=patience_s) as monitor:
                yield monitor
        finally:
            lock.release()


def _find_instances(template: str) -> frozenset[InstanceId]:
    first, *others = (re.escape(part) for part in template.split(PLACEHOLDER))
    fits = re.compile(first + "(?P<id>[^/]+)" + "(?P=id)".join(others))
    found = set()
    # Path.glob could not escape what the template means literally.
    for path in glob.iglob("*".join(glob.escape(part) for part in template.split(PLACEHOLDER))):  # noqa: PTH207
        with suppress(OSError, RuleBroken):
            if (match := fits.fullmatch(path)) and Path(path).is_socket():
                found.add(check_instance_id(match["id"]))
    return frozenset(found)


async def _run_state(monitor: qmp.Monitor) -> str:
    """QEMU's word for what the guest does. While it moves memory about, nothing is to be decided."""
    word = str((await monitor.execute("query-status"))["status"])
    if word in _BUSY:
        raise BackendUnavailable(f"QEMU is busy: {word}")
    return word


def _status(word: str) -> Status:
    return Status(_STATES[word]) if word in _STATES else Status(InstanceState.UNKNOWN, word)


async def _in_thread(function: Callable[..., T], *args: Any) -> T:
    """Catalog work. Abandoned on cancellation: a filesystem that hangs must not hold up what has to go on."""
    try:
        return await trio.to_thread.run_sync(function, *args, abandon_on_cancel=True, limiter=_threads())
    except OSError as error:
        raise BackendUnavailable(f"the catalog can't be used: {error}") from error


@cache
def _threads() -> trio.CapacityLimiter:
    """Threads of their own for catalogs: those that hang there leave the others to other work."""
    return trio.CapacityLimiter(40)


def _build(name: str, settings: QemuSettings, surroundings: Surroundings) -> QemuBackend:
    catalog = (settings.snapshot_dir or surroundings.state_dir / "catalog" / name).absolute()
    settings = evolve(settings, socket=settings.socket.absolute(), snapshot_dir=catalog)
    return QemuBackend(name, settings, Catalog(catalog))


@frozen
class _Type:
    settings: type[QemuSettings] = QemuSettings
    build: Callable[[str, QemuSettings, Surroundings], QemuBackend] = _build


TYPE = _Type()
