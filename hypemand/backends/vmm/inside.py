"""Opening files below another root directory, by descriptors alone: whoever owns things in there can't lead us out."""

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

MOST_LINKS = 40
"""As many links the kernel follows in one path."""


def opened_inside(root: Path, told: str) -> int:
    """A descriptor (``O_PATH``) of what a process with the root directory *root* calls *told*. Blocking.

    Neither ``..`` nor a link leads out of there, even if one takes the place of a directory meanwhile.

    Raises:
        OSError: It is not there.
    """
    way = [os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)]
    try:
        _walk(way, told)
        return way.pop()
    finally:
        for descriptor in way:
            os.close(descriptor)


def _walk(way: list[int], told: str) -> None:
    left, links = list(reversed(list(_steps(told)))), 0
    while left:
        step = left.pop()
        if step == "..":
            _back(way, max(1, len(way) - 1))
            continue
        way.append(os.open(step, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=way[-1]))
        if not stat.S_ISLNK(os.fstat(way[-1]).st_mode):
            continue
        target = os.readlink("", dir_fd=way[-1])
        links += 1
        if links > MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), told)
        _back(way, 1 if target.startswith("/") else len(way) - 1)
        left += reversed(list(_steps(target)))


def _back(way: list[int], length: int) -> None:
    while len(way) > length:
        os.close(way.pop())


def _steps(path: str) -> Iterator[str]:
    return (step for step in path.split("/") if step not in ("", "."))
