"""The hooks of a real daemon: beside its runs, at its reload, its stop and its death."""

import json
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from tests.processes import RUN_NOW, SLOW, Lab, guards_of, run_cli, running_daemon, wait_until


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


def hook(lab: Lab, body: str, name: str = "page-me") -> Path:
    path = lab.directory / name
    path.write_text(f"#!/bin/sh\ncd {lab.directory}\n{body}\n")
    path.chmod(0o755)
    return path


def with_hooks(lines: str, schedules: str = RUN_NOW) -> str:
    return f"[hooks]\n{lines}\n{schedules}"


def read(lab: Lab, name: str) -> list[str]:
    path = lab.directory / name
    return path.read_text().splitlines() if path.exists() else []


def lives(pid: str) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    return False


async def test_a_failed_run_is_told_to_a_hook_that_hangs_while_the_next_runs_are_on_time(lab: Lab) -> None:
    pager = hook(lab, "cat > document.new; env > environment; mv document.new document; echo $$ >> pids; sleep 1000")
    sign = hook(lab, "echo $HYPEMAND_INSTANCE_ID >> alive", "sign-of-life")
    lines = f'on_failure = ["{pager}"]\non_success = ["{sign}"]'
    lab.write(
        with_hooks(lines, RUN_NOW + RUN_NOW.replace("web-1", "web-2")),
        instances={"web-1": "Paused"} | {"web-2": "Running"},
    )
    async with running_daemon(lab.config) as daemon:
        await wait_until(lambda: read(lab, "pids"), "the hook is called")
        (failed,) = lab.history("web-1")
        told = json.loads((lab.directory / "document").read_bytes())
        assert told == {key: value for key, value in failed.items() if key != "event"}
        assert told["outcome"] == "failed"
        assert "is Paused" in told["error"]
        environment = read(lab, "environment")
        assert not any(line.startswith("HYPEMAND_OWNER=") for line in environment)
        assert f"HYPEMAND_RUN_ID={failed['run_id']}" in environment
        for times in (2, 3):
            await wait_until(lambda: len(read(lab, "alive")) == times - 1, "the other hook is called")  # noqa: B023
            lab.make_due(daemon, "web-1", "web-2")
            await lab.recorded(times, "web-2")
        assert {run["outcome"] for run in lab.history("web-2")} == {"succeeded"}
        assert max(run["late_s"] for run in (*lab.history("web-2"), *lab.history("web-1"))) < 5
        await wait_until(lambda: len(read(lab, "pids")) == 3, "each failure is told")
        assert all(map(lives, read(lab, "pids")))
        await daemon.stop()
        assert len(daemon.logged("hook killed", why="hypemand stops", instance_id="web-1")) == 3
    assert not any(map(lives, read(lab, "pids")))


async def test_a_reload_puts_other_hooks_in_force(lab: Lab) -> None:
    first = hook(lab, "echo first >> called")
    lab.write(with_hooks(f'on_success = ["{first}"]'))
    async with running_daemon(lab.config) as daemon:
        await wait_until(lambda: read(lab, "called"), "the hook is called")
        second = hook(lab, "echo second >> called; exit 4", "other")
        lab.write(with_hooks(f'on_success = ["{second}"]\ntimeout = "5s"'))
        daemon.send(signal.SIGHUP)
        await daemon.wait_for("config in force")
        await lab.recorded(1)
        lab.make_due(daemon)
        failed = await daemon.wait_for("hook failed", status=4)
        assert (failed["command"], failed["instance_id"]) == (str(second), "web-1")
        await daemon.stop()
    assert read(lab, "called") == ["first", "second"]


async def test_a_run_that_the_stop_cut_short_is_told_before_the_end(lab: Lab) -> None:
    pager = hook(lab, "sleep 0.3; echo $HYPEMAND_OUTCOME >> called")
    lab.write(with_hooks(f'on_failure = ["{pager}"]'), backend=SLOW, runs='shutdown_grace = "1s"')
    async with running_daemon(lab.config) as daemon:
        await lab.in_mid_capture()
        await daemon.stop()
    (run,) = lab.history()
    assert read(lab, "called") == [run["outcome"]]


