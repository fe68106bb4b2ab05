"""Room for captures: free space, less what the captures under way still need."""

import os
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from functools import cache
from pathlib import Path
from typing import Self

import trio
from attrs import Factory, define, field, frozen

from hypemand.backends.base import Room
from hypemand.core.errors import HypemandError
from hypemand.core.size import format_size
from hypemand.engine.limits import answer

MEASURE_S = 10.0


class NoRoomError(HypemandError):
    """A filesystem is too full for this capture."""


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

    return await trio.to_thread.run_sync(ask, abandon_on_cancel=True, limiter=_limiter_of(path))


@cache
def _limiter_of(path: Path) -> trio.CapacityLimiter:  # noqa: ARG001 - the cache goes by it
    """One thread for each path: those that are left behind where a filesystem hangs would use up everybody's."""
    return trio.CapacityLimiter(1)


@define(eq=False)
class _Look:
    over: trio.Event = Factory(trio.Event)
    seen: Filesystem | None = None


class Space:
    """The sum of what captures under way may take, by filesystem."""

    def __init__(self, measure: Measure) -> None:
        self._measure = measure
        self._next: dict[Path, _Look] = {}
        self._under_way: dict[Path, _Look] = {}
        self._reserved: Counter[int] = Counter()

    def promise(self) -> "Promise":
        """A promise of room, to be filled in the block, and taken back at its end."""
        return Promise(self)

    async def reserve(self, rooms: Collection[Room], min_free: int) -> Counter[int]:
        """Reserve all *rooms* of a capture, or none of them. Those on one filesystem add up.

        Returns:
            What to give back with `give_back`.

        Raises:
            NoRoomError: On one of the filesystems less than *min_free* would be left over.
        """
        found = await answer("free space", MEASURE_S, lambda: self._measured(rooms))
        for filesystem, there in found.items():
            self._check(filesystem, there, min_free)
        needed = Counter({filesystem.id: _sum(there) for filesystem, there in found.items()})
        self._reserved.update(needed)
        return needed

    def give_back(self, needed: Counter[int]) -> None:
        """End a reservation."""
        self._reserved.subtract(needed)

    async def _measured(self, rooms: Collection[Room]) -> dict[Filesystem, list[Room]]:
        """*rooms* by the filesystem that they are on, each as it was when it was first looked at."""
        found: dict[int, tuple[Filesystem, list[Room]]] = {}
        for room in rooms:
            filesystem = await self._look(room.path)
            found.setdefault(filesystem.id, (filesystem, []))[1].append(room)
        return dict(found.values())

    async def _look(self, path: Path) -> Filesystem:
        """How things are at *path*, seen after this was asked: those who ask while a look is taken share the next."""
        while (shared := self._next.get(path)) is not None:
            await shared.over.wait()
            if shared.seen is not None:
                return shared.seen
        mine = self._next[path] = _Look()
        try:
            before = self._under_way.get(path)
            if before is not None:
                await before.over.wait()
            self._under_way[path] = self._next.pop(path)
            mine.seen = await self._measure(path)
        finally:
            for looks in (self._next, self._under_way):
                if looks.get(path) is mine:
                    del looks[path]
            mine.over.set()
        return mine.seen

    def _check(self, filesystem: Filesystem, rooms: Collection[Room], min_free: int) -> None:
        promised, needed = self._reserved[filesystem.id], _sum(rooms)
        if filesystem.free_bytes - promised - needed >= min_free:
            return
        paths = " and ".join(dict.fromkeys(str(room.path) for room in rooms))
        others = f", {format_size(promised)} are promised to captures under way" if promised else ""
        raise NoRoomError(
            f"too little room at {paths}: {format_size(filesystem.free_bytes)} free{others}, the capture needs"
            f" {format_size(needed)} and {format_size(min_free)} must be left over (runs.min_free)"
        )


@define(eq=False)
class Promise:
    """Room for one capture, held from `fill` until the end of the block, or until `end`."""

    _space: Space
    _needed: Counter[int] = field(init=False, factory=Counter)

    async def fill(self, rooms: Collection[Room], min_free: int) -> None:
        """Hold *rooms*; see `Space.reserve`."""
        if rooms:
            self._needed = await self._space.reserve(rooms, min_free)

    def end(self) -> None:
        """Nothing is held any more. Idempotent."""
        self._space.give_back(self._needed)
        self._needed = Counter()

    def __enter__(self) -> Self:
        """Nothing is held yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """See `end`."""
        self.end()


def _sum(rooms: Collection[Room]) -> int:
    return sum(room.needed_bytes for room in rooms)
