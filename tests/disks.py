"""Disks for tests: without threads, late with their answers, and failing on purpose."""

import errno
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar, TypeVarTuple

import trio
from attrs import define

from hypemand.state.files import Disk, Signature

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Crash(BaseException):
    """The process ends here, without a word."""


class InlineDisk(Disk):
    """Does its work in the event loop's own thread, for virtual time."""

    async def call(self, work: Callable[[*Ts], T], *args: *Ts) -> T:
        await trio.lowlevel.checkpoint()
        return work(*args)

    async def call_ahead(self, work: Callable[[*Ts], T], *args: *Ts) -> T:
        return await self.call(work, *args)


class UnsyncedDisk(InlineDisk):
    """Inline, and without the syncs, for tests with many files."""

    def sync(self, descriptor: int) -> None:
        del descriptor

    def truncate(self, descriptor: int, size: int) -> None:
        os.ftruncate(descriptor, size)


class LateDisk(InlineDisk):
    """Does its work at once, but while it has a *gate*, the answer waits for that: others get in between.

    The work itself waits for *begins*, in the same way.
    """

    gate: trio.Event | None = None
    begins: trio.Event | None = None

    async def call(self, work: Callable[[*Ts], T], *args: *Ts) -> T:
        gate = self.gate
        if self.begins is not None:
            await self.begins.wait()
        result = await super().call(work, *args)
        if gate is not None:
            await gate.wait()
        return result


@define
class Fault:
    """How an operation fails. *skip* calls go well first; *name* is the file's, where only one file is bad."""

    error: int | BaseException
    once: bool
    after: int
    skip: int
    name: str | None

    def strikes(self, path: Path | None) -> bool:
        if self.name is not None and (path is None or path.name != self.name):
            return False
        self.skip -= 1
        return self.skip < 0

    def exception(self, path: Path | None) -> BaseException:
        if isinstance(self.error, BaseException):
            return self.error
        return OSError(self.error, os.strerror(self.error), *([str(path)] if path else []))


class FaultyDisk(InlineDisk):
    """Fails where it is told to, and counts what is done.

    Operations go by the names of the methods of `Disk`.

    Attributes:
        calls: How often each operation was asked for.
        order: Operations in order, each with its file: a path, or the size of the file that is synced.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.order: list[tuple[str, Path | int]] = []
        self._faults: dict[str, Fault] = {}

    def fail(
        self,
        operation: str,
        error: int | BaseException = errno.EIO,
        *,
        once: bool = False,
        after: int = 0,
        skip: int = 0,
        name: str | None = None,
    ) -> None:
        """Have *operation* fail, once or until `heal`; a write does so after *after* bytes."""
        assert hasattr(Disk, operation), operation
        self._faults[operation] = Fault(error, once, after, skip, name)

    def heal(self, *operations: str) -> None:
        """Let *operations* go well again; all of them where none is named."""
        for operation in operations or tuple(self._faults):
            self._faults.pop(operation, None)

    def forget(self) -> None:
        """Count from zero."""
        self.calls.clear()
        self.order.clear()

    def _strike(self, operation: str, path: Path | None = None, size: int = 0) -> Fault | None:
        self.calls[operation] += 1
        self.order.append((operation, size if path is None else path))
        fault = self._faults.get(operation)
        if fault is None or not fault.strikes(path):
            return None
        if fault.once:
            del self._faults[operation]
        return fault

    def _check(self, operation: str, path: Path | None = None, size: int = 0) -> None:
        fault = self._strike(operation, path, size)
        if fault is not None:
            raise fault.exception(path)

    def make_directory(self, path: Path) -> None:
        self._check("make_directory", path)
        super().make_directory(path)

    def read(self, path: Path | str) -> tuple[bytes, Signature]:
        self._check("read", Path(path))
        return super().read(path)

    def replace_all(self, files: Sequence[tuple[Path, bytes]]) -> list[Signature | OSError]:
        refused: dict[Path, OSError] = {}
        for path, _ in files:
            try:
                self._check("replace", path)
            except OSError as error:
                refused[path] = error
        replaced = iter(super().replace_all([file for file in files if file[0] not in refused]))
        return [refused.get(path) or next(replaced) for path, _ in files]

    def move(self, source: Path, target: Path) -> None:
        self._check("rename", source)
        super().move(source, target)

    def remove(self, path: Path) -> None:
        self._check("remove", path)
        super().remove(path)

    def open_append(self, path: Path) -> int:
        self._check("open_append", path)
        return super().open_append(path)

    def write(self, descriptor: int, data: bytes) -> None:
        fault = self._strike("write", size=len(data))
        if fault is None:
            super().write(descriptor, data)
            return
        super().write(descriptor, data[: fault.after])
        raise fault.exception(None)

    def write_again(self, path: Path, start: int, end: int) -> None:
        self._check("write_again", path)
        super().write_again(path, start, end)

    def sync(self, descriptor: int) -> None:
        self._check("sync", size=os.fstat(descriptor).st_size)
        super().sync(descriptor)

    def truncate(self, descriptor: int, size: int) -> None:
        self._check("truncate", size=size)
        super().truncate(descriptor, size)

    def sync_directory(self, path: Path) -> None:
        self._check("sync_directory", path)
        super().sync_directory(path)
