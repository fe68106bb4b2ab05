"""The disk as one process sees it: it takes its time, fails on purpose, and dies in the middle of things."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar, TypeVarTuple

import trio

from hypemand.state.files import Disk, Signature
from tests.simulation.platter import Platter

if TYPE_CHECKING:
    from tests.simulation.process import Life

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Trouble(Protocol):
    """Who decides what goes wrong with a disk; see `chaos.Chaos`."""

    def disk_delay(self) -> float: ...

    def disk_fault(self, operation: str) -> OSError | None: ...

    def torn_at(self, operation: str, size: int) -> int | None: ...

    def crash_point(self, life: "Life", step: str, when: str) -> None: ...


class SimDisk(Disk):
    """The disk as one process sees it. Work is done in the event loop's thread, after the time that it takes."""

    def __init__(self, platter: Platter, life: "Life", trouble: Trouble) -> None:
        super().__init__()
        self.platter = platter
        self.life = life
        self.trouble = trouble

    async def call(self, work: Callable[[*Ts], T], *args: *Ts) -> T:
        await trio.lowlevel.checkpoint_if_cancelled()
        with trio.CancelScope(shield=True):
            await self.life.gate()
            delay_s = self.trouble.disk_delay()
            await (trio.sleep(delay_s) if delay_s else trio.lowlevel.cancel_shielded_checkpoint())
            await self.life.gate()
        self.life.check()
        return work(*args)

    async def call_ahead(self, work: Callable[[*Ts], T], *args: *Ts) -> T:
        return await self.call(work, *args)

    def _begin(self, operation: str) -> None:
        self.life.check()
        self.trouble.crash_point(self.life, operation, "before")
        error = self.trouble.disk_fault(operation)
        if error is not None:
            raise error

    def _end(self, operation: str) -> None:
        self.trouble.crash_point(self.life, operation, "after")

    def read(self, path: Path | str) -> tuple[bytes, Signature]:
        self._begin("read")
        return super().read(path)

    def write(self, descriptor: int, data: bytes) -> None:
        self.life.check()
        self.trouble.crash_point(self.life, "write", "before")
        torn_at = self.trouble.torn_at("write", len(data))
        error = self.trouble.disk_fault("write")
        if error is not None and torn_at is None:
            torn_at = len(data) // 3
        whole = data if torn_at is None else data[:torn_at]
        super().write(descriptor, whole)
        self.platter.wrote(descriptor, len(whole), whole)
        if error is not None:
            raise error
        if torn_at is not None:
            self.trouble.crash_point(self.life, "write", "torn")
        self._end("write")

    def write_again(self, path: Path, start: int, end: int) -> None:
        self._begin("write_again")
        super().write_again(path, start, end)
        self.platter.wrote_again(path, start, end)
        self._end("write_again")

    def sync(self, descriptor: int) -> None:
        try:
            self._begin("sync")
        except OSError:
            self.platter.sync_failed(descriptor)
            raise
        self.platter.synced(descriptor)
        self._end("sync")

    def truncate(self, descriptor: int, size: int) -> None:
        self._begin("truncate")
        os.ftruncate(descriptor, size)
        self.platter.truncated(descriptor, size)
        self._end("truncate")

    def move(self, source: Path, target: Path) -> None:
        self._begin("rename")
        super().move(source, target)
        self._end("rename")

    def remove(self, path: Path) -> None:
        self._begin("remove")
        super().remove(path)
        self._end("remove")

    def open_append(self, path: Path) -> int:
        self._begin("open_append")
        return super().open_append(path)

    def sync_directory(self, path: Path) -> None:
        self._begin("sync_directory")
        self.platter.synced_directory(path)
        self._end("sync_directory")
