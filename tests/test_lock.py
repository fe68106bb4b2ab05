"""The lock on the state directory: one holder, whose name can be read, and no leftovers."""

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from hypemand.state.files import Disk
from hypemand.state.lock import LockHeldError, LockOwner, StateLock, lock_owner, take_lock
from tests.disks import FaultyDisk

HOLDER = """
import pathlib, resource, sys
from hypemand.state.lock import StateLock
if sys.argv[3:] == ["full"]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
lock = StateLock.acquire(pathlib.Path(sys.argv[1]), sys.argv[2])
print("held", flush=True)
sys.stdin.read()
"""

Hold = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Hold]:
    """Start another process that holds the lock in a role until its stdin ends."""
    holders: list[subprocess.Popen[str]] = []

    def start(role: str, *how: str) -> "subprocess.Popen[str]":
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLDER, tmp_path, role, *how],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        holders.append(holder)
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        return holder

    yield start
    for holder in holders:
        holder.kill()
        holder.communicate()


def test_a_second_process_is_told_who_holds_it(tmp_path: Path, hold: Hold) -> None:
    holder = hold("daemon")
    with pytest.raises(LockHeldError) as caught:
        StateLock.acquire(tmp_path, "recover")
    assert caught.value.owner == LockOwner("daemon", holder.pid)
    for word in ("daemon", str(holder.pid), str(tmp_path)):
        assert word in str(caught.value)


def test_the_same_process_cannot_have_it_twice(tmp_path: Path) -> None:
    lock = StateLock.acquire(tmp_path, "guard")
    with pytest.raises(LockHeldError) as caught:
        StateLock.acquire(tmp_path, "daemon")
    assert caught.value.owner == LockOwner("guard", os.getpid())
    lock.release()
    lock.release()
    StateLock.acquire(tmp_path, "daemon").release()


def test_a_refused_try_leaves_the_holder_and_its_name_alone(tmp_path: Path) -> None:
    lock = StateLock.acquire(tmp_path, "daemon")
    before = (tmp_path / "lock").read_bytes()
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        with pytest.raises(LockHeldError):
            StateLock.acquire(tmp_path, "recover")
    assert (tmp_path / "lock").read_bytes() == before
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
    lock.release()


def test_a_holder_that_is_killed_leaves_it_free(tmp_path: Path, hold: Hold) -> None:
    holder = hold("daemon")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert lock_owner(tmp_path) is None
    lock = StateLock.acquire(tmp_path, "recover")
    assert lock_owner(tmp_path) == LockOwner("recover", os.getpid())
    lock.release()


def test_children_of_the_holder_do_not_hold_it(tmp_path: Path) -> None:
    lock = StateLock.acquire(tmp_path, "daemon")
    with subprocess.Popen(["sleep", "60"], close_fds=False) as child:
        lock.release()
        assert child.poll() is None
        assert lock_owner(tmp_path) is None
        StateLock.acquire(tmp_path, "daemon").release()
        child.kill()


def test_the_lock_file_is_open_to_its_owner_alone(tmp_path: Path) -> None:
    StateLock.acquire(tmp_path, "daemon").release()
    assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o600


def test_a_longer_name_before_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text('{"role": "a much longer role than ours", "pid": 1234567890}\nand more\n')
    lock = StateLock.acquire(tmp_path, "guard")
    assert lock_owner(tmp_path) == LockOwner("guard", os.getpid())
    lock.release()


def test_a_full_disk_keeps_nobody_from_taking_it(tmp_path: Path, hold: Hold) -> None:
    hold("recover", "full")
    with pytest.raises(LockHeldError, match="another process"):
        StateLock.acquire(tmp_path, "daemon")


def test_the_owner_is_seen_from_outside(tmp_path: Path, hold: Hold) -> None:
    assert lock_owner(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    holder = hold("daemon")
    assert lock_owner(tmp_path) == LockOwner("daemon", holder.pid)
    assert lock_owner(tmp_path) == LockOwner("daemon", holder.pid)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "7", '{"role": "daemon"}', '{"role": "daemon", "pid": "x"}', "\xff"]
)
def test_a_holder_with_a_name_that_cannot_be_read_is_another_process(tmp_path: Path, content: str) -> None:
    lock = StateLock.acquire(tmp_path, "daemon")
    (tmp_path / "lock").write_text(content, encoding="latin-1")
    owner = lock_owner(tmp_path)
    assert owner is not None
    assert str(owner) == "another process"
    lock.release()


async def test_take_lock_makes_the_directory(tmp_path: Path) -> None:
    state_dir = tmp_path / "var" / "hypemand"
    lock = await take_lock(state_dir, "daemon", Disk())
    assert state_dir.stat().st_mode & 0o777 == 0o700
    assert lock_owner(state_dir) == LockOwner("daemon", os.getpid())
    lock.release()


async def test_take_lock_passes_on_that_the_directory_cannot_be_made(tmp_path: Path) -> None:
    disk = FaultyDisk()
    disk.fail("make_directory")
    with pytest.raises(OSError, match="Input/output"):
        await take_lock(tmp_path / "state", "daemon", disk)


@pytest.mark.parametrize("role", ["recover", "guard"])
async def test_take_lock_waits_for_one_that_settles_and_gets_it_when_that_ends(
    tmp_path: Path, hold: Hold, role: str
) -> None:
    holder = hold(role)
    locks: list[StateLock] = []

    async def take() -> None:
        locks.append(await take_lock(tmp_path, "daemon", Disk()))

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(take)
            await trio.sleep(0.8)  # longer than it looks at a daemon
            assert locks == []
            holder.kill()
    assert lock_owner(tmp_path) == LockOwner("daemon", os.getpid())
    locks[0].release()


async def test_take_lock_does_not_wait_for_a_daemon(tmp_path: Path, hold: Hold) -> None:
    holder = hold("daemon")
    with trio.fail_after(10), pytest.raises(LockHeldError) as caught:
        await take_lock(tmp_path, "recover", Disk())
    assert caught.value.owner == LockOwner("daemon", holder.pid)


async def test_take_lock_gives_up_on_one_that_settles_for_ever(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    lock = StateLock.acquire(tmp_path, "recover")
    with trio.fail_after(60), pytest.raises(LockHeldError) as caught:
        await take_lock(tmp_path, "daemon", FaultyDisk())
    assert caught.value.owner.role == "recover"
    assert trio.current_time() >= 30
    lock.release()


async def test_a_look_at_the_owner_does_not_disturb_a_daemon_that_starts(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    StateLock.acquire(tmp_path, "daemon").release()  # the name of one that is gone stays in the file
    looking = os.open(tmp_path / "lock", os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)  # the moment in which `lock_owner` looks

    async def look_away() -> None:
        await trio.sleep(0.2)
        os.close(looking)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look_away)
        lock = await take_lock(tmp_path, "daemon", FaultyDisk())
    assert lock_owner(tmp_path) == LockOwner("daemon", os.getpid())
    lock.release()


def test_many_looks_at_once_see_a_free_lock(tmp_path: Path) -> None:
    StateLock.acquire(tmp_path, "daemon").release()
    looking = os.open(tmp_path / "lock", os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    assert lock_owner(tmp_path) is None
    os.close(looking)
