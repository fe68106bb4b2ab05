"""What changes a running guest, or finds it being changed: QEMU's jobs for snapshots, and whose work is under way."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import trio

from hypemand.backends.base import BackendError, BackendUnavailable, CaptureFailed
from hypemand.backends.qemu.disks import Disk
from hypemand.backends.qmp import Event, Monitor, QmpError

OURS = "hypemand-"
"""Every job and object of hypemand in a QEMU is called so."""
_POLL_S = 0.5
_OVER = frozenset({"concluded", "null"})
_NOT_MIGRATING = frozenset({None, "none", "completed", "failed", "cancelled"})


class NameTaken(CaptureFailed):
    """There is a snapshot of that name already. Nothing was made."""


async def check_alone(monitor: Monitor, error: type[BackendError] = BackendUnavailable) -> None:
    """Raise *error* where somebody else has a job or a migration under way in this QEMU, by its name."""
    for job in await monitor.execute("query-jobs"):
        if not job["id"].startswith(OURS) and job["status"] not in _OVER:
            raise error(
                f"QEMU is at somebody else's job: {job['id']!r} ({job['type']}, {job['status']});"
                " it is left alone, and no snapshot is taken meanwhile"
            )
    status = (await monitor.execute("query-migrate")).get("status")
    if is_migrating(status):
        raise error(f"QEMU is at a migration ({status}); it is left alone, and no snapshot is taken meanwhile")


def is_migrating(status: str | None) -> bool:
    """Whether that status of ``query-migrate`` is one of a migration under way."""
    return status not in _NOT_MIGRATING


async def save(monitor: Monitor, job_id: str, tag: str, disks: Sequence[Disk]) -> None:
    """Save memory and *disks* as *tag*; QEMU stops the guest and resumes it by itself. The job is left undismissed.

    The memory goes to the first of them.

    Raises:
        CaptureFailed: With QEMU's reason. Part of it may be left on the disks.
    """
    nodes = [disk.node for disk in disks]
    try:
        await monitor.execute("snapshot-save", job_id=job_id, tag=tag, vmstate=nodes[0], devices=nodes)
    except QmpError as error:
        raise CaptureFailed(str(error)) from error
    job = await finished(monitor, job_id)
    if job is not None and "already exists" in job.get("error", ""):
        raise NameTaken(f"QEMU: {job['error']}")
    if job is None or "error" in job:
        raise CaptureFailed(
            f"QEMU: {job['error']}" if job else "somebody dismissed the job before its verdict was read"
        )


async def snapshot_disks(monitor: Monitor, tag: str, disks: Sequence[Disk]) -> None:
    """Make a snapshot of all *disks* as they are at this moment, or of none.

    Raises:
        CaptureFailed: With QEMU's reason.
    """
    actions = [
        {"type": "blockdev-snapshot-internal-sync", "data": {"device": disk.node, "name": tag}} for disk in disks
    ]
    try:
        await monitor.execute("transaction", actions=actions)
    except QmpError as error:
        raise CaptureFailed(str(error)) from error


def frozen_s(events: Sequence[Event]) -> float | None:
    """How long the guest stood still, by the last stop among *events*: 0 without one, None when it still does."""
    stopped_at = resumed_at = None
    for event in events:
        if event.name == "STOP":
            stopped_at, resumed_at = event.at_s, None
        elif event.name == "RESUME" and resumed_at is None:
            resumed_at = event.at_s
    if stopped_at is None:
        return 0.0
    return None if resumed_at is None else max(0.0, resumed_at - stopped_at)


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
