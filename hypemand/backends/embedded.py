"""The backend that needs nothing installed: directories that stand for guests. For trying out, and for tests.

``<root>/instances/<id>/`` holds ``instance.json``, whose edit by hand counts
at once, and ``memory`` and ``disk`` of real bytes; snapshots are in the
catalog ``<root>/snapshots``.
"""

import contextlib
import shlex
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import trio
from attrs import evolve, field, frozen

from hypemand.backends.base import (
    BackendType,
    BackendUnavailable,
    Capabilities,
    Captured,
    CaptureFailed,
    CaptureRequest,
    InstanceNotFound,
    Preparation,
    Room,
    Settled,
    Status,
    Surroundings,
    Unsupported,
)
from hypemand.backends.catalog import Catalog, Manifest
from hypemand.backends.copying import copy_file, data_bytes
from hypemand.backends.embedded_guests import (
    DISK,
    MEMORY,
    STATE_FILE,
    Guest,
    make_instance,
    paused,
    read_state,
    resumed,
    size_of,
    write_state,
)
from hypemand.backends.embedded_settings import Settings
from hypemand.backends.ids import checked
from hypemand.backends.own_threads import OwnThreads
from hypemand.backends.reflinks import MUCH, advice_on_copies, can_reflink
from hypemand.backends.registry import connection_of
from hypemand.core.errors import RuleBroken
from hypemand.core.model import (
    Freezer,
    InstanceId,
    RestoreAction,
    RestoreStep,
    RunStarted,
    Snapshot,
    SnapshotKind,
)
from hypemand.core.naming import check_instance_id

T = TypeVar("T")

MARGIN = 64 << 10
DISCARD_TIME = 0.2
"""Seconds that a failed capture may spend on removing its partial snapshot, while the guest stands still."""

_FILES = {SnapshotKind.STANDBY: (MEMORY, DISK), SnapshotKind.STOPPED: (DISK,)}


