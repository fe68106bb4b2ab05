"""The disks of a QEMU guest and the snapshots inside them: what QEMU says of them, and the jobs that change them.

Which snapshot is whose is decided in `qemu` and `qemu_manifest`; here are the means to tell.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import trio
from attrs import frozen

from hypemand.backends.base import BackendError, CaptureFailed, Unsupported
from hypemand.backends.qmp import Monitor, QmpError

_POLL_S = 0.5


@frozen
class Entry:
    """A snapshot as a qcow2 disk lists it.

    QEMU numbers them anew, and operators may give a name again: the date and
    the size together tell one from another. Every disk of one snapshot has
    the same date; the memory, and so the size, is on one of them.
    """

    tag: str
    date_sec: int
    date_nsec: int
    vm_state_size: int

    def is_of(self, whole: "Entry") -> bool:
        """Whether this is a disk's share in the snapshot whose memory is *whole*."""
        same_date = (self.date_sec, self.date_nsec) == (whole.date_sec, whole.date_nsec)
        return same_date and self.tag == whole.tag and self.vm_state_size in (0, whole.vm_state_size)


@frozen
class Disk:
    """A writable disk. *device* is for messages; *node* is QEMU's name for it until it ends, *file* lasts."""

    device: str
    node: str
    file: str
    format: str
    entries: tuple[Entry, ...] = ()

    def find(self, tag: str) -> Entry | None:
        """The first of that name: the one that QEMU loads and deletes, should there be more."""
        return next((entry for entry in self.entries if entry.tag == tag), None)


async def read_disks(monitor: Monitor) -> tuple[Disk, ...]:
    """The writable disks in QEMU's order; read-only ones and empty drives are no part of a snapshot."""
    blocks = await monitor.execute("query-block")
    return tuple(_disk(block) for block in blocks if "inserted" in block and not block["inserted"]["ro"])


def _disk(block: Mapping[str, Any]) -> Disk:
    inserted = block["inserted"]
    node = inserted.get("node-name", "")
    return Disk(
        device=block["device"] or block.get("qdev") or node,
        node=node,
        file=inserted["file"],
        format=inserted["drv"],
        entries=tuple(
            Entry(found["name"], found["date-sec"], found["date-nsec"], found["vm-state-size"])
            for found in inserted["image"].get("snapshots", ())
        ),
    )


def check_capturable(disks: Sequence[Disk]) -> None:
    """Raise `Unsupported` unless a snapshot of *disks* holds the whole guest, and could be loaded again."""
    if not disks:
        raise Unsupported("it has no writable disk to hold a snapshot: attach one in qcow2 format")
    other = [f"{disk.device} ({disk.file}, {disk.format})" for disk in disks if disk.format != "qcow2"]
    if other:
        raise Unsupported(
            f"writable but not qcow2: {', '.join(other)}; convert it (qemu-img convert -O qcow2) or attach it read-only"
        )


def shares(disks: Iterable[Disk], whole: Entry) -> list[Disk]:
    """The disks that hold a share in the snapshot *whole*."""
    return [disk for disk in disks if (entry := disk.find(whole.tag)) is not None and entry.is_of(whole)]


def memory_entry(disks: Iterable[Disk], tag: str) -> Entry | None:
    """The entry called *tag* that has the memory in it."""
    found = (disk.find(tag) for disk in disks)
    return next((entry for entry in found if entry is not None and entry.vm_state_size > 0), None)


async def save(monitor: Monitor, job_id: str, tag: str, disks: Sequence[Disk]) -> tuple[Entry, float | None]:
    """Save memory and *disks* as *tag*; QEMU stops the guest and resumes it by itself. The job is left undismissed.

    Returns:
        The entry with the memory, and for how many seconds the guest stood
        still: 0 when it was paused already, None when it was not resumed.

    Raises:
        CaptureFailed: With QEMU's reason. Part of it may be left on the disks.
    """
    before = len(monitor.events)
    nodes = [disk.node for disk in disks]
    try:
        await monitor.execute("snapshot-save", job_id=job_id, tag=tag, vmstate=nodes[0], devices=nodes)
    except QmpError as error:
        raise CaptureFailed(str(error)) from error
    job = await finished(monitor, job_id)
    if job is None or "error" in job:
        raise CaptureFailed(
            f"QEMU: {job['error']}" if job else "somebody dismissed the job before its verdict was read"
        )
    now = await read_disks(monitor)
    entry = memory_entry(now, tag)
    if entry is None or not set(nodes) <= {disk.node for disk in shares(now, entry)}:
        raise CaptureFailed(f"QEMU reports success, but {tag} is not on every disk")
    return entry, _frozen_s(monitor, before)


def _frozen_s(monitor: Monitor, first_event: int) -> float | None:
    stopped_at = None
    for event in monitor.events[first_event:]:
        if event.name == "STOP":
            stopped_at = event.at_s
        elif event.name == "RESUME" and stopped_at is not None:
            return max(0.0, event.at_s - stopped_at)
    return 0.0 if stopped_at is None else None


async def delete(monitor: Monitor, job_id: str, tag: str, disks: Sequence[Disk]) -> None:
    """Delete *tag* from *disks*, whoever made it. Not there: no error.

    Raises:
        BackendError: With QEMU's reason.
    """
    if await finished(monitor, job_id) is not None:
        await dismiss(monitor, job_id)  # left by an attempt that was cancelled
    await monitor.execute("snapshot-delete", job_id=job_id, tag=tag, devices=[disk.node for disk in disks])
    job = await finished(monitor, job_id)
    await dismiss(monitor, job_id)
    if job is not None and "error" in job:
        raise BackendError(f"QEMU could not delete snapshot {tag}: {job['error']}")


async def finished(monitor: Monitor, job_id: str) -> Mapping[str, Any] | None:
    """The job as QEMU tells it, once it is over; None when there is none. It succeeded where ``error`` is absent."""
    while True:
        jobs: list[dict[str, Any]] = await monitor.execute("query-jobs")
        job = next((job for job in jobs if job["id"] == job_id), None)
        if job is None or job["status"] == "concluded":
            return job
        with trio.move_on_after(_POLL_S):
            await monitor.wait_event("JOB_STATUS_CHANGE", id=job_id, status="concluded")


async def dismiss(monitor: Monitor, job_id: str) -> None:
    """Have QEMU forget a job that is over. There is none: no error."""
    with suppress(QmpError):
        await monitor.execute("job-dismiss", id=job_id)
