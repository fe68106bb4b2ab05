"""The guard of a real daemon: killed, stopped, signalled, switched off; and its own death."""

import os
import signal
import time
from pathlib import Path

import pytest
import trio

from hypemand.engine import guard, guarding
from hypemand.engine.guarding import Guarding
from hypemand.engine.leases import NoGuardError
from hypemand.state.lock import lock_owner
from tests.kills.processes import slow_machine_s
from tests.processes import (
    ALONE,
    RUN_NOW,
    SLOW,
    DaemonProcess,
    Lab,
    children_of,
    guards_of,
    run_cli,
    running_daemon,
    wait_until,
)

SOON_S = 3.0
"""How long after the end of a daemon or of a budget a guest may stand still, on a busy machine."""


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


async def the_guard(daemon: DaemonProcess) -> int:
    await wait_until(lambda: len(guards_of(daemon.pid)) == 1, "there is a guard")
    (pid,) = guards_of(daemon.pid)
    return pid


async def guest_runs_again(lab: Lab, since: float) -> None:
    await wait_until(lambda: lab.guest_state() == "Running", "the guest runs again", within_s=20)
    took_s = time.monotonic() - since
    assert took_s < max(SOON_S, await slow_machine_s())


async def assert_settled_by_the_guard(lab: Lab, daemon: DaemonProcess) -> None:
    await wait_until(lambda: not guards_of(daemon.pid), "the guard has ended")
    assert (lab.snapshots(), lab.leftovers()) == ([], [])
    (run,) = lab.history()
    assert (run["run_id"], run["outcome"]) == (lab.started()[0]["run_id"], "interrupted")
    assert lock_owner(lab.state) is None


async def test_the_guest_of_a_killed_daemon_runs_again_with_nobody_else_to_help(lab: Lab) -> None:
    async with running_daemon(lab.write(backend=SLOW).config) as daemon:
        await lab.in_mid_capture()
        killed_at = time.monotonic()
        await daemon.kill()
        await guest_runs_again(lab, killed_at)
        await assert_settled_by_the_guard(lab, daemon)
    (told,) = daemon.logged("the guard settles open runs")
    assert (told["level"], told["why"]) == ("critical", "the daemon has ended")
    async with running_daemon(lab.config) as again:
        await again.wait_for("next run")
        await again.stop()
    assert len(lab.history()) == 1


async def test_a_daemon_that_is_stopped_in_mid_freeze_is_replaced_at_the_end_of_the_budget(lab: Lab) -> None:
    async with running_daemon(lab.write(backend=SLOW, runs='max_freeze = "3s"').config) as daemon:
        await lab.in_mid_capture()
        began = time.monotonic()
        daemon.send(signal.SIGSTOP)
        await guest_runs_again(lab, began + 3)
        assert await daemon.ended() == -signal.SIGKILL
        await assert_settled_by_the_guard(lab, daemon)
    (told,) = daemon.logged("the guard settles open runs")
    assert "did not answer" in told["why"]
    assert "was killed by its guard during the run" in lab.history()[0]["error"]


async def test_a_guard_that_dies_in_mid_freeze_is_replaced_by_one_that_knows_of_the_freeze(lab: Lab) -> None:
    async with running_daemon(lab.write(backend=SLOW, runs='max_freeze = "10s"').config) as daemon:
        first = await the_guard(daemon)
        await lab.in_mid_capture()
        os.kill(first, signal.SIGKILL)
        gone = await daemon.wait_for("the guard is gone; another one is started")
        assert gone["leases"] == 1
        await wait_until(lambda: guards_of(daemon.pid) not in ([], [first]), "there is another guard")
        await trio.sleep(1)  # it is told of the freeze
        daemon.send(signal.SIGSTOP)
        began = time.monotonic()
        await guest_runs_again(lab, began + 10)
        await assert_settled_by_the_guard(lab, daemon)


async def test_a_guard_that_dies_is_replaced_before_the_next_freeze(lab: Lab) -> None:
    async with running_daemon(lab.write().config) as daemon:
        await lab.recorded(1)
        first = await the_guard(daemon)
        os.kill(first, signal.SIGKILL)
        lab.make_due(daemon)
        await lab.recorded(2)
        assert await the_guard(daemon) != first
        await daemon.stop()
    assert [run["outcome"] for run in lab.history()] == ["succeeded"] * 2


async def test_a_guard_that_hangs_in_mid_freeze_is_replaced_by_one_that_knows_of_the_freeze(lab: Lab) -> None:
    async with running_daemon(lab.write(backend=SLOW).config) as daemon:
        first = await the_guard(daemon)
        await lab.in_mid_capture()
        os.kill(first, signal.SIGSTOP)
        await wait_until(lambda: guards_of(daemon.pid) not in ([], [first]), "there is another guard")
        await trio.sleep(1)  # it is told of the freeze
        killed_at = time.monotonic()
        await daemon.kill()
        await guest_runs_again(lab, killed_at)
        await assert_settled_by_the_guard(lab, daemon)


