"""Files that survive: atomic durable replacement and durable appends.

`Disk` holds the blocking operations and the way they are called from trio;
tests put one in its place that works without threads, or fails on purpose.
"""

import contextlib
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, TypeVarTuple

import trio
from attrs import frozen

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

TEMPORARY_SUFFIX = ".tmp"
_WORKERS = 4  # more threads that sync at once only wait for each other


@frozen
class Signature:
    """What tells one version of a file from the next."""

    inode: int
    mtime_ns: int
    size: int

    @classmethod
    def of(cls, status: os.stat_result) -> "Signature":
        """The signature in *status*."""
        return cls(status.st_ino, status.st_mtime_ns, status.st_size)


def _hand_over(descriptor: int, directory: Path) -> None:
    """Have a file belong to whom its directory belongs to: what root's ``recover`` writes, the daemon has to read."""
    if os.geteuid() == 0:
        owner = directory.stat()
        with contextlib.suppress(PermissionError):  # a network filesystem may not let it
            os.fchown(descriptor, owner.st_uid, owner.st_gid)


class Disk:
    """Blocking file operations, and `call` to run them beside the event loop."""

    def __init__(self) -> None:
        self._limiter: trio.CapacityLimiter | None = None
        self._limiter_ahead: trio.CapacityLimiter | None = None

    async def call(self, work: Callable[[*Ts], T], *args: *Ts) -> T:
        """Run *work* in a worker thread. A write that has begun is not cancelled."""
        if self._limiter is None:
            self._limiter = trio.CapacityLimiter(_WORKERS)
        return await trio.to_thread.run_sync(work, *args, limiter=self._limiter)

    async def call_ahead(self, work: Callable[[*Ts], T], *args: *Ts) -> T:
        """As `call`, without waiting for others that wait there: for the one thing that all runs wait for."""
        if self._limiter_ahead is None:
            self._limiter_ahead = trio.CapacityLimiter(1)
        return await trio.to_thread.run_sync(work, *args, limiter=self._limiter_ahead)

    def make_directory(self, path: Path) -> None:
        """Make *path* and its parents; the directory itself is open to its owner alone."""
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if stat.S_IMODE(path.stat().st_mode) != 0o700:
            path.chmod(0o700)

    def read(self, path: Path) -> tuple[bytes, Signature]:
        """All of *path*, and the signature of the version that was read."""
        with path.open("rb") as file:
            return file.read(), Signature.of(os.fstat(file.fileno()))

    def replace(self, path: Path, data: bytes) -> Signature:
        """Make *data* the content of *path*, durably: after a crash it holds the old or the new, whole."""
        temporary = path.with_name(f".{path.name}{TEMPORARY_SUFFIX}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            try:
                _hand_over(descriptor, path.parent)
                self.write(descriptor, data)
                # The kernel's own stamps are coarse: an edit in the same tick would look like our write.
                stamp = time.time_ns()
                os.utime(descriptor, ns=(stamp, stamp))
                self.sync(descriptor)
                signature = Signature.of(os.fstat(descriptor))
            finally:
                os.close(descriptor)
            self.rename(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        return signature

    def rename(self, source: Path, target: Path) -> None:
        """Rename *source* to *target*, durably in both directories."""
        source.rename(target)
        for directory in {source.parent, target.parent}:
            self.sync_directory(directory)

    def remove(self, path: Path) -> None:
        """Remove *path*, durably. Already gone: no error."""
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
            self.sync_directory(path.parent)

    def open_append(self, path: Path) -> int:
        """A descriptor that appends to *path*, made if missing."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        _hand_over(descriptor, path.parent)
        return descriptor

    def write(self, descriptor: int, data: bytes) -> None:
        """Write all of *data*."""
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]

    def write_again(self, path: Path, start: int, end: int) -> None:
        """Write what *path* holds from *start* to *end* once more: the next sync brings it to stable storage.

        After a sync that failed the kernel takes what it could not write for
        clean, and the next sync succeeds without it; see fsync(2).
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            while start < end and (data := os.pread(descriptor, end - start, start)):
                start += os.pwrite(descriptor, data, start)
        finally:
            os.close(descriptor)

    def sync(self, descriptor: int) -> None:
        """Wait until what was written is on stable storage."""
        os.fsync(descriptor)

    def truncate(self, descriptor: int, size: int) -> None:
        """Cut the file to *size* bytes, durably."""
        os.ftruncate(descriptor, size)
        os.fsync(descriptor)

    def sync_directory(self, path: Path) -> None:
        """Make renames, additions and removals in *path* durable."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.sync(descriptor)
        finally:
            os.close(descriptor)