@frozen
class EmbeddedBackend:
    """Follows `Backend`. Threads that a cancelled call leaves behind change no instance after the call that follows."""

    name: str
    settings: Settings
    _threads: OwnThreads = field(init=False)
    _locks: defaultdict[InstanceId, threading.Lock] = field(init=False, factory=lambda: defaultdict(threading.Lock))

    @_threads.default
    def _own_threads(self) -> OwnThreads:
        return OwnThreads(self.settings.root)

    @property
    def capabilities(self) -> Capabilities:
        """The engine freezes; a capture can be aborted; both kinds."""
        return Capabilities(freezes=Freezer.ENGINE, abortable=True, kinds=frozenset(_FILES))

    @property
    def connection(self) -> Mapping[str, Any]:
        """Without the instances: what is to be made is no part of finding what there is."""
        return connection_of("embedded", evolve(self.settings, instances={}))

    @property
    def _instances(self) -> Path:
        return self.settings.root / "instances"

    @property
    def _catalog(self) -> Catalog:
        return Catalog(self.settings.root / "snapshots")

    async def open(self, *, first_use: bool) -> None:
        """Make the configured instances that are not there; on first use what holds them, too."""
        await self._threads.do(self._open, first_use)

    async def instances(self) -> frozenset[InstanceId]:
        """The directories whose names may be those of instances."""
        return await self._threads.do(self._listed)

    async def state(self, instance: InstanceId) -> Status:
        """What ``instance.json`` says at the moment."""
        guest = await self._threads.ask(self._read, checked(instance))
        return Status(guest.state, f"paused by {guest.paused_by}" if guest.paused_by else "")

    async def prepare(self, instance: InstanceId, kind: SnapshotKind) -> Preparation:
        """Look at the files that would be copied, and at the catalog."""
        return await self._threads.ask(self._prepare, checked(instance), kind)

    async def make_ready(self, instance: InstanceId, request: CaptureRequest) -> None:
        """There is nothing to make ready."""
        del instance, request
        await trio.lowlevel.checkpoint()

    async def pause(self, instance: InstanceId, request: CaptureRequest) -> None:
        """Write Paused with our mark.

        Raises:
            InvalidState: Neither running nor paused by us.
        """
        del request
        await self._change(instance, paused)

    async def resume(self, instance: InstanceId) -> None:
        """Write Running, without the mark. Already running: no-op."""
        await self._change(instance, resumed)

    async def capture(self, instance: InstanceId, request: CaptureRequest) -> Captured:
        """Copy the instance's files."""
        home = self._home(checked(instance))
        try:
            manifest = await self._copy(home, instance, request)
        except BaseException:
            with trio.move_on_after(DISCARD_TIME, shield=True), contextlib.suppress(BackendUnavailable):
                await self._threads.do(self._catalog.discard, instance, request.run_id)
            raise
        return Captured(manifest.snapshot())

    async def complete(self, captured: Captured) -> Captured:
        """Nothing is left to do: the copies were made while the guest stood still."""
        return captured

    async def _copy(self, home: Path, instance: InstanceId, request: CaptureRequest) -> Manifest:
        try:
            partial = await self._threads.do(self._begin, instance, request)
            rate, meter = self.settings.copy_rate, request.meter
            files = {
                name: await copy_file(home / name, partial / name, rate=rate, meter=meter)
                for name in _FILES[request.kind]
            }
            manifest = Manifest(
                id=request.run_id,
                instance_id=instance,
                name=request.name,
                kind=request.kind,
                tags=request.tags,
                created_at=request.created_at,
                size_bytes=sum(files.values()),
                files=files,
                hypervisor={"name": "embedded"},
                restore=tuple(self._copied_back(instance, request.run_id, name) for name in files),
            )
            await self._threads.do(self._catalog.write_manifest, manifest)
        except BackendUnavailable as error:
            raise CaptureFailed(str(error)) from error
        return manifest

    def _copied_back(self, instance: InstanceId, snapshot_id: str, name: str) -> RestoreStep:
        source, target = self._catalog.home(instance, snapshot_id) / name, self._home(instance) / name
        return RestoreStep(RestoreAction.RUN, shlex.join(["cp", "--sparse=always", str(source), str(target)]))

    async def publish(self, snapshot: Snapshot) -> None:
        """Make the copies durable, then give them their name in the catalog."""
        await self._threads.do(self._catalog.publish, checked(snapshot.instance_id), snapshot.id)

    async def list_snapshots(self, instance: InstanceId) -> tuple[Snapshot, ...]:
        """What the catalog holds, also of an instance that is gone."""
        manifests = await self._threads.ask(self._catalog.manifests, checked(instance))
        return tuple(manifest.snapshot() for manifest in manifests)

    async def delete_snapshot(self, snapshot: Snapshot) -> None:
        """Delete it from the catalog."""
        await self._threads.do(self._catalog.delete, checked(snapshot.instance_id), snapshot.id)

    async def settle(self, run: RunStarted, *, ours: bool) -> Settled:
        """Thaw first, by the mark alone; then look at the catalog. A partial snapshot is never complete here."""
        del ours
        notes: tuple[str, ...] = ()
        found: Guest | None = None
        try:
            found = await self._change(run.instance_id, lambda guest: guest.running() if guest.frozen_by_us else guest)
        except InstanceNotFound as error:
            notes = (str(error),)
        resumed = found is not None and found.frozen_by_us
        paused_at = found.paused_at if found is not None and resumed else None
        freeze_s = (datetime.now(UTC) - paused_at).total_seconds() if paused_at is not None else None
        snapshot = await self._threads.do(self._settle_snapshot, run)
        return Settled(snapshot=snapshot, resumed=resumed, freeze_s=freeze_s, notes=notes)

    async def aclose(self) -> None:
        """There is nothing to let go of."""
        await trio.lowlevel.checkpoint()

    # Threads of its own: a hung filesystem below this root stops no other backend.

    async def _change(self, instance: InstanceId, change: Callable[[Guest], Guest]) -> Guest:
        """Rewrite ``instance.json``, and return what it said before.

        One at a time, so that a pause that was cancelled while it was written
        is over before the resume that follows; one that had not begun never does.
        """
        lock, abandoned = self._locks[checked(instance)], threading.Event()

        def work() -> Guest:
            with lock:
                guest = self._read(instance)
                wanted = change(guest)
                if wanted != guest and not abandoned.is_set():
                    write_state(self._home(instance), wanted)
                return guest

        try:
            return await self._threads.do(work)
        finally:
            abandoned.set()

    # From here on: in a worker thread.

    def _open(self, first_use: bool) -> None:  # noqa: FBT001 - a thread takes its arguments by position
        if first_use:
            self._instances.mkdir(mode=0o700, parents=True, exist_ok=True)
        there = self._names()
        self._catalog.open(first_use=first_use)
        for instance, spec in self.settings.instances.items():
            if instance not in there:
                make_instance(self._instances, instance, spec)

    def _names(self) -> frozenset[str]:
        try:
            return frozenset(entry.name for entry in self._instances.iterdir())
        except OSError as error:
            raise BackendUnavailable(
                f"{self._instances} can't be read ({error.strerror}): is its filesystem mounted?"
            ) from error

    def _listed(self) -> frozenset[InstanceId]:
        found = set()
        for name in self._names():
            with contextlib.suppress(RuleBroken):
                found.add(check_instance_id(name))
        if not found:
            raise BackendUnavailable(f"{self._instances} holds no instances: is its filesystem mounted?")
        return frozenset(found)

    def _home(self, instance: InstanceId) -> Path:
        return self._instances / instance

    def _read(self, instance: InstanceId) -> Guest:
        path = self._home(instance) / STATE_FILE
        try:
            return read_state(path)
        except FileNotFoundError:
            if instance not in self._names():
                raise InstanceNotFound(f"{self._instances} has no instance {instance}") from None
            write = 'write {"state": "Stopped"} or another state into it'
            raise BackendUnavailable(f"{path} is missing; {write}") from None

    def _prepare(self, instance: InstanceId, kind: SnapshotKind) -> Preparation:
        files, catalog = [self._home(instance) / name for name in _FILES[kind]], self._catalog.root
        try:
            needed = sum(map(size_of, files))
        except Unsupported:
            self._read(instance)  # there may be no such instance at all
            raise
        names = frozenset(manifest.name for manifest in self._catalog.manifests(instance))
        copied = 0 if needed <= MUCH else sum(data_bytes(file) for file in files if not can_reflink(file, catalog))
        return Preparation((Room(catalog, needed + MARGIN),), names, advice=advice_on_copies(copied, catalog))

    def _begin(self, instance: InstanceId, request: CaptureRequest) -> Path:
        files = [self._home(instance) / name for name in _FILES[request.kind]]
        request.meter.total_bytes = sum(data_bytes(path) for path in files if path.exists())
        return self._catalog.begin(instance, request.run_id)

    def _settle_snapshot(self, run: RunStarted) -> Snapshot | None:
        # In this order: what can't be discarded any more has been published.
        self._catalog.discard(run.instance_id, run.run_id)
        manifest = self._catalog.find(run.instance_id, run.run_id)
        return manifest.snapshot() if manifest is not None else None


def _build(name: str, settings: Settings, surroundings: Surroundings) -> EmbeddedBackend:
    del surroundings
    return EmbeddedBackend(name, evolve(settings, root=settings.root.absolute()))


@frozen
class _Type:
    settings: type[Settings] = Settings
    build: Callable[[str, Settings, Surroundings], EmbeddedBackend] = _build


TYPE: BackendType = _Type()
