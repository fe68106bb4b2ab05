"""Whether a process has a guest's disk open for writing. Blocking.

The kernel is asked for a read lease, which nobody gets on a file that somebody
may write to; it is given back at once. Only the owner of a file may ask for
one, or root. Where there are no leases, as for block devices, all processes
are looked at, if this one may do that.
"""

import errno
import fcntl
import os
import signal
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from attrs import Factory, frozen

_FIRST_NAMESPACE = "pid:[4026531836]"
_CAP_SYS_PTRACE = 1 << 19
_WRITES = 0o200
_PROC = Path("/proc")


@frozen
class Use:
    """Of the disks of a guest.

    Attributes:
        written: Those that a process has open for writing.
        untold: Those of which that can't be told.
    """

    written: list[str] = Factory(list)
    untold: list[str] = Factory(list)


def use_of(disks: Iterable[Path]) -> Use:
    """How *disks* are used at the moment.

    Raises:
        OSError: One can't be read.
    """
    use = Use()
    for disk in disks:
        is_written = _is_written(disk)
        if is_written is not False:
            (use.untold if is_written is None else use.written).append(str(disk))
    return use


def _is_written(disk: Path) -> bool | None:
    status = disk.stat()
    if not stat.S_ISREG(status.st_mode):  # anything else is nobody's disk, as whoever reads it as one says
        return _is_open(status) if stat.S_ISBLK(status.st_mode) else False
    descriptor = os.open(disk, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return _refuses_lease(descriptor)
    except OSError:
        return _is_open(os.fstat(descriptor))
    finally:
        os.close(descriptor)


def _refuses_lease(descriptor: int) -> bool:
    # Who opens the disk in this very moment waits until the lease is back, and we get a signal: the usual one would end
    # this process, and that one is ignored.
    fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        if error.errno == errno.EAGAIN:
            return True
        raise
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


def _is_open(disk: os.stat_result) -> bool | None:
    """Whether a process has *disk* open for writing; None where not all processes are seen."""
    if not _sees_all():
        return None
    return any(_has_open(process, disk) for process in _processes())


def _sees_all() -> bool:
    """Whether this process is outside all containers, and may look into all others."""
    try:
        status = (_PROC / "self" / "status").read_text()
        able = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:"))
        return (_PROC / "self" / "ns" / "pid").readlink() == Path(_FIRST_NAMESPACE) and bool(able & _CAP_SYS_PTRACE)
    except (OSError, StopIteration):
        return False


def _processes() -> Iterator[Path]:
    return (process for process in _PROC.iterdir() if process.name.isdecimal())


def _has_open(process: Path, disk: os.stat_result) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
        for opened in (process / "fd").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):
                if opened.lstat().st_mode & _WRITES and _is_same(opened.stat(), disk):
                    return True
    return False


def _is_same(one: os.stat_result, disk: os.stat_result) -> bool:
    if stat.S_ISBLK(disk.st_mode):
        return stat.S_ISBLK(one.st_mode) and one.st_rdev == disk.st_rdev
    return (one.st_dev, one.st_ino) == (disk.st_dev, disk.st_ino)
