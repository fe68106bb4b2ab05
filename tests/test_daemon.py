"""The real daemon in a process of its own, on the embedded backend: signals, crashes, edits, and what goes missing."""

import json
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio

from hypemand.core.cadence import jitter
from hypemand.state.lock import StateLock
from tests.processes import ALONE, RUN_NOW, SLOW, DaemonProcess, Lab, instant, run_cli, running_daemon, wait_until

HOURLY = """
[[schedules]]
instance = "web-1"
interval = "1h"
retention = { max_count = 3 }
"""
EACH_MINUTE = HOURLY.replace("1h", "1m")  # too short for retries: what fails, fails at once


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


async def test_the_first_run_is_taken_at_once_recorded_and_followed_by_the_next(lab: Lab) -> None:
    async with running_daemon(lab.write().config) as daemon:
        taken = await daemon.wait_for("snapshot taken", instance_id="web-1")
        following = await daemon.wait_for("next run", instance_id="web-1", times=2)
        assert taken["level"] == "info"
        assert taken["size_bytes"] == 320 * 1024
        assert taken["freeze_s"] > 0
        await daemon.stop()
        assert daemon.lines()[-1]["event"] == "stopped"

    (finished,) = lab.history()
    assert finished["outcome"] == "succeeded"
    assert (finished["run_id"], finished["snapshot_id"]) == (taken["run_id"], taken["run_id"])
    (snapshot,) = lab.snapshots()
    copied = lab.root / "snapshots" / "web-1" / snapshot
    for name in ("memory", "disk"):
        assert (copied / name).read_bytes() == (lab.instance_file().with_name(name)).read_bytes() != b""
    schedule = lab.schedule()
    assert schedule["last_snapshot_id"] == snapshot
    assert schedule["last_run_at"] == finished["started_at"]
    assert schedule["next_run_at"] == following["at"]
    assert parsed(schedule["next_run_at"]) == parsed(finished["due_at"]) + timedelta(hours=1)
    assert "last_error" not in schedule
    assert lab.guest_state() == "Running"


def parsed(at: str) -> datetime:
    return datetime.fromisoformat(at)


async def test_retention_prunes_as_runs_go_by_and_history_says_why(lab: Lab) -> None:
    lab.write(RUN_NOW.replace("max_count = 3", "max_count = 2"))
    async with running_daemon(lab.config) as daemon:
        for times in range(1, 5):
            await daemon.wait_for("snapshot taken", times=times)
            await lab.recorded(times)
            lab.make_due(daemon)
        await daemon.wait_for("snapshot taken", times=5)
        await daemon.stop()
    runs = lab.history()
    assert lab.snapshots() == sorted(run["snapshot_id"] for run in runs[-2:])
    assert [[p["snapshot_id"] for p in run["pruned"]] for run in runs] == [
        [], [], *([run["snapshot_id"]] for run in runs[:3])
    ]  # fmt: skip
    assert all("max_count 2" in reason for run in runs for p in run["pruned"] for reason in p["reasons"])
    assert lab.leftovers() == []


async def test_sigint_ends_an_idle_daemon_well_too(lab: Lab) -> None:
    async with running_daemon(lab.write(HOURLY).config) as daemon:
        await daemon.wait_for("next run")
        daemon.send(signal.SIGINT)
        assert await daemon.ended() == 0


# Stopped in mid-capture.


async def test_sigterm_in_mid_capture_leaves_a_running_guest_and_tells_what_happened(lab: Lab) -> None:
    async with running_daemon(lab.write(backend=SLOW, runs='shutdown_grace = "1s"').config) as daemon:
        await lab.in_mid_capture()
        await daemon.stop()
        (stopping,) = daemon.logged("stopping")
        assert (stopping["signal"], stopping["grace_s"]) == ("SIGTERM", 1.0)
    assert lab.guest_state() == "Running"
    assert (lab.snapshots(), lab.leftovers()) == ([], [])
    (run,) = lab.history()
    assert run["outcome"] == "interrupted"
    assert run["freeze_s"] > 0
    assert run["error"] == lab.schedule()["last_error"]
    assert "stopped during the run" in run["error"]
    assert len(lab.started()) == 1


