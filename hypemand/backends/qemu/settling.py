"""What an interrupted run left in a guest that runs: thawed, its snapshot whole or gone, QEMU's settings as before."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path

import trio
from attrs import frozen

from hypemand.backends.base import BackendUnavailable
from hypemand.backends.catalog import Manifest
from hypemand.backends.qemu import background, images, memory_file, stuck
from hypemand.backends.qemu.disks import Disk, Entry, read_disks
from hypemand.backends.qemu.jobs import delete, dismiss, finished
from hypemand.backends.qemu.manifest import MEMORY, completed, files_of, is_completed, shares
from hypemand.backends.qemu.settings import BACKGROUND
from hypemand.backends.qemu.threads import in_thread
from hypemand.backends.qmp import Monitor
from hypemand.core.model import SnapshotKind

_SAVING_PATIENCE_S = 5.0
_LOOK_S = 0.1


def save_job(run_id: str) -> str:
    """The id that the run's save has inside QEMU, so that another process finds it."""
    return f"hypemand-{run_id}"


@frozen
class Found:
    """How an interrupted capture turned out.

    Attributes:
        whole: Its completed manifest; None: nothing is left of it.
        notes: What an operator should know.
    """

    whole: Manifest | None = None
    notes: tuple[str, ...] = ()


async def thaw(monitor: Monitor, run_id: str) -> bool:
    """Resume the guest if the run's mark says that it stopped it. Returns whether it was found standing still."""
    mark = background.paused_mark(run_id)
    if mark not in await background.marks(monitor):
        return False
    paused: bool = (await monitor.execute("query-status"))["status"] == "paused"
    if paused:
        await background.go_on(monitor)
    await background.unmark(monitor, mark)
    return paused


async def settle_draft(monitor: Monitor, draft: Manifest, memory: Path, *, not_before: datetime) -> Found:
    """Wait until the capture of *draft* is over, and see how it ended; what is partial is deleted.

    Disks are told by their files: QEMU may have been started anew since, and
    nodes have new names then.

    Args:
        memory: The file of a memory that was saved in the background.
        not_before: A tag dated earlier is somebody else's.

    Raises:
        BackendUnavailable: It still goes on.
    """
    in_background = draft.details["mode"] == BACKGROUND
    over = await (_saved(monitor, draft.id, memory) if in_background else _job_went_well(monitor, draft.id))
    disks = await read_disks(monitor)
    size = await in_thread(memory_file.trim, memory)
    found = judge(draft, disks, size, went_well=over, not_before=not_before)
    if found.whole is None:
        await clear(monitor, draft, dated_from(disks, draft, not_before))
        trouble = await stuck.find_stuck(monitor)
        if trouble is not None and trouble.full:
            outcome = await stuck.continue_once(monitor)
            found = Found(notes=(*found.notes, f"there was no room for the guest's writes; {outcome}"))
    await tidy(monitor, draft)
    return found


def judge(draft: Manifest, disks: Iterable[Disk], memory_bytes: int, *, went_well: bool, not_before: datetime) -> Found:
    """Whether the snapshot of *draft* is whole, by what is on *disks*."""
    disks = list(disks)
    if is_completed(draft) and len(shares(disks, draft)) == len(files_of(draft)):
        return Found(draft) if memory_bytes == draft.files.get(MEMORY, 0) else Found()
    held = dated_from(disks, draft, not_before)
    if went_well and not is_completed(draft) and {disk.file for disk in held} == set(files_of(draft)):
        whole = completed(draft, held, memory_bytes)
        if whole.size_bytes or draft.kind is SnapshotKind.STOPPED:
            return Found(whole)
    absent = sorted(set(files_of(draft)) - {disk.file for disk in disks})
    return Found(notes=tuple(f"{file} is not attached; snapshot {draft.name} may be left in it" for file in absent))


def dated_from(disks: Iterable[Disk], draft: Manifest, not_before: datetime) -> list[Disk]:
    """The disks of *draft* that hold a snapshot of its name, made since *not_before*."""
    return [
        disk for disk in disks if disk.file in files_of(draft) and _is_dated_from(disk.find(draft.name), not_before)
    ]


def _is_dated_from(entry: Entry | None, not_before: datetime) -> bool:
    return entry is not None and entry.date_sec >= int(not_before.timestamp())


async def _job_went_well(monitor: Monitor, run_id: str) -> bool:
    job = await finished(monitor, save_job(run_id))
    return "error" not in (job or {})


async def _saved(monitor: Monitor, run_id: str, memory: Path) -> bool:
    """Whether the run's memory save is complete; one that does not advance is ended."""
    first = latest = await background.progress_of(monitor)
    with trio.move_on_after(_SAVING_PATIENCE_S):
        while latest.under_way:
            await trio.sleep(_LOOK_S)
            latest = await background.progress_of(monitor)
        ours = background.saving_mark(run_id) in await background.marks(monitor)
        return ours and background.is_whole(latest, await in_thread(memory_file.size_of, memory))
    if latest.written == first.written:
        await end_save(monitor, memory)
    raise BackendUnavailable(f"its memory is still being saved: {latest.written} of {latest.total} bytes")


async def end_save(monitor: Monitor, memory: Path) -> None:
    """Have the save to *memory* end. A migration of somebody else goes on."""
    before = await in_thread(memory_file.size_of, memory)
    progress = await background.progress_of(monitor)
    if background.is_into(progress, before, await in_thread(memory_file.size_of, memory)):
        await background.end(monitor)


async def clear(monitor: Monitor, draft: Manifest, disks: list[Disk]) -> None:
    """Delete a partial snapshot from *disks*. The save's own job goes last: it is the proof that the save failed."""
    job = f"{save_job(draft.id)}-clear"
    if disks:
        await delete(monitor, job, draft.name, disks)
    await dismiss(monitor, job)  # of a settling that was cut short
    await dismiss(monitor, save_job(draft.id))


async def tidy(monitor: Monitor, draft: Manifest) -> None:
    """Leave no trace of the capture in QEMU itself."""
    await dismiss(monitor, save_job(draft.id))
    if draft.details["mode"] == BACKGROUND:
        await background.set_back(monitor, draft.details["parameters"])
        await background.forget_file(monitor, background.file_name(draft.id))
        for name in (background.saving_mark(draft.id), background.paused_mark(draft.id)):
            await background.unmark(monitor, name)


async def settle_stopped(disks: Sequence[Disk], draft: Manifest, memory: Path, *, not_before: datetime) -> Found:
    """The same for a guest whose QEMU has ended: what it had not finished by then never will be."""
    went_well = draft.details["mode"] != BACKGROUND
    size = await in_thread(memory_file.size_of, memory)
    found = judge(draft, disks, size, went_well=went_well, not_before=not_before)
    if found.whole is None:
        for disk in dated_from(disks, draft, not_before):
            await images.delete(disk, draft.name)
    return found
