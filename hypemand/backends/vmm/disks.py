"""The disks of a guest, as files of this host, and copies of them. What is not async is blocking."""

import fcntl
import os
import stat
import struct
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import trio
from attrs import Factory, field, frozen

from hypemand.backends.base import BackendUnavailable, CaptureFailed, Unsupported
from hypemand.backends.copying import copy_file
from hypemand.backends.meter import Meter
from hypemand.backends.vmm.dialect import Dialect, Drive, Identity
from hypemand.backends.vmm.handles import Handle, check_same, files_of_process, held, held_below
from hypemand.backends.vmm.handles import Identity as FileIdentity
from hypemand.backends.vmm.handles import identity as identity_of
from hypemand.backends.vmm.rights import overflow_uid
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
        is_qcow2: An image of that kind.
        backing: The file below it, of an overlay; a copy is nothing without that.
        handle: What was found at *file*, and is what is copied; None: whatever has that name then.
        root: The VMM's root directory, where *file* is below it and that is not ours.
        owner: User and group, where they can be told from here.
        mode: In octal digits.
    """

    name: str
    file: Path
    size: int
    data_bytes: int
    is_device: bool = False
    is_qcow2: bool = False
    backing: str | None = None
    handle: Handle | None = field(default=None, eq=False, repr=False)
    root: Path | None = None
    owner: tuple[int, int] | None = None
    mode: str = "600"


Sign = tuple[int, ...]
"""What of a file changes when it is written to, or is another one."""


def disks_of(drives: Iterable[Drive], view: View) -> tuple[Disk, ...]:
    """The files of the writable *drives*, each once.

    Raises:
        Unsupported: One of them can't be copied; the text says what to do.
        BackendUnavailable: It is not seen from here.
    """
    found: dict[Path, Disk] = {}
    opened = files_of_process(view.peer.pid) if view.peer is not None else None
    for drive in drives:
        if drive.read_only:
            continue
        if drive.path is None:
            raise Unsupported(
                f"disk {drive.name} is served by another process (vhost-user), or has no file:"
                " hypemand can't copy it. Attach it by its path, or read-only"
            )
        handle, path = view.held(drive.path)
        disk = _read(handle, path, drive.name, view.chroot, qcow2=drive.may_be_qcow2)
        _check_open(disk, opened)
        found.setdefault(disk.file, disk)
    return tuple(found.values())


def check_qcow2(disks: Iterable[Disk], dialect: Dialect, identity: Identity) -> None:
    """Make sure that copies of *disks* have all that the guest has written.

    Raises:
        Unsupported: One is an image that the VMM keeps part of in its memory.
    """
    for disk in disks:
        if disk.is_qcow2 and (why := dialect.why_no_qcow2(identity.version)):
            raise Unsupported(f"disk {disk.file}: {why}")


def _check_open(disk: Disk, opened: Collection[FileIdentity] | None) -> None:
    """Where that is seen: a guest goes on with its disk whatever takes the name of it."""
    if opened is not None and disk.handle is not None and identity_of(disk.handle.status()) not in opened:
        raise Unsupported(
            f"the guest runs with another file than {disk.file}, which was put in the place of its disk {disk.name}:"
            " put the guest's own back, or start it anew"
        )


def read_disk(file: Path, name: str = "", *, root: Path | None = None, qcow2: bool = False) -> Disk:
    """*file*, a path without links, as a disk.

    Args:
        root: Nothing leads out of it, where *file* is below.
        qcow2: Whether it is an image of that kind, if it looks like one.

    Raises:
        Unsupported: It is neither a file nor a block device.
        BackendUnavailable: It can't be read.
    """
    try:
        if root is None or not file.is_relative_to(root):
            return _read(held(file), file, name, None, qcow2=qcow2)
        handle, path = held_below(root, str(file.relative_to(root)))
        return _read(handle, path, name, root, qcow2=qcow2)
    except OSError as error:
        raise BackendUnavailable(f"disk {file} can't be read: {error.strerror}") from error


def _read(handle: Handle, file: Path, name: str, root: Path | None, *, qcow2: bool) -> Disk:
    status = handle.status()
    is_device = stat.S_ISBLK(status.st_mode)
    if not is_device and not stat.S_ISREG(status.st_mode):
        raise Unsupported(f"disk {file} is neither a file nor a block device: hypemand can't copy it")
    try:
        opened = handle.opened()
    except OSError as error:
        raise BackendUnavailable(f"disk {file} can't be read: {error.strerror}") from error
    size = os.lseek(opened.fileno(), 0, os.SEEK_END)
    data_bytes = size if is_device else status.st_blocks * 512
    is_qcow2 = qcow2 and os.pread(opened.fileno(), len(_QCOW2), 0) == _QCOW2
    backing = _backing(opened.fileno()) if is_qcow2 else None
    return Disk(
        name or file.name,
        file,
        size,
        data_bytes,
        is_device,
        is_qcow2,
        backing,
        opened,
        root,
        owner=None if overflow_uid() in (status.st_uid, status.st_gid) else (status.st_uid, status.st_gid),
        mode=f"{stat.S_IMODE(status.st_mode):o}",
    )


def _backing(descriptor: int) -> str | None:
    header = os.pread(descriptor, _HEADER.size, 0)
    if len(header) < _HEADER.size:
        return None
    _, _, offset, length = _HEADER.unpack(header)
    if not offset or length > _LONGEST_NAME:
        return None
    name = os.pread(descriptor, length, offset).decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def signs_of(disks: Iterable[Disk]) -> tuple[Sign, ...]:
    """By which it is told later whether one was written to meanwhile.

    Raises:
        CaptureFailed: One has another file at its path.
    """
    return tuple(map(_sign, disks))


def _sign(disk: Disk) -> Sign:
    if disk.handle is None:
        status = disk.file.stat()
    else:
        status = disk.handle.status()
        try:
            check_same(disk.handle, disk.file, disk.root)
        except BackendUnavailable as error:
            raise CaptureFailed(str(error)) from error
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def locked(disks: Iterable[Path]) -> list[str]:
    """Those of *disks* that a process has locked for writing, as Cloud Hypervisor does since version 46."""
    return [str(file) for file in disks if _is_locked(file)]


def _is_locked(file: Path) -> bool:
    handle = held(file)
    if not stat.S_ISREG(handle.status().st_mode) and not stat.S_ISBLK(handle.status().st_mode):
        return False  # nobody's disk, as whoever reads it as one says; to open it may take for ever
    asked = struct.pack(_FLOCK, fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
    with suppress(OSError):  # a filesystem without locks
        (told, *_) = struct.unpack(_FLOCK, fcntl.fcntl(handle.opened(), fcntl.F_OFD_GETLK, asked))
        return bool(told != fcntl.F_UNLCK)
    return False


def named(disks: Sequence[Disk]) -> Iterator[tuple[str, Disk]]:
    """The name of each copy: two disks may have one name, in two directories."""
    return ((f"{number}-{disk.file.name}", disk) for number, disk in enumerate(disks))


async def copy_disks(disks: Sequence[Disk], directory: Path, meter: Meter) -> dict[str, int]:
    """Copy *disks* into *directory*, some at a time: together they take half as long as one after the other.

    Returns:
        Sizes by name.

    Raises:
        CaptureFailed: With the reason.
    """
    meter.total_bytes = sum(disk.data_bytes for disk in disks)
    copies = Copies(directory, meter)
    await copies.make(disks)
    return copies.sizes


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
                self.sizes[name] = await copy_file(disk.file, self.directory / name, meter=meter, opened=disk.handle)
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