async def test_a_capture_that_ends_within_the_grace_is_kept(lab: Lab) -> None:
    async with running_daemon(lab.write(backend='copy_rate = "160KiB"').config) as daemon:
        await lab.in_mid_capture()
        await daemon.stop()
    (run,) = lab.history()
    assert (run["outcome"], run["error"]) == ("succeeded", None)
    assert lab.snapshots() == [run["snapshot_id"]]
    assert lab.guest_state() == "Running"


async def test_a_second_sigterm_cuts_the_grace_short(lab: Lab) -> None:
    async with running_daemon(lab.write(backend=SLOW, runs='shutdown_grace = "10m"').config) as daemon:
        await lab.in_mid_capture()
        daemon.send(signal.SIGTERM)
        await daemon.wait_for("stopping")
        await trio.sleep(1)
        assert daemon.alive
        assert lab.guest_state() == "Paused"
        daemon.send(signal.SIGTERM)
        assert await daemon.ended() == 0
        assert [line["grace_s"] for line in daemon.logged("stopping")] == [600.0, 0.0]
    (run,) = lab.history()
    assert run["outcome"] == "interrupted"
    assert lab.guest_state() == "Running"


# Killed in mid-capture.


async def killed_in_mid_capture(lab: Lab) -> None:
    async with running_daemon(lab.write(backend=SLOW, runs=ALONE).config) as daemon:
        await lab.in_mid_capture()
        await daemon.kill()
    assert lab.guest_state() == "Paused"
    assert len(lab.started()) == 1
    assert lab.leftovers()


def assert_settled(lab: Lab) -> None:
    assert lab.guest_state() == "Running"
    assert (lab.snapshots(), lab.leftovers()) == ([], [])
    (run,) = lab.history()
    (started,) = lab.started()
    assert (run["run_id"], run["outcome"]) == (started["run_id"], "interrupted")
    assert run["freeze_s"] > 0
    assert "killed or crashed" in run["error"]
    schedule = lab.schedule()
    assert schedule["last_error"] == run["error"]
    assert schedule["next_run_at"] == started["next_run_at"]


async def test_recover_thaws_the_guest_of_a_killed_daemon(lab: Lab) -> None:
    await killed_in_mid_capture(lab)
    shown = await run_cli("status", "-c", lab.config)
    assert "not settled" in shown.stdout
    done = await run_cli("recover", "-c", lab.config)
    assert (done.status, done.stdout) == (0, "1 of 1 open runs settled\n")
    assert_settled(lab)
    again = await run_cli("recover", "-c", lab.config)
    assert (again.status, again.stdout) == (0, "no open runs\n")
    assert_settled(lab)


async def test_a_new_daemon_thaws_the_guest_of_a_killed_one_by_itself(lab: Lab) -> None:
    await killed_in_mid_capture(lab)
    async with running_daemon(lab.config) as daemon:
        await daemon.wait_for("run interrupted", instance_id="web-1")
        await daemon.wait_for("next run")
        await daemon.stop()
    assert_settled(lab)


async def test_recover_works_with_a_broken_config(lab: Lab) -> None:
    await killed_in_mid_capture(lab)
    lab.replace(lab.config.read_text() + "\nnonsense = [")
    done = await run_cli("recover", "-c", lab.config)
    assert done.status == 0
    assert "1 of 1 open runs settled" in done.stdout
    assert "not TOML" in done.stderr
    assert_settled(lab)


async def test_recover_leaves_the_work_to_a_living_daemon(lab: Lab) -> None:
    async with running_daemon(lab.write(backend='copy_rate = "80KiB"').config) as daemon:
        await lab.in_mid_capture()
        beside = await run_cli("recover", "-c", lab.config)
        assert f"daemon (pid {daemon.pid})" in beside.stdout
        await daemon.wait_for("snapshot taken")
        await lab.recorded()
        idle = await run_cli("recover", "-c", lab.config)
        assert idle.status == 0
        await daemon.stop()
    (run,) = lab.history()
    assert run["outcome"] == "succeeded"


