"""Files that survive: atomic durable replacement and durable appends.

`Disk` holds the blocking operations and the way they are called from trio;
tests put one in its place that works without threads, or fails on purpose.
"""

import contextlib
import os
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar, TypeVarTuple

import trio
from attrs import define, field, frozen

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

TEMPORARY_SUFFIX = ".tmp"
_PIECE = 64 * 1024
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
    if os.geteuid() == 0 and ((owner := directory.stat()).st_uid or owner.st_gid):
        with contextlib.suppress(PermissionError):  # a network filesystem may not let it
            os.fchown(descriptor, owner.st_uid, owner.st_gid)


@define
class _Replacement:
    """A file that gets new content: written beside it, and renamed into its place.

    Attributes:
        temporary: Where it is written to.
    """

    path: Path
    data: bytes
    temporary: Path = field(init=False)
    descriptor: int = -1
    is_in_place: bool = False
    outcome: Signature | OSError | None = None

    @temporary.default
    def _temporary(self) -> Path:
        return self.path.with_name(f".{self.path.name}{TEMPORARY_SUFFIX}")

    def told(self) -> Signature | OSError:
        """How it ended."""
        assert self.outcome is not None
        return self.outcome

    def clear_up(self) -> None:
        """Leave nothing beside it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            if not self.is_in_place:
                with contextlib.suppress(OSError):
                    self.temporary.unlink()


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

    def read(self, path: Path | str) -> tuple[bytes, Signature]:
        """All of *path*, and the signature of the version that was read."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # many are read at a start: a file object takes time
        try:
            status = os.fstat(descriptor)
            data = os.read(descriptor, status.st_size + 1)
            while len(data) != status.st_size and (more := os.read(descriptor, _PIECE)):
                data += more
            return data, Signature.of(status)
        finally:
            os.close(descriptor)

    def replace(self, path: Path, data: bytes) -> Signature:
        """Make *data* the content of *path*, durably: after a crash it holds the old or the new, whole."""
        (outcome,) = self.replace_all([(path, data)])
        if isinstance(outcome, OSError):
            raise outcome
        return outcome

    def replace_all(self, files: Sequence[tuple[Path, bytes]]) -> list[Signature | OSError]:
        """`replace` for many files, whose directories are synced once. A failure is that of its file alone.

        Returns:
            For each of *files*, in their order, its signature or why it was not replaced.
        """
        replacements = [_Replacement(path, data) for path, data in files]
        try:
            for step in (self._write_beside, self._sync_beside, self._put_in_place):
                for one in replacements:
                    self._try_to(step, one)
            self._sync_directories(replacements)
        finally:
            for one in replacements:
                one.clear_up()
        return [one.told() for one in replacements]

    @staticmethod
    def _try_to(step: Callable[[_Replacement], None], one: _Replacement) -> None:
        if isinstance(one.outcome, OSError):
            return
        try:
            step(one)
        except OSError as error:
            one.outcome = error

    def _write_beside(self, one: _Replacement) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        one.descriptor = os.open(one.temporary, flags, 0o600)
        _hand_over(one.descriptor, one.path.parent)
        self.write(one.descriptor, one.data)
        # The kernel's own stamps are coarse: an edit in the same tick would look like our write.
        stamp = time.time_ns()
        os.utime(one.descriptor, ns=(stamp, stamp))
        # The kernel begins to write at once: the syncs that follow, one by one, find most of it done.
        os.posix_fadvise(one.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def _sync_beside(self, one: _Replacement) -> None:
        self.sync(one.descriptor)
        one.outcome = Signature.of(os.fstat(one.descriptor))

    def _put_in_place(self, one: _Replacement) -> None:
        self.move(one.temporary, one.path)
        one.is_in_place = True

    def _sync_directories(self, replacements: Iterable[_Replacement]) -> None:
        by_directory: dict[Path, list[_Replacement]] = {}
        for one in replacements:
            if one.is_in_place:
                by_directory.setdefault(one.path.parent, []).append(one)
        for directory, of_it in by_directory.items():
            try:
                self.sync_directory(directory)
            except OSError as error:
                for one in of_it:
                    one.outcome = error

    def move(self, source: Path, target: Path) -> None:
        """Rename *source* to *target*, which a crash may undo."""
        source.rename(target)

    def rename(self, source: Path, target: Path) -> None:
        """Rename *source* to *target*, durably in both directories."""
        self.move(source, target)
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
