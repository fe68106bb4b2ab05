"""Settling in the place of a dead daemon: whose turn it is, and what must not keep a guest frozen."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from hypemand.config import Config
from hypemand.engine import takeover
from hypemand.engine.offline import recover
from hypemand.engine.takeover import TakeOver
from hypemand.state.codec import Line, NewerFormatError
from hypemand.state.lock import LockHeldError, lock_owner
from hypemand.state.runlog import RunLog
from tests.processes import ALONE, SLOW, Lab, running_daemon, wait_until
from tests.qemu_site import mount, small_filesystem

HOLDER = """
import fcntl, os, sys, time
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)
while True:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        break
    except BlockingIOError:
        time.sleep(0.001)
if sys.argv[2] != "nameless":
    os.ftruncate(file, 0)
    os.pwrite(file, b'{"role":"%s","pid":%d}\\n' % (sys.argv[2].encode(), os.getpid()), 0)
print("held", flush=True)
time.sleep(600)
"""
"""Another process that has the state, or waits for it."""


@pytest.fixture
async def lab(tmp_path: Path) -> Lab:
    """What a daemon left that was killed in mid-freeze, with nobody to settle it."""
    return await killed(Lab(tmp_path))


async def killed(lab: Lab) -> Lab:
    async with running_daemon(lab.write(backend=SLOW, runs=ALONE).config) as daemon:
        await lab.in_mid_capture()
        await daemon.kill()
    assert lab.guest_state() == "Paused"
    return lab


def take_over(lab: Lab, *, dead: int = 1, frozen: frozenset[str] | None = None) -> TakeOver:
    run_ids = frozenset(run["run_id"] for run in lab.started())
    return TakeOver(Config(lab.state), dead, run_ids if frozen is None else frozen)


@asynccontextmanager
async def held_by(lab: Lab, role: str, *, waits: bool = False) -> AsyncIterator[trio.Process]:
    """A process that has the lock as *role*, or waits for it, until the end of the block."""
    process = await trio.lowlevel.open_process(
        [sys.executable, "-c", HOLDER, str(lab.state / "lock"), role], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        if not waits:
            assert (await process.stdout.receive_some()).startswith(b"held")
        yield process
    finally:
        process.kill()
        await process.wait()
        await process.stdout.aclose()


def assert_settled(lab: Lab) -> None:
    assert lab.guest_state() == "Running"
    assert [run["outcome"] for run in lab.history()] == ["interrupted"]
    assert (lab.snapshots(), lab.leftovers()) == ([], [])


# Whose turn it is.


async def test_open_runs_are_settled_under_the_lock_once(lab: Lab) -> None:
    for summary in ("1 of 1 open runs settled", "no open runs"):
        result = await take_over(lab).settle(5)
        assert (result.summary, result.left) == (summary, ())
    assert_settled(lab)
    assert json.loads((lab.state / "lock").read_text()) == {"role": "guard", "pid": os.getpid()}
    assert lock_owner(lab.state) is None


async def test_another_daemon_that_has_the_state_has_the_duty(lab: Lab) -> None:
    async with held_by(lab, "daemon"):
        result = await take_over(lab).settle(5)
    assert (result.summary, result.left) == ("left to another daemon", ())
    assert (lab.guest_state(), lab.history()) == ("Paused", [])


async def test_a_daemon_that_has_just_taken_the_state_and_not_yet_signed_is_not_overlooked(lab: Lab) -> None:
    async with held_by(lab, "nameless") as other:
        with trio.move_on_after(1):
            await take_over(lab, dead=json.loads((lab.state / "lock").read_text())["pid"]).settle(5)
        assert lab.guest_state() == "Paused"
        (lab.state / "lock").write_text(json.dumps({"role": "daemon", "pid": other.pid}))
        result = await take_over(lab).settle(5)
    assert result.summary == "left to another daemon"


async def test_a_recover_is_waited_for(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    async with held_by(lab, "recover") as other, trio.open_nursery() as nursery:
        nursery.start_soon(take_over(lab).settle, 5)
        await trio.sleep(1)
        assert lab.guest_state() == "Paused"
        other.kill()
    assert_settled(lab)
    monkeypatch.setattr(takeover, "OTHERS_S", 0.2)
    async with held_by(lab, "recover"):
        with pytest.raises(LockHeldError, match="recover"):
            await take_over(lab).settle(5)


async def test_a_lock_that_only_a_remnant_of_the_dead_daemon_has_keeps_no_guest_frozen(lab: Lab) -> None:
    """A thread of it that hangs in a filesystem, or a child that inherited the file by mistake."""
    async with held_by(lab, "daemon") as remnant:
        result = await take_over(lab, dead=remnant.pid).settle(5)
    assert result.left == ()
    assert_settled(lab)


async def test_a_daemon_that_is_faster_when_the_remnant_goes_stops_the_settling(lab: Lab) -> None:
    lab.root.rename(lab.root.with_name("unmounted"))  # so that settling takes its time
    async with held_by(lab, "daemon") as remnant, held_by(lab, "daemon", waits=True):
        results = []

        async def settle() -> None:
            results.append(await take_over(lab, dead=remnant.pid).settle(30))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(settle)
            await trio.sleep(1)
            remnant.kill()
            with trio.move_on_after(20):
                await wait_until(lambda: results, "one of them gives way")
            nursery.cancel_scope.cancel()
    (result,) = results
    assert result.left != ()
    assert lab.history() == []


# What must not keep a guest frozen, or have it forgotten.


@pytest.mark.parametrize("missing", ["everything", "the run log"])
async def test_a_state_directory_that_is_not_the_daemons_is_not_taken_for_one_without_open_runs(
    lab: Lab, missing: str
) -> None:
    away = lab.state.with_name("unmounted")
    lab.state.rename(away)
    lab.state.mkdir()
    if missing == "the run log":
        (lab.state / "lock").touch()
    before = sorted(lab.state.iterdir())
    with pytest.raises(OSError, match=r"mounted|No such file"):
        await TakeOver(Config(lab.state), 1, frozenset({"r1"})).settle(5)
    assert sorted(lab.state.iterdir()) == before
    lab.state.rename(lab.state.with_name("empty"))
    away.rename(lab.state)
    await take_over(lab).settle(5)
    assert_settled(lab)


async def test_a_filesystem_that_is_read_only_keeps_no_guest_frozen_and_the_run_is_recorded_later(
    tmp_path: Path,
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may mount a filesystem")
    state = tmp_path / "state"
    async with small_filesystem(state, "20m"):
        lab = await killed(Lab(tmp_path))
        mount(str(state), "-o", "remount,ro")
        for result in (await take_over(lab).settle(5), await recover(Config(lab.state))):
            assert "not recorded" in result.left[0]
            assert lab.guest_state() == "Running"
        mount(str(state), "-o", "remount,rw")
        assert (await take_over(lab).settle(5)).left == ()
        assert_settled(lab)


async def test_a_schedule_of_a_newer_version_keeps_no_guest_frozen(lab: Lab) -> None:
    newer = lab.state / "schedules" / "other.json"
    newer.write_text(json.dumps({**lab.schedule(), "instance_id": "other", "format": 2}))
    result = await take_over(lab).settle(5)
    assert (result.summary, result.left) == ("1 of 1 open runs settled", ())
    assert_settled(lab)
    with pytest.raises(NewerFormatError, match=r"other\.json"):
        await recover(Config(lab.state))


async def test_a_run_log_that_can_not_be_written_for_long_gives_the_lock_back(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def is_full(self: RunLog, line: Line) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(RunLog, "append", is_full)
        with trio.fail_after(20):
            result = await take_over(lab).settle(2)
    assert (lab.guest_state(), lab.history()) == ("Running", [])
    assert len(result.left) == 1
    assert lock_owner(lab.state) is None
    assert (await take_over(lab).settle(5)).left == ()
    assert len(lab.history()) == 1
