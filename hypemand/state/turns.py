"""One at a time for each of many things, most of which nobody is at."""

from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

import trio

Key = TypeVar("Key", bound=Hashable)


class Turns(Generic[Key]):
    """A lock for each key, which is there only while somebody has it or wants it: a hundred thousand take room."""

    def __init__(self) -> None:
        self._locks: dict[Key, trio.Lock] = {}

    def is_taken(self, key: Key) -> bool:
        """Whether somebody has the turn of *key*."""
        return key in self._locks

    @asynccontextmanager
    async def turn(self, key: Key) -> AsyncIterator[None]:
        """The turn of *key*, first come, first served."""
        lock = self._locks.setdefault(key, trio.Lock())
        try:
            async with lock:
                yield
        finally:
            if not lock.locked():  # else it went to who was next
                self._locks.pop(key, None)