async def test_a_run_that_a_start_settles_is_told(lab: Lab) -> None:
    pager = hook(lab, "echo $HYPEMAND_OUTCOME >> called")
    lab.write(with_hooks(f'on_failure = ["{pager}"]'), backend=SLOW, runs="guard = false")
    async with running_daemon(lab.config) as daemon:
        await lab.in_mid_capture()
        await daemon.kill()
    async with running_daemon(lab.config) as daemon:
        await wait_until(lambda: read(lab, "called"), "the hook is called")
        await daemon.stop()
    assert read(lab, "called")[0] == "interrupted"


async def test_a_run_that_the_guard_settles_is_told_at_once_and_not_again(lab: Lab) -> None:
    pager = hook(lab, "echo $HYPEMAND_OUTCOME >> called; echo $HYPEMAND_ERROR; env | grep OWNER")
    lab.write(with_hooks(f'on_failure = ["{pager}"]'), backend=SLOW)
    async with running_daemon(lab.config) as daemon:
        await lab.in_mid_capture()
        await daemon.kill()
        await wait_until(lambda: not guards_of(daemon.pid), "the guard has done its work")
        assert read(lab, "called") == ["interrupted"]
        assert [line["line"] for line in daemon.logged("hook output")] == [lab.history()[0]["error"]]
    async with running_daemon(lab.config) as daemon:
        await daemon.wait_for("next run")
        await daemon.stop()
    assert read(lab, "called") == ["interrupted"]


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ('on_failure = ["/bin/sleep", "1000"]\ntimeout = "1s"', "hook killed"),
        ('on_failure = ["relative"]', "no hooks are run: the config can't be read"),
    ],
)
async def test_the_guard_settles_runs_also_with_hooks_that_hang_or_can_not_be_read(
    lab: Lab, lines: str, told: str
) -> None:
    async with running_daemon(lab.write(backend=SLOW).config) as daemon:
        await lab.in_mid_capture()
        daemon.send(signal.SIGSTOP)
        lab.write(with_hooks(lines), backend=SLOW)
        await daemon.kill()
        await wait_until(lambda: not guards_of(daemon.pid), "the guard has done its work")
        assert len(daemon.logged(told)) == 1
    assert lab.guest_state() == "Running"
    assert [run["outcome"] for run in lab.history()] == ["interrupted"]


async def test_a_run_that_recover_settles_is_told(lab: Lab) -> None:
    pager = hook(lab, "echo $HYPEMAND_OUTCOME >> called; echo paged")
    lab.write(with_hooks(f'on_failure = ["{pager}"]'), backend=SLOW, runs="guard = false")
    async with running_daemon(lab.config) as daemon:
        await lab.in_mid_capture()
        await daemon.kill()
    recovered = await run_cli("recover", "-c", lab.config)
    assert recovered.status == 0
    assert recovered.stdout == "1 of 1 open runs settled\n"
    assert "paged" in recovered.stderr
    assert read(lab, "called") == ["interrupted"]


async def test_a_hook_outlives_a_daemon_that_is_killed_also_when_it_still_writes(lab: Lab) -> None:
    pager = hook(lab, "echo $$ > pid; while [ ! -e go ]; do sleep 0.05; done; echo on; echo the way >&2; echo > paged")
    lab.write(with_hooks(f'on_failure = ["{pager}"]'), instances={"web-1": "Paused"})
    async with running_daemon(lab.config) as daemon:
        await wait_until(lambda: read(lab, "pid"), "the hook is called")
        assert guards_of(daemon.pid)
        await daemon.kill()
        await wait_until(lambda: not guards_of(daemon.pid), "the guard has done its work")
        assert all(map(lives, read(lab, "pid")))
        (lab.directory / "go").touch()
        await wait_until(lambda: read(lab, "paged"), "the hook goes on to its end")
        await wait_until(lambda: not any(map(lives, read(lab, "pid"))), "and ends")


async def test_check_config_warns_of_a_hook_that_can_not_be_started(lab: Lab) -> None:
    not_executable = lab.directory / "config.toml"
    lines = f'on_failure = ["/no/such/pager"]\non_success = ["{not_executable}"]'
    checked = await run_cli("check-config", "-c", lab.write(with_hooks(lines)).config)
    assert checked.status == 0
    assert "hooks.on_failure: /no/such/pager is not there" in checked.stderr
    assert f"hooks.on_success: {not_executable} can't be executed" in checked.stderr
    checked = await run_cli("check-config", "-c", lab.write(with_hooks(f'on_failure = ["{hook(lab, "")}"]')).config)
    assert "hooks" not in checked.stderr
