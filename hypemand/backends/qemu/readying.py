"""What a capture needs to have ready: its draft in the catalog and, for a save in the background, the memory file."""

import os
import threading
from collections.abc import Sequence
from pathlib import Path

from attrs import evolve, frozen

from hypemand.backends.base import CaptureFailed, CaptureRequest, InvalidState
from hypemand.backends.catalog import Catalog, Manifest, sync_tree
from hypemand.backends.qemu import background, memory_file
from hypemand.backends.qemu.disks import Disk, check_capturable, check_free, read_disks
from hypemand.backends.qemu.jobs import check_alone
from hypemand.backends.qemu.manifest import MEMORY, new_draft
from hypemand.backends.qemu.preparing import memory_estimate
from hypemand.backends.qemu.threads import in_thread
from hypemand.backends.qmp import Monitor
from hypemand.core.model import InstanceId


@frozen
class Ready:
    """What was made ready for a capture in the background, so that nothing has to be read while the guest stands still.

    Attributes:
        uri: By which QEMU knows the memory file that it was handed.
        events: How many events there were right before our stop.
    """

    draft: Manifest
    disks: Sequence[Disk]
    uri: str
    events: int = 0


async def make_ready(monitor: Monitor, catalog: Catalog, instance: InstanceId, request: CaptureRequest) -> Ready:
    """Draft, memory file with its room taken, and QEMU set up; a mark inside it says whose save is to come."""
    await check_alone(monitor, CaptureFailed)
    disks = await capturable_disks(monitor, request)
    draft = await draft_of(monitor, catalog, instance, request, disks)
    to_come = {"parameters": await background.parameters(monitor), "memory_bytes": await memory_estimate(monitor)}
    draft = evolve(draft, details={**draft.details, **to_come})
    await write_draft(catalog, draft)
    await background.set_up(monitor)
    path = catalog.partial(instance, request.run_id) / MEMORY
    descriptor = await _open_reserved(path, draft.details["memory_bytes"])
    try:
        uri = await background.pass_file(monitor, descriptor, background.file_name(request.run_id))
    finally:
        os.close(descriptor)
    await background.mark(monitor, background.saving_mark(request.run_id))
    return Ready(draft, disks, uri)


async def _open_reserved(path: Path, size: int) -> int:
    """`memory_file.open_reserved`; nobody waits for a thread that is left behind, so it has to close by itself."""
    given_up = threading.Event()

    def work() -> int:
        descriptor = memory_file.open_reserved(path, size)
        if given_up.is_set():
            os.close(descriptor)
        return descriptor

    try:
        return await in_thread(work)
    except BaseException:
        given_up.set()
        raise


async def capturable_disks(monitor: Monitor, request: CaptureRequest) -> Sequence[Disk]:
    """The guest's disks, which can hold a snapshot by the name of *request*."""
    disks = await read_disks(monitor)
    check_capturable(disks)
    check_free(disks, request.name)
    return disks


async def draft_of(
    monitor: Monitor, catalog: Catalog, instance: InstanceId, request: CaptureRequest, disks: Sequence[Disk]
) -> Manifest:
    """The manifest of a capture that is to come."""
    uuid = (await monitor.execute("query-uuid"))["UUID"]
    hypervisor = {"name": "qemu", "version": monitor.version, "uuid": uuid}
    home = catalog.home(instance, request.run_id)
    return new_draft(instance, request, disks, hypervisor, home=home)


async def write_draft(catalog: Catalog, draft: Manifest) -> None:
    """The draft comes before all else, so that a tag found later is known for ours."""
    await in_thread(_begin, catalog, draft)


def _begin(catalog: Catalog, draft: Manifest) -> None:
    directory = catalog.begin(draft.instance_id, draft.id)
    catalog.write_manifest(draft)
    # After a power failure a tag on the disks must not be without it.
    sync_tree(directory)
    sync_tree(directory.parent, deep=False)
    sync_tree(catalog.root, deep=False)


async def check_running(monitor: Monitor) -> None:
    """Refuse a guest that does not run.

    Raises:
        InvalidState: With QEMU's word for its state.
    """
    match (await monitor.execute("query-status"))["status"]:
        case "running":
            pass
        case "paused":
            raise InvalidState("somebody else has paused the guest")
        case word:
            raise InvalidState(f"QEMU is in state {word}: only a running guest can be paused")
