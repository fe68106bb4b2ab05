"""A capture, from the pause to the manifest. The guest's own VMM saves memory and devices.

The VMM comes first, the disks after it: its call can't be ended, and copies
can, at the end of the freeze budget; and Firecracker waits for what the guest
has asked of its disks only then. Cloud Hypervisor does so when it pauses, and
before 53.0 not at all.
"""

import math
import os
from pathlib import Path

import structlog
import trio
from attrs import Factory, evolve, frozen

from hypemand.backends.base import BackendUnavailable, Captured, CaptureFailed, CaptureRequest, InvalidState
from hypemand.backends.catalog import Manifest
from hypemand.backends.copying import copy_file
from hypemand.backends.meter import Meter
from hypemand.backends.vmm import disks as files
from hypemand.backends.vmm import origin
from hypemand.backends.vmm.both import both
from hypemand.backends.vmm.client import Client, ConnectionLost, Peer, Refused, SocketAbsent
from hypemand.backends.vmm.dialect import Machine
from hypemand.backends.vmm.disks import Sign
from hypemand.backends.vmm.guests import SAVED, Guests
from hypemand.backends.vmm.manifest import DISKS, Contents, Way, manifest_of
from hypemand.backends.vmm.readying import ROOM, Ready, make_ready
from hypemand.backends.vmm.rights import open_own, take_back
from hypemand.backends.vmm.rooms import Exchange
from hypemand.backends.vmm.stopped import copy_stopped
from hypemand.backends.vmm.whole import check_documents, check_sizes
from hypemand.core.model import InstanceId, InstanceState, SnapshotKind

_log = structlog.get_logger()


@frozen
class Paused:
    """A pause by this process, or a try: for which run, and which VMM has the guest."""

    run_id: str
    peer: Peer | None


@frozen
class Taken:
    """A capture that has all that the guest had to stand still for: the *sizes* of its copies, by name."""

    ready: Ready
    sizes: dict[str, int]


