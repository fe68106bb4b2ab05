"""What captures leave in a VMM's root directory: the memory of a guest, which nobody else ought to keep. Blocking."""

import shutil
from pathlib import Path

import structlog

PREFIX = ".hypemand-"
"""Of directories that a VMM saves into, below its root."""
_log = structlog.get_logger()


def remove(directory: Path) -> None:
    """Remove *directory*; neither a link in its place nor one in it is followed. Already gone: no error.

    Raises:
        OSError: It is still there.
    """
    try:
        shutil.rmtree(directory)
    except FileNotFoundError:
        return
    except OSError:
        if not directory.is_symlink():
            raise
        directory.unlink()


def sweep(root: Path) -> None:
    """Remove what finished runs left in *root*: only one run of a guest is open at a time, and it begins now."""
    for left in root.glob(f"{PREFIX}*"):
        try:
            remove(left)
        except OSError as error:
            _log.error(
                "memory of the guest is left over from an earlier capture: remove it by hand",
                path=str(left),
                error=error.strerror,
            )
