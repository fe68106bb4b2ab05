"""What hypemand writes down of a snapshot in a QEMU guest's disks, and how it goes by that after an interruption."""

from collections.abc import Mapping, Sequence
from datetime import datetime

from attrs import evolve

from hypemand.backends.base import CaptureRequest
from hypemand.backends.catalog import Manifest
from hypemand.backends.qemu_disks import Disk, Entry, delete, dismiss, finished, memory_entry, read_disks
from hypemand.backends.qmp import Monitor
from hypemand.core.model import InstanceId


def save_job(run_id: str) -> str:
    """The id that the run's save has inside QEMU, so that another process finds it."""
    return f"hypemand-{run_id}"


def new_draft(
    instance: InstanceId, request: CaptureRequest, disks: Sequence[Disk], hypervisor: Mapping[str, str]
) -> Manifest:
    """The manifest of a save that is about to begin."""
    return Manifest(
        id=request.run_id,
        instance_id=instance,
        name=request.name,
        kind=request.kind,
        tags=request.tags,
        created_at=request.created_at,
        size_bytes=0,
        hypervisor=hypervisor,
        restore=f"Start QEMU with the guest's own command line and, added to it: -loadvm {request.name}",
        details={"tag": request.name, "disks": [{"node": disk.node, "file": disk.file} for disk in disks]},
    )


def completed(draft: Manifest, entry: Entry) -> Manifest:
    """The draft with what the disks say of the snapshot, so that it can be told from others later."""
    found = {"vm_state_size": entry.vm_state_size, "date_sec": entry.date_sec, "date_nsec": entry.date_nsec}
    return evolve(draft, size_bytes=entry.vm_state_size, details={**draft.details, **found})


def known_entry(manifest: Manifest) -> Entry:
    """What the disks said of the snapshot; in a manifest that was never completed, zeros that fit none."""
    known = manifest.details
    return Entry(manifest.name, *(known.get(key, 0) for key in ("date_sec", "date_nsec", "vm_state_size")))


async def settle_save(
    monitor: Monitor, draft: Manifest, *, not_before: datetime
) -> tuple[Manifest | None, tuple[str, ...]]:
    """Wait until the save of *draft* is over, and see how it ended.

    Disks are told by their files: QEMU may have been started anew since, and
    nodes have new names then.

    Args:
        not_before: A tag dated earlier is somebody else's.

    Returns:
        The completed manifest where the save went well; otherwise None, with
        nothing of it on the guest's disks any more, and what an operator
        should know.
    """
    job = await finished(monitor, save_job(draft.id))
    disks = await read_disks(monitor)
    wanted = {disk["file"] for disk in draft.details.get("disks", ())}
    held = [disk for disk in disks if disk.file in wanted and _is_dated_from(disk.find(draft.name), not_before)]
    entry = memory_entry(held, draft.name)
    if entry is not None and {disk.file for disk in held} == wanted and "error" not in (job or {}):
        await dismiss(monitor, save_job(draft.id))
        return completed(draft, entry), ()
    await clear(monitor, draft.id, draft.name, held)
    absent = sorted(wanted - {disk.file for disk in disks})
    return None, tuple(f"{file} is not attached; snapshot {draft.name} may be left in it" for file in absent)


def _is_dated_from(entry: Entry | None, not_before: datetime) -> bool:
    return entry is not None and entry.date_sec >= int(not_before.timestamp())


async def clear(monitor: Monitor, run_id: str, tag: str, disks: Sequence[Disk]) -> None:
    """Delete a partial snapshot from *disks*. The save's own job goes last: it is the proof that the save failed."""
    if disks:
        await delete(monitor, f"{save_job(run_id)}-clear", tag, disks)
    await dismiss(monitor, save_job(run_id))
