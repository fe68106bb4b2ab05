"""A capture, from the directories that it needs to the manifest. The guest's own VMM saves memory and devices.

The VMM comes first, the disks after it: its call can't be ended, and copies
can, at the end of the freeze budget; and only then has the VMM done with what
the guest had asked of its disks.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import structlog
from attrs import Factory, evolve, frozen

from hypemand.backends.base import (
    BackendUnavailable,
    Captured,
    CaptureFailed,
    CaptureRequest,
    InvalidState,
    Unsupported,
)
from hypemand.backends.catalog import Manifest
from hypemand.backends.copying import copy_file
from hypemand.backends.vmm import disks as files
from hypemand.backends.vmm.client import Client, Refused, SocketAbsent
from hypemand.backends.vmm.dialect import Identity, Look, Machine
from hypemand.backends.vmm.disks import Disk
from hypemand.backends.vmm.guests import SAVED, Guests
from hypemand.backends.vmm.manifest import DISKS, Contents, Way, manifest_of
from hypemand.backends.vmm.rights import Writer, seal
from hypemand.core.model import InstanceId, InstanceState, Snapshot, SnapshotKind

ROOM = "room"
"""A file of a snapshot that is built: it holds the room for what is still in another filesystem."""
_log = structlog.get_logger()


@frozen
class Ready:
    """Directories that are there for a capture.

    Attributes:
        partial: Of the catalog.
        saving: Where the VMM writes; elsewhere than in *partial* where it can't get there.
    """

    request: CaptureRequest
    partial: Path
    saving: Path
    writer: Writer
    identity: Identity


@frozen
class Taken:
    """A capture that has all that the guest had to stand still for."""

    ready: Ready
    machine: Machine
    copied: Sequence[Disk]
    sizes: dict[str, int]


@frozen(eq=False)
class Capturing:
    """Captures the guests of one backend.

    Attributes:
        paused: For which run this backend has paused a guest, or tried to.
    """

    guests: Guests
    paused: dict[InstanceId, str] = Factory(dict)
    _ready: dict[InstanceId, Ready] = Factory(dict)
    _taken: dict[InstanceId, Taken] = Factory(dict)

    async def make_ready(self, instance: InstanceId, request: CaptureRequest) -> None:
        """Have the directories there, and know the VMM."""
        if self._is_ready(instance, request) or self.paused.get(instance) == request.run_id:
            return
        look, machine = await self.guests.dialect.inspect(self.guests.client(instance))
        if look.state is not InstanceState.RUNNING:
            raise InvalidState(f"instance is {_told(look)}: only a running one can be paused")
        await self._make_ready(instance, request, machine)

    def _is_ready(self, instance: InstanceId, request: CaptureRequest) -> bool:
        ready = self._ready.get(instance)
        return ready is not None and ready.request.run_id == request.run_id

    async def _make_ready(self, instance: InstanceId, request: CaptureRequest, machine: Machine) -> Ready:
        identity = await self.guests.dialect.identify(self.guests.client(instance))
        try:
            ready = await self.guests.in_thread(
                self._make_directories, instance, request, identity, machine.memory_bytes
            )
        except BackendUnavailable as error:
            raise CaptureFailed(f"the capture can't be made ready: {error}") from error
        self._ready[instance] = ready
        return ready

    def _make_directories(
        self, instance: InstanceId, request: CaptureRequest, identity: Identity, memory_bytes: int
    ) -> Ready:
        writer = self.guests.writer(instance)
        partial = self.guests.catalog.begin(instance, request.run_id)
        (partial / DISKS).mkdir(mode=0o700)
        saving = self.guests.saving(instance, request.run_id)
        if saving.parent != partial:
            (partial / SAVED).mkdir(mode=0o700)
            self.guests.drop_saving(instance, request.run_id)
            if saving.parent.stat().st_dev != partial.stat().st_dev:
                _reserve(partial / ROOM, memory_bytes)
        writer.make_directory(saving)
        return Ready(request, partial, saving, writer, identity)

    async def pause(self, instance: InstanceId, request: CaptureRequest) -> None:
        """Have the guest stand still, unless somebody else's pause is found."""
        await self.make_ready(instance, request)
        client, dialect = self.guests.client(instance), self.guests.dialect
        look = await dialect.look(client)
        ours = self.paused.get(instance) == request.run_id
        if look.state is InstanceState.PAUSED and ours:
            return
        if look.state is not InstanceState.RUNNING:
            raise InvalidState(f"instance is {_told(look)}, and not by hypemand: only a running one can be paused")
        self.paused[instance] = request.run_id
        try:
            await dialect.pause(client)
        except Refused as error:
            if dialect.paused_already(error.reason):
                del self.paused[instance]
                raise InvalidState(f"instance was paused by somebody else just now: {error.reason}") from error
            # Some devices may stand still, others not: whoever calls has the guest resumed.
            raise BackendUnavailable(f"{dialect.title} could not pause the guest: {error.reason}") from error

    async def resume(self, instance: InstanceId) -> None:
        """Have the guest run again."""
        client, dialect = self.guests.client(instance), self.guests.dialect
        try:
            look = await dialect.look(client)
        except SocketAbsent:
            if not client.has_ended():
                raise
            _log.warning("the VMM has ended while its guest stood still for us", instance_id=instance)
            self.paused.pop(instance, None)
            return
        if look.state is InstanceState.PAUSED:
            try:
                await dialect.resume(client)
            except Refused:
                if (await dialect.look(client)).state is not InstanceState.RUNNING:
                    raise
        elif look.state is not InstanceState.RUNNING:
            raise InvalidState(f"instance is {_told(look)}: there is nothing to resume")
        self.paused.pop(instance, None)

    async def capture(self, instance: InstanceId, request: CaptureRequest) -> Captured:
        """What the guest has to stand still for."""
        if request.kind is SnapshotKind.STOPPED:
            return await self._capture_stopped(instance, request)
        client, dialect = self.guests.client(instance), self.guests.dialect
        machine = await self._inspect(client)
        if not self._is_ready(instance, request):
            await self._make_ready(instance, request, machine)
        ready = self._ready[instance]
        copied = await self._disks(instance, machine)
        try:
            await dialect.save(client, self.guests.view(instance).name_of(ready.saving))
        except Refused as error:
            raise CaptureFailed(f"{dialect.title} could not save the guest: {error.reason}") from error
        signs = await self.guests.in_thread(files.signs_of, copied)
        sizes = await files.copy_disks(copied, ready.partial / DISKS, request.meter, request.freeze_deadline)
        after = await self._inspect(client)
        if after.drives != machine.drives or await self.guests.in_thread(files.signs_of, copied) != signs:
            raise CaptureFailed("the guest's disks were changed while it was captured")
        return await self._take(instance, Taken(ready, machine, copied, sizes))

    async def _inspect(self, client: Client) -> Machine:
        look, machine = await self.guests.dialect.inspect(client)
        if look.state is not InstanceState.PAUSED:
            raise CaptureFailed(f"instance is {_told(look)}, and has to stand still: somebody else has resumed it")
        if machine.refusals:
            raise CaptureFailed("; ".join(machine.refusals))
        return machine

    async def _disks(self, instance: InstanceId, machine: Machine) -> tuple[Disk, ...]:
        try:
            return await self.guests.in_thread(files.disks_of, machine.drives, self.guests.view(instance))
        except Unsupported as error:
            raise CaptureFailed(str(error)) from error

    async def _take(self, instance: InstanceId, taken: Taken) -> Captured:
        """Know what the snapshot consists of; it is written down once the guest runs."""
        saved = await self.guests.in_thread(_sizes, taken.ready.saving)
        self._ready.pop(instance, None)
        self._taken[instance] = taken
        return Captured(self._manifest(instance, taken, saved).snapshot())

    def _manifest(self, instance: InstanceId, taken: Taken, saved: dict[str, int]) -> Manifest:
        ready, guests = taken.ready, self.guests
        way = Way(
            guests.dialect,
            guests.catalog.home(instance, ready.request.run_id),
            guests.settings.socket_of(instance),
            ready.writer,
            guests.chroot_of(instance),
        )
        contents = Contents(taken.copied, taken.sizes, saved, taken.machine.drives)
        return manifest_of(instance, ready.request, contents, way, ready.identity)

    async def complete(self, captured: Captured) -> Captured:
        """Take back what the VMM has written, and write the manifest."""
        snapshot = captured.snapshot
        taken = self._taken.pop(snapshot.instance_id)
        saved: dict[str, int] = {}
        if snapshot.kind is SnapshotKind.STANDBY:
            saved = await self.guests.in_thread(seal, taken.ready.saving)
            self._check_whole(taken.ready.saving, saved)
            await self._fetch(snapshot, taken.ready)
        manifest = self._manifest(snapshot.instance_id, taken, saved)
        await self.guests.in_thread(self.guests.catalog.write_manifest, manifest)
        return evolve(captured, snapshot=manifest.snapshot())

    def _check_whole(self, saving: Path, saved: dict[str, int]) -> None:
        missing = [name for name in self.guests.dialect.saved if not saved.get(name)]
        if missing:
            raise CaptureFailed(
                f"{self.guests.dialect.title} says that it has saved the guest, but {' and '.join(missing)} can't be"
                f" found in {saving}: does it see the same directory there?"
            )

    async def _fetch(self, snapshot: Snapshot, ready: Ready) -> None:
        """Have the VMM's files in the catalog, also from the VMM's own root directory."""
        if ready.saving.parent == ready.partial:
            return
        target = ready.partial / SAVED
        await self.guests.in_thread((ready.partial / ROOM).unlink, missing_ok=True)
        for name in await self.guests.in_thread(os.listdir, ready.saving):
            if not await self.guests.in_thread(_moved, ready.saving / name, target / name):
                await copy_file(ready.saving / name, target / name)
        await self.guests.in_thread(self.guests.drop_saving, snapshot.instance_id, snapshot.id)

    async def _capture_stopped(self, instance: InstanceId, request: CaptureRequest) -> Captured:
        """Copies of the disks, while no VMM is there: told by its socket, its locks and the files themselves."""
        found = await self._unused_disks(instance)
        signs = await self.guests.in_thread(files.signs_of, found)
        partial = await self.guests.in_thread(self._begin, instance, request)
        sizes = await files.copy_disks(found, partial / DISKS, request.meter, None)
        if signs != await self.guests.in_thread(files.signs_of, found):
            raise CaptureFailed("a disk was written to while it was copied: something uses the disks of this guest")
        try:
            await self._unused_disks(instance)
        except BackendUnavailable as error:
            raise CaptureFailed(f"its disks were copied, but may have been in use: {error}") from error
        ready = Ready(request, partial, partial / SAVED, Writer(None), Identity())
        taken = Taken(ready, Machine((), 0), found, sizes)
        self._taken[instance] = taken
        return Captured(self._manifest(instance, taken, {}).snapshot())

    def _begin(self, instance: InstanceId, request: CaptureRequest) -> Path:
        partial = self.guests.catalog.begin(instance, request.run_id)
        (partial / DISKS).mkdir(mode=0o700)
        return partial

    async def _unused_disks(self, instance: InstanceId) -> tuple[Disk, ...]:
        try:
            look = await self.guests.dialect.look(self.guests.client(instance))
        except SocketAbsent as absent:
            paths = await self.guests.files_of_stopped(instance, absent)
        else:
            raise CaptureFailed(f"instance is {_told(look)} now, it was Stopped when its run began")
        return await self.guests.in_thread(lambda: tuple(map(files.read_disk, paths)))

    def forget(self, instance: InstanceId) -> None:
        """Let go of what was made ready for a capture that is over, or never came."""
        self._taken.pop(instance, None)
        self._ready.pop(instance, None)


def _told(look: Look) -> str:
    return f"{look.state} ({look.detail})" if look.detail else str(look.state)


def _reserve(path: Path, size: int) -> None:
    with path.open("xb") as file:
        os.posix_fallocate(file.fileno(), 0, max(size, 1))


def _sizes(directory: Path) -> dict[str, int]:
    with os.scandir(directory) as entries:
        return {entry.name: entry.stat(follow_symlinks=False).st_size for entry in entries}


def _moved(source: Path, target: Path) -> bool:
    """Whether it could be moved: within one filesystem."""
    try:
        source.rename(target)
    except OSError:
        return False
    return True
