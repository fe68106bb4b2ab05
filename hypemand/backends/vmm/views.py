"""Where a file is for us that a VMM calls by a name of its own. Blocking: call it in a worker thread."""

import os
from pathlib import Path

from attrs import frozen

from hypemand.backends.base import BackendUnavailable, Unsupported
from hypemand.backends.vmm.client import Peer
from hypemand.backends.vmm.handles import Handle, held, held_below


@frozen
class View:
    """How the VMM of one guest sees files.

    Attributes:
        chroot: Its root directory, where that is not ours.
        peer: Its process; by it a relative path is understood.
    """

    chroot: Path | None = None
    peer: Peer | None = None

    def held(self, told: str) -> tuple[Handle, Path]:
        """The file that the VMM calls *told*, and its path without links.

        Raises:
            Unsupported: The path says nothing to us.
            BackendUnavailable: It is not there, for us.
        """
        try:
            if self.chroot is not None:
                return held_below(self.chroot, told)
            path = (self._working_directory(told) / told).resolve(strict=True)
            return held(path), path
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
