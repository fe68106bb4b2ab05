"""The control socket in the filesystem: where it is, how it is made, and whose it is."""

import contextlib
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from attrs import frozen

from hypemand.config import Config
from hypemand.core.errors import HypemandError

MODE = 0o660
BACKLOG = 128
MOST_BYTES = 107
"""How long a path the kernel takes for a socket."""
_SYSTEM_STATE = Path("/var/lib/hypemand")
SYSTEM_SOCKET = Path("/run/hypemand/api.sock")
_LOCK_S = 2.0


class SocketRefusedError(HypemandError):
    """There is something at the socket's path that must stay; the message says what to do."""


def socket_path(config: Config) -> Path:
    """Where the daemon of *config* listens, and its clients find it.

    Each state directory has its own, so that daemons of different states never meet.
    """
    if config.api.socket is not None:
        return config.api.socket
    return SYSTEM_SOCKET if config.state_dir == _SYSTEM_STATE else config.state_dir / SYSTEM_SOCKET.name


@contextlib.contextmanager
def short_path(path: Path) -> Iterator[str]:
    """A name for *path* that bind(2) and connect(2) take, however long it is; good within the block.

    Raises:
        OSError: Its directory can't be opened.
    """
    if len(os.fsencode(path)) <= MOST_BYTES:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


@frozen(eq=False)
class ControlSocket:
    """A socket that listens at *path*. One that is *lent* goes on to listen there when it is closed here."""

    path: Path
    socket: socket.socket
    _file: tuple[int, int]
    lent: bool = False

    def is_lost(self) -> bool:
        """Whether clients that go to the path don't come to this socket. Blocking."""
        try:
            return _identity(self.path) != self._file
        except OSError:
            return True

    def close(self) -> None:
        """Listen no more, and remove the file, if it is still this socket's. Idempotent."""
        if self.socket.fileno() >= 0:
            with contextlib.suppress(OSError):
                if not self.lent and not self.is_lost():
                    self.path.unlink()
            self.socket.close()


def adopt_control_socket(path: Path, made: socket.socket) -> ControlSocket:
    """*made*, which somebody else has opened at *path*, with the mode that was wanted there. Blocking.

    Raises:
        OSError: There is nothing at *path*.
    """
    return ControlSocket(path, made, _identity(path), lent=True)


def open_control_socket(path: Path) -> ControlSocket:
    """Listen at *path*, for its owner and its group; its directory is made if it is missing. Blocking.

    A socket that nobody listens at any more is replaced. One that is in use,
    and whatever is no socket, stays. Two that try at once do so one by one.

    Raises:
        SocketRefusedError: The path is taken.
        OSError: The socket can't be made.
    """
    _make_directory(path.parent)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _wait_for_turn(directory, path)
        with short_path(path) as name:
            _make_room(path, name)
            made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                made.bind(name)
                path.chmod(MODE)  # before it listens: until then nobody can connect
                made.listen(BACKLOG)
                return ControlSocket(path, made, _identity(path))
            except BaseException:
                made.close()
                raise
    finally:
        os.close(directory)


def _make_directory(path: Path) -> None:
    if not path.is_dir():
        path.mkdir(parents=True)
        path.chmod(0o755)  # whatever the umask: the socket's own mode says who may come in


def _wait_for_turn(directory: int, path: Path) -> None:
    """Hold the lock on the socket's directory until it is closed."""
    patience = time.monotonic() + _LOCK_S
    while True:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > patience:
                raise SocketRefusedError(f"{path.parent} is locked by another program") from None
            time.sleep(0.02)
        except OSError:
            return  # a filesystem without locks
        else:
            return


def _make_room(path: Path, name: str) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise SocketRefusedError(f"{path} is no socket and is left alone: move it away, or set api.socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # a program that hangs, and takes no more callers, is alive
        try:
            probe.connect(name)
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except FileNotFoundError:
            return
        except PermissionError:
            raise  # whether somebody listens can't be told
        except OSError:
            pass  # too many wait for an answer, or it is a socket of another kind: somebody's all the same
    raise SocketRefusedError(f"another program listens at {path}: stop it, or set api.socket to another path")


def _identity(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino
