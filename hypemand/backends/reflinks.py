"""Whether a copy on a filesystem is done at once, by sharing what is on the disk. Blocking."""

import fcntl
import os
import struct
from pathlib import Path

from hypemand.core.size import format_size

MUCH = 1 << 30
"""More data than that takes long to copy, seen from the guest."""
_FICLONERANGE = 0x4020940D  # linux/fs.h; the fcntl module of Python 3.11 does not name it
_TRIED_BYTES = 1 << 20


def can_reflink(file: Path, directory: Path) -> bool:
    """Whether a copy of *file* in *directory* would share its data. Tried with a file that has no name."""
    try:
        reader = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
        try:
            writer = os.open(directory, os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
            try:
                _share_some(reader, writer)
            finally:
                os.close(writer)
        finally:
            os.close(reader)
    except OSError:
        return False
    return True


def advice_on_copies(copied_bytes: int, directory: Path) -> tuple[str, ...]:
    """What to tell an operator of a guest with *copied_bytes* that its copies in *directory* do not share."""
    if copied_bytes <= MUCH:
        return ()
    said = (
        f"its disks have {format_size(copied_bytes)} of data to be copied while the guest stands still: with disks and"
        f" {directory} on one filesystem that can reflink (XFS, btrfs), that takes milliseconds"
    )
    return (said,)


def _share_some(reader: int, writer: int) -> None:
    """Part of it is enough, and quick for a file in many pieces; a zero stands for all."""
    length = _TRIED_BYTES if os.lseek(reader, 0, os.SEEK_END) > _TRIED_BYTES else 0
    fcntl.ioctl(writer, _FICLONERANGE, struct.pack("qQQQ", reader, 0, length, 0))