async def test_recover_fails_and_names_the_run_that_is_still_open(lab: Lab) -> None:
    await killed_in_mid_capture(lab)
    (started,) = lab.started()
    lab.instance_file().rename(lab.directory / "aside")
    # It keeps trying for 30 s, and takes up what comes back meanwhile.
    async with trio.open_nursery() as nursery:
        done = []

        async def recover() -> None:
            done.append(await run_cli("recover", "-c", lab.config))

        nursery.start_soon(recover)
        await trio.sleep(3)
        (lab.directory / "aside").rename(lab.instance_file())
    assert (done[0].status, done[0].stdout) == (0, "1 of 1 open runs settled\n")
    assert started["run_id"] in done[0].stderr
    assert_settled(lab)


# Two at once, and the start.


async def test_a_second_daemon_names_the_first_and_leaves_it_alone(lab: Lab) -> None:
    async with running_daemon(lab.write().config) as first:
        await first.wait_for("snapshot taken")
        await first.wait_for("next run", times=2)
        second = await run_cli("run", "-c", lab.config)
        assert second.status == 75
        (line,) = second.stderr.splitlines()
        assert f"daemon (pid {first.pid})" in line
        assert first.alive
        lab.make_due(first)
        await first.wait_for("snapshot taken", times=2)
        await first.stop()


