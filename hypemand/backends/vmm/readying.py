"""What is there before a guest is paused: directories for its snapshot, and what is known of its VMM and its disks."""

from collections.abc import Sequence
from pathlib import Path

from attrs import frozen

from hypemand.backends.base import BackendUnavailable, CaptureFailed, CaptureRequest, Unsupported
from hypemand.backends.vmm.dialect import Identity, Machine
from hypemand.backends.vmm.disks import Disk, check_qcow2, disks_of
from hypemand.backends.vmm.guests import SAVED, Guests
from hypemand.backends.vmm.leftovers import remove, sweep
from hypemand.backends.vmm.manifest import DISKS
from hypemand.backends.vmm.rights import Writer
from hypemand.backends.vmm.rooms import reserve
from hypemand.core.model import InstanceId

MARGIN = 16 << 20
"""For the state of devices, and for the manifest."""
ROOM = "room"
"""A file of a snapshot that is built: it holds the room for what is still in another filesystem."""


@frozen
class Ready:
    """What is ready for a capture.

    Attributes:
        partial: The directory of the snapshot in the catalog.
        saving: Where the VMM writes; elsewhere than in *partial* where it can't get there.
        machine: The guest as it was when this was made ready.
        disks: Its disks.
    """

    request: CaptureRequest
    partial: Path
    saving: Path
    writer: Writer
    identity: Identity
    machine: Machine
    disks: Sequence[Disk]


async def make_ready(guests: Guests, instance: InstanceId, request: CaptureRequest, machine: Machine) -> Ready:
    """Make the directories for the capture of a guest that consists of *machine*.

    Raises:
        CaptureFailed: With the reason.
    """
    if machine.refusals:
        raise CaptureFailed("; ".join(machine.refusals))
    identity = await guests.dialect.identify(guests.client(instance))
    try:
        return await guests.threads.do(_made_ready, guests, instance, request, identity, machine)
    except (BackendUnavailable, Unsupported) as error:
        raise CaptureFailed(f"the capture can't be made ready: {error}") from error


def _made_ready(
    guests: Guests, instance: InstanceId, request: CaptureRequest, identity: Identity, machine: Machine
) -> Ready:
    disks, writer = disks_of(machine.drives, guests.view(instance)), guests.writer(instance)
    check_limit(guests, writer, machine)
    check_qcow2(disks, guests.dialect, identity)
    partial = begun(guests, instance, request)
    saving = guests.saving(instance, request.run_id)
    if saving.parent != partial:
        (partial / SAVED).mkdir(mode=0o700)
        sweep(saving.parent)
        remove(saving)
        if saving.parent.stat().st_dev != partial.stat().st_dev:
            reserve(partial / ROOM, machine.memory_bytes)
    writer.make_directory(saving)
    return Ready(request, partial, saving, writer, identity, machine, disks)


def check_limit(guests: Guests, writer: Writer, machine: Machine) -> None:
    """Make sure that the VMM outlives its own save. Blocking.

    Raises:
        Unsupported: It would not.
    """
    if why := writer.why_too_small(machine.memory_bytes + MARGIN):
        raise Unsupported(f"{guests.dialect.title} {why}")


def begun(guests: Guests, instance: InstanceId, request: CaptureRequest) -> Path:
    """The directory of a snapshot that has nothing in it yet. Blocking."""
    partial = guests.catalog.begin(instance, request.run_id)
    (partial / DISKS).mkdir(mode=0o700)
    return partial
