"""Files held open from the first look at them on: whatever takes their name later, it is still this one. Blocking.

A VMM's user may change what has a name in its directories. What is held here
was found below a root directory step by step: no link leads out of there.
"""

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from hypemand.backends.base import BackendUnavailable, Unsupported
from hypemand.backends.vmm.processes import open_files

MOST_LINKS = 40
"""As many links the kernel follows in one path."""
_KVM = ":kvm-vm"
"""In the name of a descriptor, as KVM has it of a virtual machine."""

Identity = tuple[int, ...]


class Handle:
    """A file, open for as long as anything refers to this."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        """Its descriptor."""
        return self._descriptor

    def status(self) -> os.stat_result:
        """As it is now."""
        return os.fstat(self._descriptor)

    def opened(self) -> "Handle":
        """The same file, opened for reading. Only where that is no pipe: to open one may wait for ever."""
        again = f"/proc/self/fd/{self._descriptor}"
        return Handle(os.open(again, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))

    def __del__(self) -> None:
        """Nobody needs it any more."""
        os.close(self._descriptor)


def identity(status: os.stat_result) -> Identity:
    """By which two names are told to be of one file; a device may have several files."""
    return (status.st_rdev,) if stat.S_ISBLK(status.st_mode) else (status.st_dev, status.st_ino)


def held(path: Path) -> Handle:
    """What has the name *path*, which is not a link; not opened for reading."""
    return Handle(os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC))


def held_below(root: Path, told: str) -> tuple[Handle, Path]:
    """*told* as a process sees it whose root directory is *root*, and its path without links.

    Neither ``..`` nor a link leads out of there, also not one that appears meanwhile.

    Raises:
        Unsupported: Too many links.
        OSError: It is not there.
    """
    trail = [Handle(os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))]
    names: list[str] = []
    left, links = list(reversed(list(_steps(told)))), 0
    while left:
        step = left.pop()
        if step == "..":
            del names[-1:]
            del trail[len(names) + 1 :]
            continue
        here = Handle(os.open(step, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=trail[-1].fileno()))
        if not stat.S_ISLNK(here.status().st_mode):
            trail.append(here)
            names.append(step)
            continue
        links += 1
        if links > MOST_LINKS:
            raise Unsupported(f"too many links in {told}")
        target = os.readlink("", dir_fd=here.fileno())
        if os.path.isabs(target):  # noqa: PTH117 - it is a string of the VMM's
            trail, names = trail[:1], []
        left += reversed(list(_steps(target)))
    return trail[-1], root.joinpath(*names)


def _steps(path: str) -> Iterator[str]:
    return (step for step in path.split("/") if step not in ("", "."))


def check_same(handle: Handle, path: Path, root: Path | None) -> None:
    """Make sure that *path*, below *root* if there is one, is still the file that *handle* holds.

    Raises:
        BackendUnavailable: It is another one, or none.
    """
    try:
        now = held(path) if root is None else held_below(root, str(path.relative_to(root)))[0]
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise
        raise BackendUnavailable(f"disk {path} is not there any more: it was moved or removed") from error
    if identity(now.status()) != identity(handle.status()):
        raise BackendUnavailable(f"{path} is another file now: somebody has put it in the place of the guest's disk")


def files_of_process(pid: int) -> frozenset[Identity] | None:
    """Files that the process *pid* has open; None where that can't be seen, or where it is no virtual machine.

    Whoever listens at a socket may have handed it on: a manager has none of its guests' disks open.
    """
    opened = open_files(pid)
    if opened is None or not any(_KVM in name for name, _ in opened):
        return None
    return frozenset(identity(status) for _, status in opened)
