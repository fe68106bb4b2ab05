"""A capture of a guest without a VMM: copies of its disks, while nothing uses them.

That is told by its socket, by locks, and by the files themselves, before the
copy and after it.
"""

from collections.abc import Iterable
from pathlib import Path

from hypemand.backends.base import BackendUnavailable, CaptureFailed, CaptureRequest
from hypemand.backends.vmm import disks as files
from hypemand.backends.vmm.client import SocketAbsent
from hypemand.backends.vmm.dialect import Identity, Machine
from hypemand.backends.vmm.disks import Disk
from hypemand.backends.vmm.guests import SAVED, Guests
from hypemand.backends.vmm.manifest import DISKS
from hypemand.backends.vmm.readying import Ready, begun
from hypemand.backends.vmm.rights import Writer
from hypemand.core.model import InstanceId


async def copy_stopped(guests: Guests, instance: InstanceId, request: CaptureRequest) -> tuple[Ready, dict[str, int]]:
    """Copy the disks that the settings lead to.

    Returns:
        Where to, with sizes by name.

    Raises:
        CaptureFailed: The guest runs, or did so meanwhile.
    """
    found = await _unused_disks(guests, instance)
    signs = await guests.threads.do(files.signs_of, found)
    partial = await guests.threads.do(begun, guests, instance, request)
    sizes = await files.copy_disks(found, partial / DISKS, request.meter)
    if signs != await guests.threads.do(files.signs_of, found):
        raise CaptureFailed("a disk was written to while it was copied: something uses the disks of this guest")
    try:
        await _unused_disks(guests, instance)
    except BackendUnavailable as error:
        raise CaptureFailed(f"its disks were copied, but may have been in use: {error}") from error
    return Ready(request, partial, partial / SAVED, Writer(None), Identity(), Machine((), 0), found), sizes


async def _unused_disks(guests: Guests, instance: InstanceId) -> tuple[Disk, ...]:
    try:
        look = await guests.dialect.look(guests.client(instance))
    except SocketAbsent as absent:
        paths = await guests.files_of_stopped(instance, absent)
    else:
        raise CaptureFailed(f"instance is {look} now, it was Stopped when its run began")
    return await guests.threads.do(read_disks, guests, instance, paths)


def read_disks(guests: Guests, instance: InstanceId, paths: Iterable[Path]) -> tuple[Disk, ...]:
    """The disks at *paths*, which the settings lead to. Blocking."""
    root, qcow2 = guests.chroot_of(instance), guests.dialect.knows_qcow2
    return tuple(files.read_disk(path, root=root, qcow2=qcow2) for path in paths)
