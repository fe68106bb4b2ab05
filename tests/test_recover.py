"""`hypemand recover` as real processes: twice, at once, killed, beside a daemon. Each run has one finished line."""

import random
import socket
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trio

from tests.processes import (
    ALONE,
    HOURLY_MANY,
    ROOT,
    SLOW,
    Lab,
    Ran,
    command,
    environment,
    run_cli,
    running_daemon,
    wait_until,
)

GUESTS = ("web-1", "web-2", "web-3")


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


async def killed_with_open_runs(lab: Lab) -> None:
    """A daemon that was killed while three guests stood still."""
    lab.write(HOURLY_MANY, instances=GUESTS, backend=SLOW + "\nconcurrency = 3", runs=f"concurrency = 3\n{ALONE}")
    async with running_daemon(lab.config) as daemon:
        for guest in GUESTS:
            await lab.in_mid_capture(guest)
        await daemon.kill()
    assert [lab.guest_state(guest) for guest in GUESTS] == ["Paused"] * 3


def assert_settled_once(lab: Lab) -> None:
    assert [lab.guest_state(guest) for guest in GUESTS] == ["Running"] * 3
    assert lab.leftovers() == []
    started = {line["instance_id"]: line["run_id"] for line in lab.started()}
    assert len(lab.started()) == 3
    for guest in GUESTS:
        (run,) = lab.history(guest)
        assert (run["run_id"], run["outcome"]) == (started[guest], "interrupted")
        # Who was killed between thaw and record took the length with it.
        assert run["found_frozen"] or "how long it stood still is not known" in run["error"]
        assert lab.schedule(guest)["last_error"] == run["error"]


async def recover(lab: Lab) -> Ran:
    return await run_cli("recover", "-c", lab.config)


async def at_once(lab: Lab, times: int) -> list[Ran]:
    done: list[Ran] = []

    async def one() -> None:
        done.append(await recover(lab))

    async with trio.open_nursery() as nursery:
        for _ in range(times):
            nursery.start_soon(one)
    return done


async def test_of_several_at_once_exactly_one_settles_each_run(lab: Lab) -> None:
    await killed_with_open_runs(lab)
    done = await at_once(lab, 3)
    assert [ran.status for ran in done] == [0, 0, 0]
    told = sorted(ran.stdout for ran in done)
    assert told == ["3 of 3 open runs settled\n", "no open runs\n", "no open runs\n"]
    assert_settled_once(lab)


async def test_again_and_again_it_changes_nothing(lab: Lab) -> None:
    await killed_with_open_runs(lab)
    assert (await recover(lab)).status == 0
    before = (lab.state / "runs.jsonl").read_bytes()
    files = {path: path.read_bytes() for path in (lab.state / "schedules").glob("*.json")}
    for _ in range(2):
        again = await recover(lab)
        assert (again.status, again.stdout) == (0, "no open runs\n")
    assert (lab.state / "runs.jsonl").read_bytes() == before
    assert {path: path.read_bytes() for path in (lab.state / "schedules").glob("*.json")} == files
    assert_settled_once(lab)


async def test_killed_at_any_moment_and_run_again_it_settles_each_run_once(lab: Lab) -> None:
    await killed_with_open_runs(lab)
    chance = random.Random(4)
    killed = 0
    for _ in range(8):
        process = await trio.lowlevel.open_process(
            command("recover", "-c", lab.config),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
            env=environment(),
        )
        # It has the state from the moment that the lock names it.
        owner = f'"pid":{process.pid}'
        await wait_until(
            lambda owner=owner, process=process: (
                owner in (lab.state / "lock").read_text() or process.poll() is not None
            ),  # type: ignore[misc]
            "recover has the state",
        )
        await trio.sleep(chance.random() * 0.1)
        killed += process.poll() is None
        process.kill()
        await process.wait()
    assert killed
    assert (await recover(lab)).status == 0
    assert_settled_once(lab)


async def test_beside_a_daemon_that_starts_exactly_one_of_them_settles_each_run(lab: Lab) -> None:
    await killed_with_open_runs(lab)
    async with running_daemon(lab.config) as daemon:
        done = await at_once(lab, 2)
        await wait_until(lambda: all(lab.history(guest) for guest in GUESTS), "the runs are settled")
        await daemon.wait_for("next run")
        await daemon.stop()
    assert [ran.status for ran in done] == [0, 0]
    assert_settled_once(lab)