async def test_a_guard_that_hangs_is_replaced_and_costs_no_run(lab: Lab) -> None:
    async with running_daemon(lab.write().config) as daemon:
        await lab.recorded(1)
        first = await the_guard(daemon)
        os.kill(first, signal.SIGSTOP)
        lab.make_due(daemon)
        await lab.recorded(2)
        assert await the_guard(daemon) != first
        await daemon.stop()
    assert [run["outcome"] for run in lab.history()] == ["succeeded"] * 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_to_the_whole_group_leaves_the_guard_to_watch_over_the_grace(
    lab: Lab, number: signal.Signals
) -> None:
    async with running_daemon(lab.write(backend=SLOW, runs='shutdown_grace = "60s"').config) as daemon:
        pid = await the_guard(daemon)
        await lab.in_mid_capture()
        for process in (daemon.pid, pid):
            os.kill(process, number)
        await daemon.wait_for("stopping")
        killed_at = time.monotonic()
        await daemon.kill()
        await guest_runs_again(lab, killed_at)
        await assert_settled_by_the_guard(lab, daemon)


async def test_a_guest_that_can_not_be_resumed_before_the_daemon_has_to_end_is_left_to_the_guard(lab: Lab) -> None:
    async with running_daemon(lab.write(backend=SLOW, runs='shutdown_grace = "1s"').config) as daemon:
        await lab.in_mid_capture()
        away = lab.root.with_name("unmounted")
        lab.root.rename(away)
        daemon.send(signal.SIGTERM)
        assert await daemon.ended() == 0
        assert "guest left frozen" in [line["event"] for line in daemon.lines()]
        assert guards_of(daemon.pid) != []
        away.rename(lab.root)
        await wait_until(lambda: lab.guest_state() == "Running", "the guest runs again")
        await assert_settled_by_the_guard(lab, daemon)


async def test_a_daemon_that_ends_well_leaves_no_process_and_its_runs_closed(lab: Lab) -> None:
    async with running_daemon(lab.write().config) as daemon:
        await lab.recorded(1)
        pid = await the_guard(daemon)
        await daemon.stop()
        assert guards_of(daemon.pid) == []
        assert not Path(f"/proc/{pid}").exists()
    assert daemon.logged("the guard settles open runs") == []


async def test_a_guard_that_is_not_wanted_is_not_there_and_the_config_can_change_its_mind(lab: Lab) -> None:
    async with running_daemon(lab.write(runs=ALONE).config) as daemon:
        await lab.recorded(1)
        assert children_of(daemon.pid) == []
        lab.write()
        daemon.send(signal.SIGHUP)
        pid = await the_guard(daemon)
        lab.write(runs=ALONE)
        daemon.send(signal.SIGHUP)
        await daemon.wait_for("the guard is switched off", pid=pid)
        await wait_until(lambda: children_of(daemon.pid) == [], "it has ended")
        lab.make_due(daemon)
        await lab.recorded(2)
        await daemon.stop()
    assert [run["outcome"] for run in lab.history()] == ["succeeded"] * 2


# The daemon's end by itself.


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarding, "ACKNOWLEDGE_S", 0.5)
    monkeypatch.setattr(guarding, "AGAIN_S", 0.1)


async def test_a_guard_that_can_not_be_started_is_told_with_the_way_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    monkeypatch.setattr(guard, "__file__", str(tmp_path / "not-there.py"))
    made = Guarding(["true"])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.serve)
        with pytest.raises(NoGuardError, match=r"runs\.guard = false"):
            await made.check()
        with pytest.raises(NoGuardError, match="nothing is frozen without a guard"):
            await made.open("r1", 60)
        assert made.pid is None
        nursery.cancel_scope.cancel()


async def test_no_other_child_inherits_the_pipes_but_each_can_be_told_for_the_daemons(tmp_path: Path) -> None:
    made = Guarding(["true"])
    look = "import os; print(*sorted(os.listdir('/proc/self/fd')), os.environ['HYPEMAND_OWNER'].split('-')[0])"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.serve)
        await made.check()
        shown = await trio.run_process(["python3", "-c", look], capture_stdout=True)
        environment = Path(f"/proc/{made.pid}/environ").read_bytes()
        nursery.cancel_scope.cancel()
    *descriptors, owner = shown.stdout.decode().split()
    assert (descriptors, owner) == (["0", "1", "2", "3"], str(os.getpid()))
    assert b"HYPEMAND_OWNER" not in environment
    assert "HYPEMAND_OWNER" not in os.environ


async def test_leases_are_had_again_from_a_guard_that_replaces_another(tmp_path: Path) -> None:
    made = Guarding(["true"])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.serve)
        await made.open("r1", 60)
        first = made.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await made.open("r2", 60)
        assert made.pid not in (None, first)
        for run in ("r1", "r2", "never-was"):
            made.close(run)
        nursery.cancel_scope.cancel()
    assert made.pid is None


async def test_the_status_of_a_lab_without_a_guard_says_so(lab: Lab) -> None:
    shown = await run_cli("status", "-c", lab.write(runs=ALONE).config)
    assert "guard" in shown.stderr
    shown = await run_cli("status", "-c", lab.write(RUN_NOW).config)
    assert "guard" not in shown.stderr
