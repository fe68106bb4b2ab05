"""The file that a guest's memory is saved to while the guest runs. Its room is reserved before the guest stands still.

A save that fails for lack of room is worse than none: QEMU before 8.1 would
leave the guest frozen by it. Blocking: call it in a worker thread.
"""

import ctypes
import errno
import os
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

_KEEP_SIZE = 0x01  # linux/falloc.h; Python's posix_fallocate can't say it
_NOT_POSSIBLE = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


def can_reserve(directory: Path) -> bool:
    """Whether the filesystem of *directory* can promise room."""
    with tempfile.TemporaryFile(dir=directory) as probe:
        try:
            _reserve(probe.fileno(), 4096)
        except OSError as error:
            if error.errno in _NOT_POSSIBLE:
                return False
            raise
    return True


def open_reserved(path: Path, size: int) -> int:
    """Make the file *path*, empty, with room for *size* bytes where its filesystem can promise that.

    Returns:
        A descriptor to write to it; the caller closes it.

    Raises:
        OSError: There is not so much room, or it can't be made.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        _reserve(descriptor, size)
    except OSError as error:
        if error.errno not in _NOT_POSSIBLE:
            os.close(descriptor)
            raise
    return descriptor


def reserve_again(path: Path, size: int) -> None:
    """Reserve what is left of *size*: a QEMU that opens the file by itself gives back what was reserved before."""
    with suppress(OSError):  # as good as it goes: the save is under way
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            _reserve(descriptor, size)
        finally:
            os.close(descriptor)


def size_of(path: Path) -> int:
    """The size in bytes; 0 where there is no file."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def trim(path: Path) -> int:
    """Give back the room that was not needed, make the file durable, and return its size; 0 where there is none."""
    size = size_of(path)
    if size:
        os.truncate(path, size)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return size


def _reserve(descriptor: int, size: int) -> None:
    if _libc().fallocate(descriptor, _KEEP_SIZE, ctypes.c_int64(0), ctypes.c_int64(size)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)
