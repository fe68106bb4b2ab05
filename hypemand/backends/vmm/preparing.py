"""What is to be known before a capture: whether it is possible, what room it takes, what could be better."""

from collections.abc import Sequence
from pathlib import Path

from attrs import frozen

from hypemand.backends.base import Preparation, Room, Unsupported
from hypemand.backends.reflinks import advice_on_copies, can_reflink
from hypemand.backends.vmm import disks as files
from hypemand.backends.vmm.client import SocketAbsent
from hypemand.backends.vmm.dialect import Identity, Machine
from hypemand.backends.vmm.disks import Disk
from hypemand.backends.vmm.guests import Guests
from hypemand.backends.vmm.readying import MARGIN, check_limit
from hypemand.backends.vmm.stopped import read_disks
from hypemand.core.model import InstanceId, SnapshotKind


@frozen(eq=False)
class Preparing:
    """Looks at the guests of one backend."""

    guests: Guests

    async def prepare(self, instance: InstanceId, kind: SnapshotKind) -> Preparation:
        """Look at the guest, its disks and the catalog."""
        guests = self.guests
        manifests = await guests.threads.ask(guests.catalog.manifests, instance)
        names = frozenset(manifest.name for manifest in manifests)
        if kind is SnapshotKind.STOPPED:
            return await self._stopped(instance, names)
        _, machine = await guests.dialect.inspect(guests.client(instance))
        if machine.refusals:
            raise Unsupported("; ".join(machine.refusals))
        identity = await guests.dialect.identify(guests.client(instance))
        return await guests.threads.do(self._running, instance, machine, identity, names)

    async def _stopped(self, instance: InstanceId, names: frozenset[str]) -> Preparation:
        guests = self.guests
        if not guests.settings.disks:
            raise Unsupported("to have a stopped guest captured, say where its disks are: the backend's setting disks")
        absent = SocketAbsent("nobody listens at its socket")
        paths = await guests.files_of_stopped(instance, absent)
        found = await guests.threads.do(read_disks, guests, instance, paths)
        needed = await guests.threads.do(_copied_bytes, found, guests.catalog.root)
        return Preparation((Room(guests.catalog.root, needed + MARGIN),), names, warnings=tuple(_overlays(found)))

    def _running(
        self, instance: InstanceId, machine: Machine, identity: Identity, names: frozenset[str]
    ) -> Preparation:
        catalog = self.guests.catalog.root
        found = files.disks_of(machine.drives, self.guests.view(instance))
        files.check_qcow2(found, self.guests.dialect, identity)
        known = set(self.guests.settings.disks_of(instance))
        self._check_writable(instance)
        self._check_allowed(machine)
        check_limit(self.guests, self.guests.writer(instance), machine)
        copied = _copied_bytes(found, catalog)
        return Preparation(
            rooms=tuple(self._rooms(instance, machine.memory_bytes, copied)),
            taken_names=names,
            warnings=(*machine.warnings, *_overlays(found), *_not_known(found, known)),
            advice=advice_on_copies(copied, catalog),
        )

    def _rooms(self, instance: InstanceId, memory: int, disks: int) -> list[Room]:
        """The VMM's files are moved into the catalog within one filesystem; between two they are there twice."""
        catalog, chroot = self.guests.catalog.root, self.guests.chroot_of(instance)
        if chroot is None:
            return [Room(catalog, memory + disks + MARGIN)]
        inside = Room(chroot, memory + MARGIN)
        apart = chroot.stat().st_dev != catalog.stat().st_dev
        return [inside, Room(catalog, disks + MARGIN + (memory if apart else 0))]

    def _check_writable(self, instance: InstanceId) -> None:
        writer, chroot = self.guests.writer(instance), self.guests.chroot_of(instance)
        title = self.guests.dialect.title
        assert writer.peer is not None
        if chroot is None:
            why = writer.why_shut_out_of(self.guests.catalog, instance)
            if why is not None:
                raise Unsupported(
                    f"{title} runs as user {writer.peer.uid}, which {why}: it could not save the guest. Set the"
                    " backend's snapshot_group to a group that this user is in (see docs), or run it as hypemand's user"
                )
            return
        if why := files.why_not_writable(chroot):
            raise Unsupported(f"hypemand can't make the directory for {title}'s files in {chroot}: {why}")

    def _check_allowed(self, machine: Machine) -> None:
        """Rules are those of when the guest was started, and of the directories as they were then."""
        catalog = self.guests.catalog.root.resolve()
        allowed = machine.may_write
        if allowed is None or any(catalog.is_relative_to(Path(path).resolve()) for path in allowed):
            return
        raise Unsupported(
            f"{self.guests.dialect.title} runs with --landlock, and may not write to {catalog}: it could not save the"
            f" guest. Start it with --landlock-rules path={catalog},access=rw (the directory has to be there by then)"
        )


def _copied_bytes(disks: Sequence[Disk], catalog: Path) -> int:
    return sum(disk.data_bytes for disk in disks if not can_reflink(disk.file, catalog))


def _overlays(disks: Sequence[Disk]) -> list[str]:
    return [
        f"disk {disk.file} is an overlay: a snapshot has what is in it, and needs {disk.backing} as it is now"
        for disk in disks
        if disk.backing
    ]


def _not_known(disks: Sequence[Disk], known: set[Path]) -> list[str]:
    """Disks that a capture of the stopped guest would leave out; none where it is not configured."""
    return [
        f"no pattern of the setting disks fits {disk.file}: a snapshot of the stopped guest would lack it"
        for disk in disks
        if known and disk.file not in known
    ]