@frozen(eq=False)
class Capturing:
    """Captures the guests of one backend.

    Attributes:
        paused: Guests that this backend has paused, or tried to.
    """

    guests: Guests
    paused: dict[InstanceId, Paused] = Factory(dict)
    _ready: dict[InstanceId, Ready] = Factory(dict)
    _taken: dict[InstanceId, Taken] = Factory(dict)

    async def make_ready(self, instance: InstanceId, request: CaptureRequest) -> None:
        """Have the directories there, and know the VMM: from here on until the guest runs again it is this process."""
        if self._is_ready(instance, request) or self._is_paused(instance, request):
            return
        client = self.guests.client(instance)
        client.hold()
        try:
            self._ready[instance] = await self._made_ready(instance, request, client)
        except BaseException:
            client.let_go()
            raise

    async def _made_ready(self, instance: InstanceId, request: CaptureRequest, client: Client) -> Ready:
        look, machine = await self.guests.dialect.inspect(client)
        if look.state is not InstanceState.RUNNING:
            raise InvalidState(f"instance is {look}: only a running one can be paused")
        ready = await make_ready(self.guests, instance, request, machine)
        await self.guests.threads.do(origin.write_note, ready.partial, client.peer)
        return ready

    def _is_ready(self, instance: InstanceId, request: CaptureRequest) -> bool:
        ready = self._ready.get(instance)
        return ready is not None and ready.request.run_id == request.run_id

    def _is_paused(self, instance: InstanceId, request: CaptureRequest) -> bool:
        paused = self.paused.get(instance)
        return paused is not None and paused.run_id == request.run_id

    async def pause(self, instance: InstanceId, request: CaptureRequest) -> None:
        """Have the guest stand still, unless somebody else's pause is found."""
        await self.make_ready(instance, request)
        client, dialect = self.guests.client(instance), self.guests.dialect
        look = await dialect.look(client)
        if look.state is InstanceState.PAUSED and self._is_paused(instance, request):
            return
        if look.state is not InstanceState.RUNNING:
            raise InvalidState(f"instance is {look}, and not by hypemand: only a running one can be paused")
        self.paused[instance] = Paused(request.run_id, client.peer)
        try:
            await dialect.pause(client)
        except Refused as error:
            if dialect.paused_already(error.reason):
                del self.paused[instance]
                raise InvalidState(f"instance was paused by somebody else just now: {error.reason}") from error
            refusal = f"{dialect.title} could not pause the guest: {error.reason}"
            raise BackendUnavailable("; ".join([refusal, *await self._what_is_left(instance)])) from error

    async def _what_is_left(self, instance: InstanceId) -> list[str]:
        """Undo a pause that was refused, and tell what may be left of it.

        Some devices may stand still, others not, and the VMM takes the guest
        for a running one. Nothing more is tried: to pause twice what stands
        still already has Cloud Hypervisor itself stand still.
        """
        client, dialect = self.guests.client(instance), self.guests.dialect
        try:
            await dialect.resume(client)
        except Refused as error:
            look = await dialect.look(client)
            if look.state is not InstanceState.RUNNING:
                return []  # whoever calls has the guest resumed
            left = (
                f"the guest may stand still all the same: {dialect.title} calls it running, and won't resume it"
                f" ({error.reason}). Look whether it runs; if not, start it anew"
            )
            _log.critical("a guest may stand still", instance_id=instance, error=left)
            return [left]
        return []

    async def resume(self, instance: InstanceId) -> None:
        """Have the guest run again. Asked at once: whether there is need for it is seen by the answer."""
        client = self.guests.client(instance)
        try:
            await self.guests.dialect.resume(client)
        except SocketAbsent:
            if not self._has_ended(instance):
                raise
            _log.warning("the VMM has ended while its guest stood still for us", instance_id=instance)
        except (Refused, ConnectionLost):
            await self._resume_if_paused(client)
        self.paused.pop(instance, None)
        client.let_go()

    def _has_ended(self, instance: InstanceId) -> bool:
        paused = self.paused.get(instance)
        if paused is not None and paused.peer is not None:
            return not paused.peer.lives()
        return self.guests.client(instance).has_ended()

    async def _resume_if_paused(self, client: Client) -> None:
        look = await self.guests.dialect.look(client)
        if look.state is InstanceState.PAUSED:
            await self.guests.dialect.resume(client)
        elif look.state is not InstanceState.RUNNING:
            raise InvalidState(f"instance is {look}: there is nothing to resume")

    async def capture(self, instance: InstanceId, request: CaptureRequest) -> Captured:
        """What the guest has to stand still for."""
        if request.kind is SnapshotKind.STOPPED:
            ready, sizes = await copy_stopped(self.guests, instance, request)
            return self._take(instance, Taken(ready, sizes), {})
        client, dialect = self.guests.client(instance), self.guests.dialect
        if not self._is_ready(instance, request):
            machine = await self._inspect(client)
            self._ready[instance] = await make_ready(self.guests, instance, request, machine)
        ready = self._ready[instance]
        try:
            await dialect.save(client, self.guests.view(instance).name_of(ready.saving))
        except Refused as error:
            raise CaptureFailed(f"{dialect.title} could not save the guest: {error.reason}") from error
        deadline = math.inf if request.freeze_deadline is None else request.freeze_deadline
        with trio.CancelScope(deadline=deadline):  # a filesystem that hangs must not have the guest stand still
            return await self._copy(instance, ready, request.meter)
        raise CaptureFailed(files.over_budget(request.meter))

    async def _copy(self, instance: InstanceId, ready: Ready, meter: Meter) -> Captured:
        """Copy the disks, and see that they are of the same instant as what was saved."""
        meter.total_bytes = sum(disk.data_bytes for disk in ready.disks)
        signs = await self.guests.threads.do(files.signs_of, ready.disks)
        sizes = await files.copy_disks(ready.disks, ready.partial / DISKS, meter)
        return await self._check(instance, Taken(ready, sizes), signs)

    async def _check(self, instance: InstanceId, taken: Taken, signs: tuple[Sign, ...]) -> Captured:
        """Make sure that all of it is of one instant, and of the disks that the guest has."""
        ready = taken.ready
        machine, (now, saved) = await both(
            lambda: self._inspect(self.guests.client(instance)),
            lambda: self.guests.threads.do(lambda: (files.signs_of(ready.disks), _sizes(ready.saving))),
        )
        if machine.drives != ready.machine.drives or now != signs:
            raise CaptureFailed("the guest's disks were changed while it was captured")
        return self._take(instance, taken, saved)

    async def _inspect(self, client: Client) -> Machine:
        look, machine = await self.guests.dialect.inspect(client)
        if look.state is not InstanceState.PAUSED:
            raise CaptureFailed(f"instance is {look}, and has to stand still: somebody else has resumed it")
        return machine

    def _take(self, instance: InstanceId, taken: Taken, saved: dict[str, int]) -> Captured:
        """Know what the snapshot consists of; it is written down once the guest runs."""
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
        contents = Contents(ready.disks, taken.sizes, saved, ready.machine.drives)
        return manifest_of(instance, ready.request, contents, way, ready.identity)

    async def complete(self, captured: Captured) -> Captured:
        """Take back what the VMM has written, and write the manifest."""
        snapshot = captured.snapshot
        taken = self._taken.pop(snapshot.instance_id)
        saved = await self._take_back(taken.ready) if snapshot.kind is SnapshotKind.STANDBY else {}
        manifest = self._manifest(snapshot.instance_id, taken, saved)
        await self.guests.threads.do(origin.remove_note, taken.ready.partial)
        await self.guests.threads.do(self.guests.catalog.write_manifest, manifest)
        await self.guests.threads.do(self.guests.drop_saving, snapshot.instance_id, snapshot.id)
        return evolve(captured, snapshot=manifest.snapshot())

    async def _take_back(self, ready: Ready) -> dict[str, int]:
        """Have the VMM's files in the catalog, also from the VMM's own root directory."""
        target = ready.partial / SAVED
        saved, left = await self.guests.threads.do(take_back, ready.saving, target)
        check_sizes(self.guests.dialect, ready.machine, ready.saving, saved)
        room = ready.partial / ROOM
        if left:
            descriptor = await self.guests.threads.do(open_own, ready.saving)
            try:
                exchange = await self.guests.threads.do(Exchange, room, sum(saved[name] for name in left))
                for name in left:
                    await copy_file(Path(f"/proc/self/fd/{descriptor}") / name, target / name, meter=exchange)
            finally:
                os.close(descriptor)
        await self.guests.threads.do(room.unlink, missing_ok=True)
        await self.guests.threads.do(check_documents, self.guests.dialect, target)
        return saved

    def forget(self, instance: InstanceId) -> None:
        """Let go of what was made ready for a capture that is over, or never came."""
        self.paused.pop(instance, None)
        self.guests.client(instance).let_go()
        self._taken.pop(instance, None)
        self._ready.pop(instance, None)


def _sizes(directory: Path) -> dict[str, int]:
    with os.scandir(directory) as entries:
        return {entry.name: entry.stat(follow_symlinks=False).st_size for entry in entries}
