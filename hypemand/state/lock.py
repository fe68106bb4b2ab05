"""The lock on the state directory: whoever changes state holds it, and is named in it."""

import contextlib
import errno
import fcntl
import os
from datetime import UTC, datetime
from pathlib import Path

import orjson
import structlog
import trio
from attrs import field, frozen

from hypemand.core.errors import HypemandError
from hypemand.state.files import Disk

_log = structlog.get_logger()
WAIT_S = 30.0
LOOK_S = 0.5


@frozen
class LockOwner:
    """Who holds the lock: ``daemon``, ``guard``, ``recover`` or ``import``, and its process id (0: not yet written).

    Attributes:
        since: When it took the lock, by the filesystem's clock; None where that is not known.
    """

    role: str
    pid: int
    since: datetime | None = field(default=None, eq=False)

    def __str__(self) -> str:
        return f"{self.role} (pid {self.pid})" if self.pid else "another process"


class LockHeldError(HypemandError):
    """Somebody else may change the state at the moment."""

    def __init__(self, state_dir: Path, owner: LockOwner) -> None:
        self.owner = owner
        super().__init__(f"the state directory {state_dir} is in use by hypemand {owner}")


class StateLock:
    """The right to change a state directory; held until `release` or the end of the process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def acquire(cls, state_dir: Path, role: str, *, create: bool = True) -> "StateLock":
        """Take the lock, and write *role* and our process id into it.

        Args:
            create: Whether its file may be new. Where a daemon was, there is one: without it, that is not the place.

        Raises:
            LockHeldError: Somebody else has it; tells who.
            OSError: It can't be opened.
        """
        path = state_dir / "lock"
        descriptor = _open(path, create=create)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(OSError):  # a full disk keeps nobody from thawing guests
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, orjson.dumps({"role": role, "pid": os.getpid()}) + b"\n", 0)
        except BlockingIOError:
            os.close(descriptor)
            raise LockHeldError(state_dir, _read_owner(path)) from None
        except BaseException:
            os.close(descriptor)
            raise
        return cls(descriptor)

    def release(self) -> None:
        """Give the lock back. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _open(path: Path, *, create: bool) -> int:
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags | os.O_RDWR | (os.O_CREAT if create else 0), 0o600)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        return os.open(path, flags | os.O_RDONLY)  # enough to lock it: guests have to be thawed all the same


def lock_holder(state_dir: Path) -> int | None:
    """Process id of who took the lock of *state_dir*, which may live on in a remnant alone; None where that is unknown.

    The name in the file may be that of the owner before.
    """
    try:
        inode = (state_dir / "lock").stat().st_ino
        held = [line.split() for line in Path("/proc/locks").read_text().splitlines() if " FLOCK " in line]
        pids = {int(pid) for _, _, _, _, pid, file, *_ in held if int(file.rpartition(":")[2]) == inode}
    except (OSError, ValueError):
        return None
    return pids.pop() if len(pids) == 1 else None


def lock_owner(state_dir: Path) -> LockOwner | None:
    """Who holds the lock of *state_dir* now, or None. Looks without taking it for longer than the look."""
    try:
        descriptor = os.open(state_dir / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read_owner(state_dir / "lock")
    finally:
        os.close(descriptor)
    return None


def _read_owner(path: Path) -> LockOwner:
    try:
        held = orjson.loads(path.read_bytes())
        since = datetime.fromtimestamp(path.stat().st_mtime, UTC)
        return LockOwner(str(held["role"]), int(held["pid"]), since)
    except (OSError, ValueError, KeyError, TypeError):
        return LockOwner("process", 0)


async def take_lock(state_dir: Path, role: str, disk: Disk) -> StateLock:
    """The state directory, made if it is missing, and its lock. A guard or ``recover`` is waited for, for up to 30 s.

    Raises:
        LockHeldError: A daemon has it, or it did not become free.
    """
    await disk.call(disk.make_directory, state_dir)
    deadline = trio.current_time() + WAIT_S
    look_until = trio.current_time() + LOOK_S  # `status` holds it for the moment of a look
    waiting = False
    while True:
        try:
            return StateLock.acquire(state_dir, role)
        except LockHeldError as error:
            now = trio.current_time()
            if now >= deadline or (now >= look_until and error.owner.role == "daemon"):
                raise
            if now >= look_until and not waiting:
                waiting = True
                _log.info("waiting for the state directory", held_by=str(error.owner))
        await trio.sleep(0.05)
