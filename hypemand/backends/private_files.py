"""Files that hold secrets: read only if nobody else can read them."""

import errno
import os
import stat
from pathlib import Path

from hypemand.core.errors import HypemandError

MOST_BYTES = 1024**2


class NotPrivateError(HypemandError):
    """Others can read the file; what is in it may not be a secret any more."""


def read_private(path: Path) -> bytes:
    """What is in the file *path*. Blocking.

    Raises:
        NotPrivateError: Says how to mend it.
        OSError: It can't be read, is no file, or larger than 1 MiB.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe's writer is not waited for
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no file")
        if status.st_mode & _forbidden(path):
            mode = stat.S_IMODE(status.st_mode)
            raise NotPrivateError(f"is not taken: others can read it (mode {mode:04o}); run: chmod 600 {path}")
        data = os.read(descriptor, MOST_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(data) > MOST_BYTES:
        raise OSError(errno.EFBIG, "it is larger than 1 MiB")
    return data


def _forbidden(path: Path) -> int:
    """Mode bits that the file at *path* must not have.

    systemd gives a service's user its credentials by an access control list,
    whose mask is what the group's bits of the mode then show.
    """
    by_systemd = os.environ.get("CREDENTIALS_DIRECTORY")
    return 0o037 if by_systemd and path.parent == Path(by_systemd) else 0o077


def credential(name: str) -> Path | None:
    """The file of the systemd credential *name*; None where hypemand was given none."""
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    path = Path(directory) / name if directory else None
    return path if path is not None and path.exists() else None
