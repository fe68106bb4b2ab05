"""The disks of a guest and the snapshots inside them, and what QEMU says of them.

Which snapshot is whose is decided by the manifest; here are the means to tell.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import trio
from attrs import frozen

from hypemand.backends.base import BackendUnavailable, CaptureFailed, Unsupported
from hypemand.backends.qemu.names import is_remote, is_temporary, lasting_names
from hypemand.backends.qemu.threads import limiter_of
from hypemand.backends.qmp import Monitor

QCOW2 = "qcow2"
_JOB_FILTERS = frozenset({"copy-before-write", "backup-top", "mirror_top", "commit_top", "copy-on-read"})


@frozen
class Entry:
    """A snapshot as a qcow2 disk lists it.

    QEMU numbers them anew, and operators may give a name again: name, date
    and size together tell one from another.
    """

    tag: str
    date_sec: int
    date_nsec: int
    vm_state_size: int


def entry_of(listed: Mapping[str, Any]) -> Entry:
    """The entry that QEMU and qemu-img list in the same words."""
    return Entry(listed["name"], listed["date-sec"], listed["date-nsec"], listed["vm-state-size"])


@frozen
class Disk:
    """A writable disk.

    Attributes:
        device: For messages.
        node: QEMU's name for it until it ends; empty where no QEMU runs.
        file: Lasts, and is the same whether QEMU runs or not; absolute where it is a file that is seen from here.
        out_of_room: Whether the guest's last write failed for lack of space.
        is_remote: Whether it is reached over a network protocol of QEMU's own.
        is_temporary: Whether what is written to it goes when QEMU ends.
    """

    device: str
    node: str
    file: str
    format: str
    entries: tuple[Entry, ...] = ()
    out_of_room: bool = False
    is_remote: bool = False
    is_temporary: bool = False

    def find(self, tag: str) -> Entry | None:
        """The first of that name: the one that QEMU loads and deletes, should there be more."""
        return next((entry for entry in self.entries if entry.tag == tag), None)


async def read_disks(monitor: Monitor) -> tuple[Disk, ...]:
    """The writable disks in QEMU's order; read-only ones and empty drives are no part of a snapshot.

    Raises:
        BackendUnavailable: A job has put itself over a disk, so that its snapshots can't be seen.
    """
    blocks = await monitor.execute("query-block")
    writable = [block for block in blocks if "inserted" in block and not block["inserted"]["ro"]]
    for block in writable:
        if (driver := block["inserted"]["drv"]) in _JOB_FILTERS:
            raise BackendUnavailable(
                f"somebody else's job ({driver}) is at work on disk {block['inserted']['file']}:"
                " its snapshots can be seen again when it is over"
            )
    names = [block["inserted"]["file"] for block in writable]
    files = await trio.to_thread.run_sync(
        lasting_names, monitor.peer_process(), names, abandon_on_cancel=True, limiter=limiter_of(" ".join(names))
    )
    return tuple(_disk(block, file) for block, file in zip(writable, files, strict=True))


def _disk(block: Mapping[str, Any], file: str) -> Disk:
    inserted = block["inserted"]
    node = inserted.get("node-name", "")
    return Disk(
        device=block["device"] or block.get("qdev") or node,
        node=node,
        file=file,
        format=inserted["drv"],
        entries=tuple(entry_of(found) for found in inserted["image"].get("snapshots", ())),
        out_of_room=block.get("io-status") == "nospace",
        is_remote=is_remote(inserted["file"]),
        is_temporary=is_temporary(file),
    )


def check_capturable(disks: Sequence[Disk], way_out: str = "attach it read-only") -> None:
    """Raise `Unsupported` unless a snapshot of *disks* holds the whole guest, and could be loaded again."""
    if not disks:
        raise Unsupported("it has no writable disk to hold a snapshot: attach one in qcow2 format")
    other = [f"{disk.device} ({disk.file}, {disk.format})" for disk in disks if disk.format != QCOW2]
    if other:
        raise Unsupported(
            f"writable but not qcow2: {', '.join(other)}; convert it (qemu-img convert -O qcow2) or {way_out}"
        )
    temporary = [disk.device for disk in disks if disk.is_temporary]
    if temporary:
        raise Unsupported(
            f"what the guest writes to {', '.join(temporary)} is not kept (-snapshot, snapshot=on):"
            " nor would a snapshot of it"
        )
    remote = [f"{disk.device} ({disk.file})" for disk in disks if disk.is_remote]
    if remote:
        raise Unsupported(
            f"writable over the network, where no snapshot can grow: {', '.join(remote)};"
            f" copy it to a qcow2 file (qemu-img convert -O qcow2) or {way_out}"
        )


def check_free(disks: Sequence[Disk], tag: str) -> None:
    """Raise `CaptureFailed` where a disk has a snapshot called *tag* already."""
    if holders := [disk.device for disk in disks if disk.find(tag)]:
        raise CaptureFailed(f"there is a snapshot {tag} already, on {', '.join(holders)}")
