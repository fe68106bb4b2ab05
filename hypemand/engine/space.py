"""Room for captures: free space, less what the captures under way still need."""

import os
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio
from attrs import frozen

from hypemand.core.errors import HypemandError
from hypemand.core.size import format_size
from hypemand.engine.limits import answer

MEASURE_S = 10.0


class NoRoomError(HypemandError):
    """The snapshot filesystem is too full for this capture."""


@frozen
class Filesystem:
    """Which filesystem a path is on, and how much of it is free for us."""

    id: int
    free_bytes: int


Measure = Callable[[Path], Awaitable[Filesystem]]


async def measure(path: Path) -> Filesystem:
    """The filesystem of *path*, which exists."""

    def ask() -> Filesystem:
        usage = os.statvfs(path)
        return Filesystem(path.stat().st_dev, usage.f_bavail * usage.f_frsize)

    return await trio.to_thread.run_sync(ask, abandon_on_cancel=True)


class Space:
    """The sum of what captures under way may take, by filesystem."""

    def __init__(self, measure: Measure) -> None:
        self._measure = measure
        self._reserved: Counter[int] = Counter()

    @asynccontextmanager
    async def reserve(self, path: Path | None, needed: int, min_free: int) -> AsyncIterator[None]:
        """Hold room for a capture of *needed* bytes on the filesystem of *path*; None is not checked.

        Raises:
            NoRoomError: Less than *min_free* would be left over.
        """
        if path is None:
            yield
            return
        filesystem = await answer("free space", MEASURE_S, lambda: self._measure(path))
        promised = self._reserved[filesystem.id]
        if filesystem.free_bytes - promised - needed < min_free:
            others = f", {format_size(promised)} are promised to captures under way" if promised else ""
            raise NoRoomError(
                f"too little room at {path}: {format_size(filesystem.free_bytes)} free{others}, the capture needs"
                f" {format_size(needed)} and {format_size(min_free)} must be left over (runs.min_free)"
            )
        self._reserved[filesystem.id] += needed
        try:
            yield
        finally:
            self._reserved[filesystem.id] -= needed
