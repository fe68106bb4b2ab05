"""Room on a filesystem, held by a file of that size until what it is held for is written. Blocking."""

import os
from pathlib import Path

from hypemand.backends.copying import CHUNK
from hypemand.backends.meter import Meter

AHEAD = 2 * CHUNK
"""So much is let go of before it is written: what a copy writes at once, and as much for the filesystem's own."""


def reserve(path: Path, size: int) -> None:
    """Have a new file at *path* that takes *size* bytes."""
    with path.open("xb") as file:
        os.posix_fallocate(file.fileno(), 0, max(size, 1))


class Exchange(Meter):
    """The meter of copies of *size* bytes together, for which the file *room* gives way piece by piece.

    At no time others could take what is still to be written.
    """

    def __init__(self, room: Path, size: int) -> None:
        self._room, self._size = room, size
        self._kept = room.stat().st_size if room.exists() else 0
        super().__init__(total_bytes=size)

    @property
    def done_bytes(self) -> int:
        """What has been copied."""
        return self._done

    @done_bytes.setter
    def done_bytes(self, done: int) -> None:
        self._done = done
        needed = max(0, self._size - done - AHEAD)
        if needed < self._kept:
            os.truncate(self._room, needed)
            self._kept = needed