async def test_beside_a_daemon_in_mid_capture_it_touches_nothing_and_tells_what_is_under_way(lab: Lab) -> None:
    async with running_daemon(lab.write(backend='copy_rate = "20KiB"').config) as daemon:
        await lab.in_mid_capture()
        (started,) = lab.started()
        beside = await recover(lab)
        assert (beside.status, beside.stderr) == (0, "")
        assert f"left to hypemand daemon (pid {daemon.pid})" in beside.stdout
        assert f"under way there: web-1: run {started['run_id']}" in beside.stdout
        assert (lab.guest_state(), lab.history()) == ("Paused", [])
        await daemon.wait_for("snapshot taken")
        await lab.recorded()
        await daemon.stop()
    (run,) = lab.history()
    assert run["outcome"] == "succeeded"


async def test_beside_a_daemon_that_can_not_settle_a_run_it_fails_and_names_it(lab: Lab) -> None:
    await killed_with_open_runs(lab)
    lab.instance_file("web-2").rename(lab.directory / "aside")
    (left,) = [line["run_id"] for line in lab.started() if line["instance_id"] == "web-2"]
    async with running_daemon(lab.config) as daemon:
        await wait_until(lambda: lab.history("web-1") and lab.history("web-3"), "the others are settled")
        beside = await recover(lab)
        assert beside.status == 1
        (told,) = beside.stderr.splitlines()
        assert told.startswith(f"hypemand: still open: web-2: run {left}: ")
        assert "instance.json is missing" in told
        shown = await run_cli("status", "web-2", "-c", lab.config)
        assert "not settled" in shown.stdout
        (lab.directory / "aside").rename(lab.instance_file("web-2"))
        assert (await recover(lab)).status in (0, 1)
        await wait_until(lambda: lab.history("web-2"), "settled")
        await daemon.stop()
    assert_settled_once(lab)


async def test_a_daemon_that_is_killed_while_it_waits_is_taken_over_from(lab: Lab) -> None:
    done: list[Ran] = []

    async def beside() -> None:
        done.append(await recover(lab))

    async with running_daemon(lab.write(backend=SLOW, runs=ALONE).config) as daemon, trio.open_nursery() as nursery:
        await lab.in_mid_capture()
        nursery.start_soon(beside)
        await trio.sleep(2)
        await daemon.kill()
    assert (done[0].status, done[0].stdout) == (0, "1 of 1 open runs settled\n")
    assert lab.guest_state() == "Running"


async def test_the_length_of_the_freeze_is_taken_from_the_mark_of_the_pause(lab: Lab) -> None:
    await killed_with_open_runs(lab)
    paused_at = {guest: datetime.fromisoformat(lab.guest(guest)["paused_at"]) for guest in GUESTS}
    await trio.sleep(1.5)
    before = datetime.now(UTC)
    assert (await recover(lab)).status == 0
    after = datetime.now(UTC)
    for guest in GUESTS:
        (run,) = lab.history(guest)
        assert (before - paused_at[guest]).total_seconds() <= run["freeze_s"]
        assert run["freeze_s"] <= (after - paused_at[guest]).total_seconds()
        assert f"resumed after {run['freeze_s']:.1f} s" in run["error"]


async def test_nobody_is_asked_at_a_socket_that_a_service_manager_holds_for_a_daemon_that_is_gone(lab: Lab) -> None:
    await killed_with_open_runs(lab)
    path = lab.state / "api.sock"
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as held:
        held.bind(str(path))
        held.listen()
        held.setblocking(False)
        done = await recover(lab)
        assert (done.status, done.stdout) == (0, "3 of 3 open runs settled\n")
        with pytest.raises(BlockingIOError):  # who comes there has the daemon started
            held.accept()
    assert_settled_once(lab)


async def test_with_a_config_that_can_not_be_read_open_runs_are_settled_by_what_the_run_log_knows(lab: Lab) -> None:
    await killed_with_open_runs(lab)
    lab.config.unlink()
    lab.config.mkdir()
    done = await run_cli("recover", "-c", lab.config, env={"STATE_DIRECTORY": str(lab.state)})
    assert (done.status, done.stdout) == (0, "3 of 3 open runs settled\n")
    assert "going on with the state in" in done.stderr
    assert_settled_once(lab)


async def test_a_config_that_is_named_and_not_there_is_no_success(lab: Lab) -> None:
    lab.directory.mkdir(exist_ok=True)
    wrong = await run_cli("recover", "-c", lab.directory / "typo.toml", env={"STATE_DIRECTORY": str(lab.state)})
    assert (wrong.status, wrong.stdout) == (78, "")
    assert "typo.toml can't be read" in wrong.stderr
