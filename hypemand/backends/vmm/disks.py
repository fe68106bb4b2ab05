"""The disks of a guest, as files of this host, and copies of them. What is not async is blocking."""

import fcntl
import math
import os
import stat
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import trio
from attrs import Factory, frozen

from hypemand.backends.base import BackendUnavailable, CaptureFailed, Meter, Unsupported
from hypemand.backends.copying import copy_file
from hypemand.backends.vmm.dialect import Drive
from hypemand.backends.vmm.views import View
from hypemand.core.size import format_size

_QCOW2 = b"QFI\xfb"
_HEADER = struct.Struct(">4sIQI")
_LONGEST_NAME = 1023
"""Of a backing file, in a qcow2 header."""
_FLOCK = "hhqqi4x"
AT_ONCE = 4
"""So many disks of a guest are copied at the same time."""
TELL_S = 0.1


@frozen
class Disk:
    """A disk that the guest can write to.

    Attributes:
        name: For messages, and in manifests: the VMM's.
        file: A file or a block device, without links.
        data_bytes: What a copy takes, as far as that can be foreseen.
        backing: The file below it, of an overlay; a copy is nothing without that.
    """

    name: str
    file: Path
    size: int
    data_bytes: int
    is_device: bool = False
    backing: str | None = None


Sign = tuple[int, ...]
"""What of a file changes when it is written to, or is another one."""


def disks_of(drives: Iterable[Drive], view: View) -> tuple[Disk, ...]:
    """The files of the writable *drives*, each once.

    Raises:
        Unsupported: One of them can't be copied; the text says what to do.
        BackendUnavailable: It is not seen from here.
    """
    found: dict[Path, Disk] = {}
    for drive in drives:
        if drive.read_only:
            continue
        if drive.path is None:
            raise Unsupported(
                f"disk {drive.name} is served by another process (vhost-user), or has no file:"
                " hypemand can't copy it. Attach it by its path, or read-only"
            )
        disk = read_disk(view.found(drive.path), drive.name)
        found.setdefault(disk.file, disk)
    return tuple(found.values())


def read_disk(file: Path, name: str = "") -> Disk:
    """*file* as a disk.

    Raises:
        Unsupported: It is neither a file nor a block device.
        BackendUnavailable: It can't be read.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError as error:
        raise BackendUnavailable(f"disk {file} can't be read: {error.strerror}") from error
    try:
        status = os.fstat(descriptor)
        is_device = stat.S_ISBLK(status.st_mode)
        if not is_device and not stat.S_ISREG(status.st_mode):
            raise Unsupported(f"disk {file} is neither a file nor a block device: hypemand can't copy it")
        size = os.lseek(descriptor, 0, os.SEEK_END)
        data_bytes = size if is_device else status.st_blocks * 512
        return Disk(name or file.name, file, size, data_bytes, is_device, _backing(descriptor))
    finally:
        os.close(descriptor)


def _backing(descriptor: int) -> str | None:
    header = os.pread(descriptor, _HEADER.size, 0)
    if len(header) < _HEADER.size:
        return None
    magic, _, offset, length = _HEADER.unpack(header)
    if magic != _QCOW2 or not offset or length > _LONGEST_NAME:
        return None
    return os.pread(descriptor, length, offset).decode(errors="surrogateescape")


def signs_of(disks: Iterable[Disk]) -> tuple[Sign, ...]:
    """By which it is told later whether one was written to meanwhile."""
    return tuple(_sign(disk.file.stat()) for disk in disks)


def _sign(status: os.stat_result) -> Sign:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def locked(disks: Iterable[Path]) -> list[str]:
    """Those of *disks* that a process has locked for writing, as Cloud Hypervisor does since version 46."""
    return [str(file) for file in disks if _is_locked(file)]


def _is_locked(file: Path) -> bool:
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        asked = struct.pack(_FLOCK, fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
        with suppress(OSError):  # a filesystem without locks
            (told, *_) = struct.unpack(_FLOCK, fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, asked))
            return bool(told != fcntl.F_UNLCK)
        return False
    finally:
        os.close(descriptor)


def named(disks: Sequence[Disk]) -> Iterator[tuple[str, Disk]]:
    """The name of each copy: two disks may have one name, in two directories."""
    return ((f"{number}-{disk.file.name}", disk) for number, disk in enumerate(disks))


async def copy_disks(disks: Sequence[Disk], directory: Path, meter: Meter, deadline: float | None) -> dict[str, int]:
    """Copy *disks* into *directory*, some at a time: together they take half as long as one after the other.

    Args:
        deadline: On trio's clock; then the copies are ended.

    Returns:
        Sizes by name.

    Raises:
        CaptureFailed: With the reason, and at the deadline.
    """
    meter.total_bytes = sum(disk.data_bytes for disk in disks)
    copies = Copies(directory, meter)
    with trio.CancelScope(deadline=math.inf if deadline is None else deadline):
        await copies.make(disks)
        return copies.sizes
    raise CaptureFailed(over_budget(meter))


def over_budget(meter: Meter) -> str:
    """What became of a capture that had to end with the freeze budget, and what to do."""
    over = "the guest's freeze budget was over when"
    if meter.done_bytes and meter.done_bytes >= meter.total_bytes:
        return f"{over} its disks were copied, and not yet looked at again: their filesystem hangs, or is very slow"
    return (
        f"{over} {format_size(meter.done_bytes)} of {format_size(meter.total_bytes)}"
        " of its disks were copied: raise its max_freeze, or have disks and snapshots on one filesystem that can"
        " reflink (XFS, btrfs)"
    )


@frozen(eq=False)
class Copies:
    """Copies under way. Each has a meter of its own, as it has a thread.

    Attributes:
        sizes: By name, of those that are done.
    """

    directory: Path
    meter: Meter
    sizes: dict[str, int] = Factory(dict)
    _meters: list[Meter] = Factory(list)
    _failures: list[CaptureFailed] = Factory(list)

    async def make(self, disks: Sequence[Disk]) -> None:
        """Copy all, or raise the first failure."""
        at_once = trio.Semaphore(AT_ONCE)
        try:
            async with trio.open_nursery() as telling:
                telling.start_soon(self._tell)
                async with trio.open_nursery() as nursery:
                    for name, disk in named(disks):
                        nursery.start_soon(self._make, name, disk, at_once, nursery.cancel_scope)
                telling.cancel_scope.cancel()
        finally:
            self._sum_up()
        if self._failures:
            raise self._failures[0]

    async def _make(self, name: str, disk: Disk, at_once: trio.Semaphore, others: trio.CancelScope) -> None:
        meter = Meter()
        self._meters.append(meter)
        async with at_once:
            try:
                self.sizes[name] = await copy_file(disk.file, self.directory / name, meter=meter)
            except CaptureFailed as error:
                self._failures.append(error)
                others.cancel()

    async def _tell(self) -> None:
        while True:
            self._sum_up()
            await trio.sleep(TELL_S)

    def _sum_up(self) -> None:
        self.meter.done_bytes = sum(meter.done_bytes for meter in self._meters)


def why_not_writable(directory: Path) -> str | None:
    """Why no file can be made in *directory*, or None."""
    if not directory.is_dir():
        return "it is not there"
    return None if os.access(directory, os.W_OK | os.X_OK) else "it may not be written to"