def catches(daemon: DaemonProcess, number: signal.Signals) -> bool:
    """Whether the process has a handler for that signal."""
    status = Path(f"/proc/{daemon.pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


async def test_signals_count_from_the_start_while_recover_still_has_the_state(lab: Lab) -> None:
    lab.write(HOURLY).state.mkdir()
    lock = StateLock.acquire(lab.state, "recover")
    async with running_daemon(lab.config) as daemon:
        await wait_until(lambda: catches(daemon, signal.SIGHUP), "signals are caught")
        daemon.send(signal.SIGHUP)
        await trio.sleep(1)
        assert daemon.alive
        daemon.send(signal.SIGTERM)
        assert await daemon.ended() == 0
    assert not lab.schedule_file().exists()
    lock.release()


async def test_an_edit_during_the_start_is_taken_up_after_it(lab: Lab) -> None:
    lab.write(HOURLY).state.mkdir()
    lock = StateLock.acquire(lab.state, "recover")
    async with running_daemon(lab.config) as daemon:
        await wait_until(lambda: catches(daemon, signal.SIGHUP), "the config has been read")
        lab.write(HOURLY.replace("1h", "2h"))
        await trio.sleep(1)
        lock.release()
        await daemon.wait_for("config in force")
        await daemon.stop()
    assert lab.schedule()["interval"] == "2h"


# Edits of the config.


async def test_an_edit_of_the_config_is_taken_up_by_itself(lab: Lab) -> None:
    two = ("web-1", "web-2")
    async with running_daemon(lab.write(HOURLY, instances=two).config) as daemon:
        await daemon.wait_for("next run", instance_id="web-1")
        before = lab.schedule()
        began = datetime.now(UTC)
        lab.write(HOURLY.replace("1h", "2h") + RUN_NOW.replace("web-1", "web-2"), instances=two)
        await daemon.wait_for("schedule changed", instance_id="web-1")
        await daemon.wait_for("snapshot taken", instance_id="web-2")
        await daemon.wait_for("config in force", schedules=2)
        after = lab.schedule()
        assert (after["interval"], after["created_at"]) == ("2h", before["created_at"])
        cadence = timedelta(hours=2) + jitter("web-1", timedelta(hours=2))
        assert began + cadence <= parsed(after["next_run_at"]) <= datetime.now(UTC) + cadence
        await daemon.stop()
    assert len(lab.history("web-2")) == 1


async def test_a_schedule_taken_out_is_retired_and_goes_on_when_put_back(lab: Lab) -> None:
    other = HOURLY.replace("web-1", "web-2")
    two = ("web-1", "web-2")
    async with running_daemon(lab.write(RUN_NOW + other, instances=two).config) as daemon:
        await daemon.wait_for("snapshot taken")
        await lab.recorded()
        before = lab.schedule()

        lab.write(other, instances=two)
        daemon.send(signal.SIGHUP)
        await daemon.wait_for("schedule retired; its snapshots stay", instance_id="web-1")
        await daemon.wait_for("config in force", schedules=1)
        retired = lab.state / "schedules" / "retired" / "web-1.json"
        assert json.loads(retired.read_text()) == before
        assert not lab.schedule_file().exists()
        assert lab.snapshots() == [before["last_snapshot_id"]]

        since = daemon.mark()
        lab.write(RUN_NOW + other, instances=two)
        daemon.send(signal.SIGHUP)
        await daemon.wait_for("config in force", since=since, schedules=2)
        back = lab.schedule()
        assert not retired.exists()
        for key in ("created_at", "next_run_at", "last_run_at", "last_snapshot_id"):
            assert back[key] == before[key]
        await daemon.stop()
    assert len(lab.history()) == 1  # first_run = "now" is for schedules that are new


async def test_a_pattern_takes_in_every_instance_that_matches_but_an_exact_name_wins(lab: Lab) -> None:
    three = ("web-1", "web-2", "db-1")
    async with running_daemon(lab.write(HOURLY, instances=three).config) as daemon:
        await daemon.wait_for("next run")
        lab.write(HOURLY + RUN_NOW.replace("web-1", "web-*"), instances=three)
        daemon.send(signal.SIGHUP)
        await daemon.wait_for("config in force", schedules=2)
        await daemon.wait_for("snapshot taken", instance_id="web-2")
        await daemon.stop()
    assert (lab.history("web-1"), lab.history("db-1")) == ([], [])
    assert sorted(path.stem for path in lab.schedule_file().parent.glob("*.json")) == ["web-1", "web-2"]


async def test_a_disabled_schedule_keeps_its_history_and_does_not_run(lab: Lab) -> None:
    async with running_daemon(lab.write().config) as daemon:
        await daemon.wait_for("snapshot taken")
        await lab.recorded()
        lab.write(RUN_NOW + "enabled = false\n")
        daemon.send(signal.SIGHUP)
        await daemon.wait_for("config in force")
        lab.make_due(daemon)
        await daemon.wait_for("schedule file read again")
        await trio.sleep(1)
        await daemon.stop()
    assert lab.schedule()["last_snapshot_id"] == lab.snapshots()[0]
    async with running_daemon(lab.config) as daemon:
        await daemon.wait_for("hypemand starts")
        await trio.sleep(2)
        assert daemon.logged("next run") == []
        await daemon.stop()
    assert len(lab.history()) == 1


BROKEN: dict[str, tuple[Callable[[str], str], list[str]]] = {
    "several problems": (
        lambda text: text.replace('"1h"', '"59s"').replace("max_count = 3", "max_count = -1"),
        ["schedules[0].interval", "schedules[0].retention.max_count"],
    ),
    "emptied": (lambda text: "", ["is empty"]),
    "half written": (lambda text: text[: text.index("max_count")], ["is not TOML"]),
}


@pytest.mark.parametrize("how", BROKEN)
async def test_a_broken_edit_changes_nothing_and_every_problem_is_told(lab: Lab, how: str) -> None:
    broken, problems = BROKEN[how]
    async with running_daemon(lab.write().config) as daemon:
        await daemon.wait_for("snapshot taken")
        await lab.recorded()
        good, before = lab.config.read_text(), lab.schedule_file().read_bytes()

        lab.config.write_text(broken(good))  # by itself
        event = "invalid config; the one before stays in force"
        await daemon.wait_for(event, level="error", times=len(problems))
        told = [line["error"] for line in daemon.logged(event)]
        assert all(problem in " ".join(told) for problem in problems)
        assert lab.schedule_file().read_bytes() == before

        # An empty file does not say where the state is; a service's environment does.
        shown = await run_cli("status", "-c", lab.config, env={"STATE_DIRECTORY": str(lab.state)})
        assert shown.status == 0
        assert "web-1" in shown.stdout
        assert all(problem in shown.stderr for problem in problems)

        lab.make_due(daemon)  # SIGHUP
        await daemon.wait_for(event, times=2 * len(problems))
        await daemon.wait_for("snapshot taken", times=2)
        assert daemon.logged("config in force") == []

        lab.replace(good)
        await daemon.wait_for("config in force")
        await daemon.stop()
    assert lab.schedule()["interval"] == "1h"


async def test_a_file_that_is_emptied_and_written_in_pieces_is_only_read_whole(lab: Lab) -> None:
    async with running_daemon(lab.write(HOURLY).config) as daemon:
        await daemon.wait_for("next run")
        text = lab.config.read_text().replace('"1h"', '"3h"')
        for length in (0, len(text) // 3, len(text)):
            lab.config.write_text(text[:length])
            await trio.sleep(0.3)
        await daemon.wait_for("config in force")
        assert daemon.logged("invalid config; the one before stays in force") == []
        await daemon.stop()
    assert lab.schedule()["interval"] == "3h"


async def test_a_config_that_is_gone_changes_nothing(lab: Lab) -> None:
    async with running_daemon(lab.write().config) as daemon:
        await daemon.wait_for("snapshot taken")
        lab.config.unlink()
        await daemon.wait_for("config unreadable; the one before stays in force", level="error")
        lab.make_due(daemon)
        await daemon.wait_for("snapshot taken", times=2)
        await daemon.stop()
    assert [run["outcome"] for run in lab.history()] == ["succeeded"] * 2


async def test_a_config_that_hangs_when_read_delays_no_sigterm(lab: Lab) -> None:
    async with running_daemon(lab.write(HOURLY).config) as daemon:
        await daemon.wait_for("next run")
        lab.config.unlink()
        os.mkfifo(lab.config)  # as a mount that is gone: opening it does not return
        daemon.send(signal.SIGHUP)
        await trio.sleep(4)
        daemon.send(signal.SIGTERM)
        assert await daemon.ended() == 0


async def test_a_new_state_dir_takes_a_restart_and_says_so(lab: Lab) -> None:
    async with running_daemon(lab.write(HOURLY).config) as daemon:
        await daemon.wait_for("next run")
        lab.replace(lab.config.read_text().replace('"state"', '"elsewhere"'))
        daemon.send(signal.SIGHUP)
        await daemon.wait_for("a new state_dir takes a restart", level="warning")
        await daemon.stop()
    assert not (lab.directory / "elsewhere").exists()


# Edits and damage of the state.


async def test_a_hand_edit_of_a_schedule_is_taken_up_on_sighup(lab: Lab) -> None:
    lab.prepare("api-1", managed_by="api", interval="4h")
    async with running_daemon(lab.write(HOURLY, instances=("web-1", "api-1")).config) as daemon:
        await daemon.wait_for("next run", instance_id="api-1")
        lab.edit("api-1", interval="5h", next_run_at=instant(datetime.now(UTC)), note="mine")
        daemon.send(signal.SIGHUP)
        await daemon.wait_for("snapshot taken", instance_id="api-1")
        await daemon.stop()
    after = lab.schedule("api-1")
    (run,) = lab.history("api-1")
    assert (after["interval"], after["note"], after["managed_by"]) == ("5h", "mine", "api")
    assert parsed(after["next_run_at"]) == parsed(run["due_at"]) + timedelta(hours=5)


async def test_a_sighup_during_the_start_counts_once_it_is_over(lab: Lab) -> None:
    lab.prepare("api-1", managed_by="api", interval="4h")
    lab.write(HOURLY + 'first_run = "now"', backend=SLOW, runs=ALONE, instances=("web-1", "api-1"))
    async with running_daemon(lab.config) as daemon:
        await lab.in_mid_capture()
        await daemon.kill()
    lab.instance_file().unlink()
    os.mkfifo(lab.instance_file())  # whoever reads it hangs: settling holds up the start for some seconds
    async with running_daemon(lab.config) as daemon:
        await daemon.wait_for("hypemand starts")
        lab.edit("api-1", interval="5h")
        daemon.send(signal.SIGHUP)
        assert not daemon.logged("API serves"), "the start was over before the signal"
        await daemon.wait_for("schedule file read again", instance_id="api-1")
        await daemon.kill()


async def test_an_invalid_hand_edit_is_set_aside_and_the_schedule_goes_on(lab: Lab) -> None:
    async with running_daemon(lab.write().config) as daemon:
        await daemon.wait_for("snapshot taken")
        await lab.recorded()
        before = lab.schedule()
        lab.edit(interval="1d")
        daemon.send(signal.SIGHUP)
        aside = await daemon.wait_for("invalid state file set aside", level="error")
        assert "interval" in aside["error"]
        await daemon.wait_for("config in force")
        assert lab.schedule() == before
        await daemon.stop()


async def test_a_state_file_cut_in_the_middle_is_set_aside_and_delays_no_other(lab: Lab) -> None:
    three = ("web-1", "web-2", "web-3")
    for instance in three:
        lab.prepare(instance, next_run_at=instant(datetime.now(UTC) - timedelta(seconds=5)))
    whole = lab.schedule_file("web-2").read_bytes()
    lab.schedule_file("web-2").write_bytes(whole[: len(whole) // 2])
    lab.write("".join(HOURLY.replace("web-1", instance) for instance in three), instances=three)
    async with running_daemon(lab.config) as daemon:
        aside = await daemon.wait_for("invalid state file set aside", level="error")
        assert "not JSON" in aside["error"]
        for instance in ("web-1", "web-3"):
            taken = await daemon.wait_for("snapshot taken", instance_id=instance)
            assert taken["late_s"] < 30
        shown = await run_cli("status", "-c", lab.config)
        assert "quarantine" in shown.stderr
        assert "web-2.json" in shown.stderr
        await daemon.stop()
    assert Path(aside["quarantine"]).read_bytes() == whole[: len(whole) // 2]
    assert lab.schedule("web-2")["interval"] == "1h"  # made anew from the config


async def test_a_next_run_in_the_year_9999_is_brought_back_onto_its_grid_and_runs(lab: Lab) -> None:
    soon = datetime.now(UTC) + timedelta(seconds=6)
    hours = (datetime(9999, 1, 1, tzinfo=UTC) - soon) // timedelta(hours=1)
    lab.prepare(next_run_at=instant(soon + hours * timedelta(hours=1)))
    async with running_daemon(lab.write(HOURLY).config) as daemon:
        brought = await daemon.wait_for("next run was further away than one interval; brought back onto its grid")
        assert brought["was"].startswith("9999-01-01") or brought["was"].startswith("9998-12-31")
        taken = await daemon.wait_for("snapshot taken")
        assert parsed(taken["due_at"]) == soon
        await daemon.stop()


async def test_a_state_of_a_newer_format_is_refused_and_left_alone(lab: Lab) -> None:
    lab.prepare("web-1", format=2)
    lab.prepare("web-2")
    lab.schedule_file("web-2").write_text("{")  # not even this is touched
    before = {path: path.read_bytes() for path in lab.state.rglob("*") if path.is_file()}
    refused = await run_cli("run", "-c", lab.write().config)
    assert refused.status == 78
    (line,) = refused.stderr.splitlines()
    assert "newer hypemand" in line
    assert str(lab.schedule_file()) in line
    after = {path: path.read_bytes() for path in lab.state.rglob("*") if path.is_file() and path.name != "lock"}
    assert after == before
    assert not (lab.root / "instances").exists()


async def test_a_state_dir_that_cannot_be_used_is_told_in_one_line(lab: Lab) -> None:
    lab.write().state.write_text("a file stands here")
    refused = await run_cli("run", "-c", lab.config)
    assert refused.status == 1
    (line,) = refused.stderr.splitlines()
    assert str(lab.state) in line


# What a run finds.


@pytest.mark.parametrize("state", ["Paused", "Shutdown", "Unknown"])
async def test_an_instance_in_a_state_that_forbids_it_fails_and_is_left_as_it_is(lab: Lab, state: str) -> None:
    async with running_daemon(lab.write(HOURLY).config) as daemon:
        await daemon.wait_for("next run")
        lab.set_guest_state(state)
        before = lab.instance_file().read_bytes()
        lab.make_due(daemon)
        await daemon.wait_for("run failed", level="error")
        await daemon.stop()
    assert lab.instance_file().read_bytes() == before
    (run,) = lab.history()
    assert run["outcome"] == "failed"
    assert run["freeze_s"] is None
    assert f"instance is {state}" in lab.schedule()["last_error"] == run["error"]
    assert (lab.started(), lab.snapshots()) == ([], [])


async def test_too_little_room_fails_before_any_freeze(lab: Lab) -> None:
    async with running_daemon(lab.write(min_free="900000TiB").config) as daemon:
        failed = await daemon.wait_for("run failed")
        assert "min_free" in failed["error"]
        await daemon.stop()
    (run,) = lab.history()
    assert (run["outcome"], run["freeze_s"]) == ("failed", None)
    assert lab.started() == []
    assert lab.guest_state() == "Running"
    assert (lab.snapshots(), lab.leftovers()) == ([], [])


async def unavailable_and_back(lab: Lab, daemon: DaemonProcess, gone: Path, aside: Path) -> None:
    """With *gone* moved away the run fails and nothing is lost; once it is back, the next one works."""
    snapshots, before = lab.snapshots(), lab.schedule()
    files = sorted(path.name for path in lab.schedule_file().parent.glob("*.json"))
    gone.rename(aside)
    lab.make_due(daemon)
    failed = await daemon.wait_for("run failed")
    assert "mounted" in failed["error"]
    await lab.recorded(2)
    after = lab.schedule()
    assert after["last_error"] == failed["error"]
    assert after["last_snapshot_id"] == before["last_snapshot_id"]
    assert "gone_since_at" not in after
    assert sorted(path.name for path in lab.schedule_file().parent.glob("*.json")) == files
    assert not gone.exists()

    aside.rename(gone)
    assert lab.snapshots() == snapshots
    since = daemon.mark()
    lab.make_due(daemon)
    await daemon.wait_for("snapshot taken", since=since)
    await lab.recorded(3)
    assert "last_error" not in lab.schedule()
    assert lab.snapshots() != snapshots


@pytest.mark.parametrize("gone", ["lab", "lab/instances", "lab/snapshots", "lab/snapshots/.hypemand-catalog"])
async def test_what_is_not_mounted_fails_runs_and_loses_nothing(lab: Lab, gone: str) -> None:
    lab.write(RUN_NOW.replace("1h", "1m").replace("web-1", "web-*"))
    async with running_daemon(lab.config) as daemon:
        await daemon.wait_for("snapshot taken")
        await lab.recorded()
        await unavailable_and_back(lab, daemon, lab.directory / gone, lab.directory / "aside")
        await daemon.stop()
    assert [run["outcome"] for run in lab.history()] == ["succeeded", "failed", "succeeded"]


async def test_a_restart_beside_a_missing_mount_makes_no_empty_one(lab: Lab) -> None:
    lab.write(EACH_MINUTE + 'first_run = "now"\n')
    async with running_daemon(lab.config) as daemon:
        await daemon.wait_for("snapshot taken")
        await daemon.stop()
    lab.root.rename(lab.directory / "aside")
    async with running_daemon(lab.config) as daemon:
        await daemon.wait_for("next run")
        assert any(line["event"].startswith("backend not ready") for line in daemon.lines())
        lab.make_due(daemon)
        await daemon.wait_for("run failed")
        await daemon.stop()
    assert not lab.root.exists()


# The log.


async def test_the_daemon_goes_on_when_the_reader_of_its_log_goes_away(lab: Lab) -> None:
    reader, writer = os.pipe()
    async with running_daemon(lab.write().config, stderr=writer) as daemon:
        os.close(writer)
        await lab.recorded()
        os.close(reader)
        for times in (2, 3):
            lab.make_due(daemon)
            await lab.recorded(times)
        await daemon.stop()
    assert [run["outcome"] for run in lab.history()] == ["succeeded"] * 3


async def test_the_daemon_goes_on_when_nobody_reads_its_log(lab: Lab) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)
    async with running_daemon(lab.write().config, stderr=writer) as daemon:
        await lab.recorded()
        lab.make_due(daemon)
        await lab.recorded(2)
        await daemon.stop()
    assert [run["outcome"] for run in lab.history()] == ["succeeded"] * 2
    os.close(writer)
    os.close(reader)
