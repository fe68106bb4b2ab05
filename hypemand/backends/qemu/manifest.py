"""What hypemand writes down of a snapshot of a QEMU guest, and how it knows that snapshot again."""

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import evolve

from hypemand.backends.base import CaptureFailed, CaptureRequest
from hypemand.backends.catalog import Manifest
from hypemand.backends.qemu.disks import Disk, Entry
from hypemand.backends.qemu.settings import BACKGROUND, INTERNAL
from hypemand.core.model import Freezer, InstanceId, RestoreAction, RestoreStep, SnapshotKind

STOPPED = "stopped"
MEMORY = "memory"
"""The file in the catalog that holds the memory of a guest captured in the background."""


def mode_of(request: CaptureRequest) -> str:
    """How *request* is captured: internal, background or stopped."""
    if request.kind is SnapshotKind.STOPPED:
        return STOPPED
    return BACKGROUND if request.freezes is Freezer.ENGINE else INTERNAL


def new_draft(
    instance: InstanceId,
    request: CaptureRequest,
    disks: Sequence[Disk],
    hypervisor: Mapping[str, str],
    *,
    home: Path,
) -> Manifest:
    """The manifest of a capture that is about to begin.

    Args:
        home: Where the snapshot will be in the catalog.
    """
    mode, files = mode_of(request), [disk.file for disk in disks]
    return Manifest(
        id=request.run_id,
        instance_id=instance,
        name=request.name,
        kind=request.kind,
        tags=request.tags,
        created_at=request.created_at,
        size_bytes=0,
        hypervisor=hypervisor,
        restore=_restore(mode, request.name, files, home / MEMORY),
        details={"mode": mode, "disks": [{"file": file} for file in files]},
    )


def _restore(mode: str, tag: str, files: Sequence[str], memory: Path) -> tuple[RestoreStep, ...]:
    if mode == INTERNAL:
        return (RestoreStep(RestoreAction.START, f"-loadvm {tag}"),)
    reverted = [RestoreStep(RestoreAction.RUN, f"qemu-img snapshot -a {tag} {shlex.quote(file)}") for file in files]
    if mode == STOPPED:
        return (*reverted, RestoreStep(RestoreAction.START, ""))
    incoming = shlex.quote(f"exec:cat {shlex.quote(str(memory))}")
    return (
        *reverted,
        RestoreStep(RestoreAction.START, f"-incoming {incoming}"),
        # It was saved while it stood still, and comes up so.
        RestoreStep(RestoreAction.MONITOR, json.dumps({"execute": "cont"})),
    )


def completed(draft: Manifest, disks: Iterable[Disk], memory_bytes: int = 0) -> Manifest:
    """The draft with what the disks say of the snapshot, so that it can be told from others later.

    Raises:
        CaptureFailed: It is not on every disk.
    """
    entries = {disk.file: disk.find(draft.name) for disk in disks}
    found, size = [], memory_bytes
    for file in files_of(draft):
        entry = entries.get(file)
        if entry is None:
            raise CaptureFailed(f"QEMU reports success, but there is no snapshot {draft.name} on {file}")
        numbers = {"date_sec": entry.date_sec, "date_nsec": entry.date_nsec, "vm_state_size": entry.vm_state_size}
        found.append({"file": file, **numbers})
        size += entry.vm_state_size
    files = {MEMORY: memory_bytes} if memory_bytes else {}
    return evolve(draft, size_bytes=size, files=files, details={**draft.details, "disks": found})


def is_completed(manifest: Manifest) -> bool:
    """Whether it says what the disks said, and is no mere draft."""
    return all("date_sec" in disk for disk in manifest.details["disks"])


def files_of(manifest: Manifest) -> list[str]:
    """The disks that were captured; the first is the one that would hold the memory."""
    return [disk["file"] for disk in manifest.details["disks"]]


def shares(disks: Iterable[Disk], manifest: Manifest) -> list[Disk]:
    """The disks that hold a share in the snapshot, in the manifest's order; another one by its name is none."""
    by_file = {disk.file: disk for disk in disks}
    return [
        disk
        for known in manifest.details["disks"]
        if (disk := by_file.get(known["file"])) is not None and _is_of(disk.find(manifest.name), known)
    ]


def _is_of(entry: Entry | None, known: Mapping[str, Any]) -> bool:
    if entry is None or "date_sec" not in known:
        return False
    return entry == Entry(entry.tag, known["date_sec"], known["date_nsec"], known["vm_state_size"])


def is_listed(disks: Iterable[Disk], manifest: Manifest) -> bool:
    """Whether the snapshot is there. The first disk tells: it is deleted from that one last."""
    first = files_of(manifest)[:1]
    return any(disk.file in first for disk in shares(disks, manifest))
