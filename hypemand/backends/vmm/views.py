"""Where a file is for us that a VMM calls by a name of its own. Blocking: call it in a worker thread."""

import os
from collections.abc import Iterator
from pathlib import Path

from attrs import frozen

from hypemand.backends.base import BackendUnavailable, Unsupported
from hypemand.backends.vmm.client import Peer

MOST_LINKS = 40
"""As many links the kernel follows in one path."""


@frozen
class View:
    """How the VMM of one guest sees files.

    Attributes:
        chroot: Its root directory, where that is not ours.
        peer: Its process; by it a relative path is understood.
    """

    chroot: Path | None = None
    peer: Peer | None = None

    def found(self, told: str) -> Path:
        """The file that the VMM calls *told*, without links. It exists.

        Raises:
            Unsupported: The path says nothing to us.
            BackendUnavailable: It is not there, for us.
        """
        try:
            if self.chroot is not None:
                return _resolved_in(self.chroot, told)
            return (self._working_directory(told) / told).resolve(strict=True)
        except OSError as error:
            raise BackendUnavailable(
                f"the VMM has the file {told}, which is not seen from here ({error.strerror}):"
                " is its filesystem mounted, and may hypemand go there?"
            ) from error

    def name_of(self, file: Path) -> str:
        """What the VMM calls *file*."""
        return str(file) if self.chroot is None else f"/{file.relative_to(self.chroot)}"

    def _working_directory(self, told: str) -> Path:
        if os.path.isabs(told):  # noqa: PTH117 - it is a string of the VMM's
            return Path("/")
        try:
            return Path(f"/proc/{self.peer.pid if self.peer else 'none'}/cwd").readlink()
        except OSError as error:
            raise Unsupported(
                f"the VMM was given the relative path {told}, and its working directory is not seen from here:"
                " give it absolute paths"
            ) from error


def _resolved_in(root: Path, told: str) -> Path:
    """*told* as a process sees it whose root directory is *root*: neither ``..`` nor a link leads out of there."""
    parts: list[str] = []
    left, links = list(reversed(list(_steps(told)))), 0
    while left:
        step = left.pop()
        if step == "..":
            parts = parts[:-1]
            continue
        path = root.joinpath(*parts, step)
        if not path.is_symlink():
            parts.append(step)
            continue
        links += 1
        if links > MOST_LINKS:
            raise Unsupported(f"too many links in {told}")
        target = os.readlink(path)  # noqa: PTH115 - pathlib would take its slashes apart
        if os.path.isabs(target):  # noqa: PTH117
            parts = []
        left += reversed(list(_steps(target)))
    found = root.joinpath(*parts)
    found.stat()
    return found


def _steps(path: str) -> Iterator[str]:
    return (step for step in path.split("/") if step not in ("", "."))
