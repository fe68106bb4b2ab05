"""Copying one file of a guest: by reflink where the filesystem can, else its data alone, hole by hole.

What is copied is not yet durable; `Catalog.publish` sees to that.
"""

import contextlib
import errno
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import trio
from attrs import frozen

from hypemand.backends.base import CaptureFailed
from hypemand.backends.meter import Meter

CHUNK = 8 << 20
_PIECE = 1 << 20
_ZEROS = bytes(_PIECE)
_FICLONE = 0x40049409  # linux/fs.h; the fcntl module of Python 3.11 does not name it
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_NO_COPY_FILE_RANGE = frozenset({errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM})


class Opened(Protocol):
    """A file that is open, for as long as this is referred to."""

    def fileno(self) -> int:
        """Its descriptor."""


async def copy_file(
    source: Path, target: Path, *, rate: int | None = None, meter: Meter | None = None, opened: Opened | None = None
) -> int:
    """Copy *source* to *target*, a new file of mode 0600. Holes stay holes.

    Cancellation passes at once, even where the filesystem hangs: the thread
    that copies is left behind, and ends before its next chunk. Whoever calls
    removes what it leaves, as after an error.

    Args:
        rate: Bytes per second at most, above zero; then nothing is reflinked. None: as fast as it goes.
        meter: Its ``done_bytes`` grows by what has been copied, up to `data_bytes` of *source* together.

        opened: What is copied, where *source* is but the name that it had.

    Returns:
        The size in bytes, holes included.

    Raises:
        CaptureFailed: With the reason of the filesystem; *target* is left as it is then.
    """
    copy = _Copy(source, target, rate, meter or Meter(), opened, threading.Event())
    try:
        return await trio.to_thread.run_sync(
            copy.run,
            thread_name=f"copy {target}",
            abandon_on_cancel=True,
            # Abandoned threads on a hung filesystem must not use up the threads of everybody else.
            limiter=trio.CapacityLimiter(1),
        )
    finally:
        copy.stop.set()


def data_bytes(path: Path) -> int:
    """What a copy of *path* takes, holes left out."""
    return _allocated(path.stat())


def _allocated(status: os.stat_result) -> int:
    return status.st_blocks * 512


class _Stopped(Exception):
    """Nobody waits for this copy any more."""


@frozen
class _Copy:
    source: Path
    target: Path
    rate: int | None
    meter: Meter
    opened: Opened | None
    stop: threading.Event

    def run(self) -> int:
        try:
            # By the descriptor's name: it is opened anew, with an offset of its own.
            source = self.source if self.opened is None else Path(f"/proc/self/fd/{self.opened.fileno()}")
            with _opened(source, os.O_RDONLY) as reader:
                self._check()
                with _opened(self.target, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as writer:
                    return self._copy(reader, writer)
        except OSError as error:
            reason = error.strerror or str(error)
            full = f"{self.target.parent} is full: " if error.errno in _FULL else ""
            raise CaptureFailed(f"{full}{self.source} can't be copied to {self.target}: {reason}") from error

    def _check(self) -> None:
        if self.stop.is_set():
            raise _Stopped

    def _copy(self, reader: int, writer: int) -> int:
        size = os.lseek(reader, 0, os.SEEK_END)
        if self.rate is None and _reflinked(reader, writer):
            self.meter.done_bytes += _allocated(os.fstat(reader))
            return size
        os.truncate(writer, size)
        began = time.monotonic()
        copied = 0
        for start, end in _data_ranges(reader, size):
            offset = start
            while offset < end:
                self._check()
                done = _copy_some(reader, writer, offset, min(self._chunk(), end - offset))
                if not done:
                    raise CaptureFailed(f"{self.source} became shorter while it was copied")
                offset += done
                copied += done
                self.meter.done_bytes += done
                self._hold_back(began, copied)
        return size

    def _chunk(self) -> int:
        return CHUNK if self.rate is None else min(CHUNK, max(1, self.rate // 10))

    def _hold_back(self, began: float, copied: int) -> None:
        if self.rate is not None:
            self.stop.wait(max(0.0, began + copied / self.rate - time.monotonic()))


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _reflinked(reader: int, writer: int) -> bool:
    # Whatever it fails with, copying either works or fails with a reason that is worth telling.
    try:
        fcntl.ioctl(writer, _FICLONE, reader)
    except OSError:
        return False
    return True


def _data_ranges(reader: int, size: int) -> Iterator[tuple[int, int]]:
    end = 0
    while end < size:
        try:
            start = os.lseek(reader, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return
            if error.errno != errno.EINVAL:
                raise
            start, hole = end, size  # this filesystem knows of no holes
        else:
            hole = os.lseek(reader, start, os.SEEK_HOLE)
        end = min(hole, size)
        yield start, end


def _copy_some(reader: int, writer: int, offset: int, count: int) -> int:
    try:
        done = os.copy_file_range(reader, writer, count, offset, offset)
    except OSError as error:
        if error.errno not in _NO_COPY_FILE_RANGE:
            raise
        done = 0
    # Some filesystems answer 0 where they mean that they can't.
    return done or _copy_data(reader, writer, offset, min(count, _PIECE))


def _copy_data(reader: int, writer: int, offset: int, count: int) -> int:
    data = os.pread(reader, count, offset)
    if data == _ZEROS[: len(data)]:  # a device knows of no holes; the copy has one here
        return len(data)
    return os.pwrite(writer, data, offset)
