"""`hypemand status --check`: what is critical and what only worth a look; the main cases made to happen."""

import copy
import errno
import re
import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from hypemand.backends.base import BackendUnavailable
from hypemand.commands import StateUnreadableError
from hypemand.core.cadence import jitter
from hypemand.core.fields import check_instant, format_instant
from hypemand.engine.requests import Requests
from hypemand.reports import verdict_without_status
from hypemand.surface.api.control import Control
from hypemand.surface.check import Level, Verdict, judge
from hypemand.surface.client import NoAnswerError, Silence
from hypemand.surface.documents import status_document
from tests.processes import ALONE, RUN_NOW, SLOW, Lab, Ran, run_cli, running_daemon
from tests.world import entry, world

NOW = datetime(2026, 3, 9, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
LIMIT = 2 * HOUR + jitter("web-1", HOUR)


# The rules.


def ago(span: timedelta) -> str:
    return format_instant(NOW - span)


def view(**more: Any) -> dict[str, Any]:
    """An instance with which all is well; *more* in its place."""
    return {
        "instance_id": "web-1",
        "state": "Running",
        "covered": True,
        "made": True,
        "schedule": {
            "instance_id": "web-1",
            "interval": "1h",
            "created_at": ago(timedelta(days=9)),
            "next_run_at": ago(-HOUR),
            "settings": {},
        },
        "last_attempt": {"started_at": ago(HOUR / 2), "outcome": "succeeded", "error": None},
        "open_run": False,
        "under_way": False,
        "current_run": None,
        "last_good_at": ago(HOUR / 2),
        "freeze": {"over_budget": None},
        "trouble": None,
        **more,
    }


def schedule(**more: Any) -> dict[str, Any]:
    return {"schedule": {**view()["schedule"], **more}}


def status(*views: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A daemon's answer with nothing to complain of; *more* in its place."""
    return {
        "at": format_instant(NOW),
        "answered_by": "daemon",
        "lock": {"role": "daemon", "pid": 7, "since": None},
        "socket_trouble": None,
        "unreadable_state_files": [],
        "quarantine": [],
        "damaged_log_lines": [],
        "config_problems": [],
        "problems": [],
        "clock_doubts": [],
        "instances": list(views),
        **more,
    }


def from_files(lock: dict[str, Any] | None, why: str = "absent") -> dict[str, Any]:
    return {"answered_by": "files", "lock": lock, "socket_trouble": {"why": why, "message": f"/s: {why}"}}


def attempt(outcome: str, error: str | None = None, since: timedelta = HOUR) -> dict[str, Any]:
    return {"last_attempt": {"started_at": ago(since), "outcome": outcome, "error": error}}


def run(*, under_way: bool, frozen_s: float | None = None, error: str | None = None) -> dict[str, Any]:
    current = {"started_at": ago(timedelta(seconds=50)), "max_freeze_s": 30.0, "frozen_s": frozen_s, "error": error}
    return {"open_run": True, "under_way": under_way, "current_run": current}


DAEMON = {"role": "daemon", "pid": 7, "since": ago(HOUR)}
SINCE_A_MOMENT = {"role": "daemon", "pid": 7, "since": ago(timedelta(seconds=9))}
OFF = {"settings": {"enabled": False}}
OK, WARNING, CRITICAL = Level.OK, Level.WARNING, Level.CRITICAL

CASES: dict[str, tuple[dict[str, Any], Level, str]] = {
    "all well": (status(view()), OK, "1 schedule, last good snapshot at most 30m old"),
    "nothing to do": (status(), OK, "0 schedules"),
    # Age.
    "two intervals and jitter": (status(view(last_good_at=ago(LIMIT))), OK, ""),
    "older": (status(view(last_good_at=ago(LIMIT + HOUR / 60))), CRITICAL, "last good snapshot 2h"),
    "none since long": (
        status(view(last_good_at=None)),
        CRITICAL,
        "no good snapshot, and its schedule was made 9d ago",
    ),
    "none, and young": (status(view(last_good_at=None, **schedule(created_at=ago(HOUR)))), OK, ""),
    "old, but disabled": (status(view(last_good_at=None, **schedule(**OFF))), OK, "0 schedules"),
    "not made yet": (status(view(made=False, last_good_at=None)), OK, ""),
    "dated in the future": (status(view(last_good_at=ago(-HOUR))), OK, "at most 0s old"),
    # Runs.
    "failed": (status(view(**attempt("failed", "no room"))), CRITICAL, "last run failed 1h ago: no room"),
    "interrupted": (status(view(**attempt("interrupted", "killed"))), CRITICAL, "last run interrupted 1h ago: killed"),
    "a success with an error": (status(view(**attempt("succeeded", "one left"))), WARNING, "but: one left"),
    "failed, but disabled": (status(view(**attempt("failed", "x"), **schedule(**OFF))), OK, ""),
    "failed, of an earlier schedule": (status(view(**attempt("failed", "x", 10 * 24 * HOUR))), OK, ""),
    "an error of a run that is forgotten": (
        status(view(last_attempt=None, **schedule(last_error="long ago"))),
        WARNING,
        "last error: long ago",
    ),
    # Frozen.
    "paused in a run": (status(view(state="Paused", **run(under_way=True, frozen_s=31.0))), OK, ""),
    "beyond its budget": (
        status(view(state="Paused", **run(under_way=True, frozen_s=31.5))),
        CRITICAL,
        "web-1: stands still for 32 s in a run, longer than its budget of 30 s",
    ),
    "beyond it, as far as files tell": (
        status(view(state="Paused", **run(under_way=True))),
        CRITICAL,
        "stands still for 50 s",
    ),
    "a long run of a guest that runs": (status(view(**run(under_way=True))), OK, ""),
    "paused, not settled": (
        status(view(state="Paused", **run(under_way=False, error="no answer"))),
        CRITICAL,
        "stands still: its run of 50s ago is not settled (no answer)",
    ),
    "not settled, and no answer": (status(view(state=None, **run(under_way=False))), CRITICAL, "may stand still"),
    "not settled, but it runs": (status(view(**run(under_way=False))), WARNING, "is not settled yet"),
    "paused by somebody": (status(view(state="Paused")), CRITICAL, "is Paused, and not by a run of hypemand"),
    "paused by somebody, and disabled": (status(view(state="Paused", **schedule(**OFF))), OK, ""),
    "frozen, though disabled": (
        status(view(state="Paused", **run(under_way=False), **schedule(**OFF))),
        CRITICAL,
        "stands still",
    ),
    # The daemon.
    "down": (status(view(), **from_files(None)), CRITICAL, "the daemon is not running"),
    "its guard at work": (
        status(view(), **from_files({"role": "guard", "pid": 9, "since": None})),
        CRITICAL,
        "not running; the state is in use by guard (pid 9)",
    ),
    "nobody listens": (status(view(), **from_files(DAEMON)), CRITICAL, "(pid 7) does not answer: /s: absent"),
    "starting": (status(view(), **from_files(SINCE_A_MOMENT)), WARNING, "starts, or stops"),
    "hung": (status(view(), **from_files(SINCE_A_MOMENT, "hung")), CRITICAL, "does not answer: /s: hung"),
    "forbidden": (status(view(), **from_files(DAEMON, "forbidden")), WARNING, "can't be asked: /s: forbidden"),
    "another version": (status(view(), **from_files(DAEMON, "strange")), WARNING, "can't be asked"),
    # Worth a look.
    "uncovered": (
        status(view(), *(view(instance_id=f"db-{n}", covered=False, schedule=None) for n in range(5))),
        WARNING,
        "without a schedule: db-0, db-1, db-2, and 2 more",
    ),
    "the clock": (status(view(), clock_doubts=["it jumped"]), WARNING, "clock: it jumped"),
    "a state file": (
        status(view(), unreadable_state_files=["a: bad", "b: bad"]),
        WARNING,
        "invalid: a: bad, and 1 more",
    ),
    "quarantine": (status(view(), quarantine=["web-2.json: empty"]), WARNING, "in quarantine: web-2.json"),
    "the run log": (status(view(), damaged_log_lines=["runs.jsonl:3"]), WARNING, "run log damaged: runs.jsonl:3"),
    "the config": (status(view(), config_problems=["c: bad"]), WARNING, "config invalid: c: bad"),
    "a backend": (status(view(), problems=["backend lab: away"]), WARNING, "problem: backend lab: away"),
    "an instance": (status(view(state=None, trouble="away")), WARNING, "web-1: away"),
    "over budget": (status(view(freeze={"over_budget": "95 s"})), WARNING, "its next run will not begin"),
}


@pytest.mark.parametrize(("told", "level", "text"), CASES.values(), ids=CASES.keys())
def test_each_thing_is_judged_by_its_rule(told: dict[str, Any], level: Level, text: str) -> None:
    before = copy.deepcopy(told)
    verdict = judge(told, NOW)
    assert verdict.level is level
    assert text in verdict.line
    assert verdict.line.startswith(f"{level.name}: ")
    assert told == before


def test_the_worst_comes_first_and_the_line_stays_one_line() -> None:
    error = "first\nsecond | third " + "x" * 1000
    views = [view(instance_id=f"web-{n}", **attempt("failed", error)) for n in range(9)]
    verdict = judge(status(*views, clock_doubts=["it jumped"]), NOW)
    assert [finding.level for finding in verdict.findings] == [CRITICAL] * 9 + [WARNING]
    assert verdict.line.endswith("; and 5 more")
    assert "\n" not in verdict.line
    assert "|" not in verdict.line
    assert len(verdict.line) < 2000


def test_who_asks_about_one_instance_is_told_of_no_other_that_is_uncovered() -> None:
    other = view(instance_id="db-1", covered=False, schedule=None)
    assert judge(status(view(), other), NOW, only="web-1").level is OK
    assert judge(status(other), NOW, only="db-1").level is WARNING


def silent(number: int, why: Silence) -> Verdict:
    return verdict_without_status(
        StateUnreadableError(OSError(number, "no"), Path("/state"), NoAnswerError(why, Path("/run/s")))
    )


def test_who_may_not_read_the_state_is_told_all_the_same_that_nobody_listens() -> None:
    for why in (Silence.ABSENT, Silence.HUNG):
        verdict = silent(errno.EACCES, why)
        assert verdict.level is CRITICAL
        assert "/run/s" in verdict.line
    assert silent(errno.EACCES, Silence.FORBIDDEN).level is Level.UNKNOWN
    assert silent(errno.EIO, Silence.ABSENT).level is Level.UNKNOWN


# Made to happen: in virtual time.


async def test_a_guest_that_can_not_be_resumed_is_critical_once_its_budget_is_over(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with world(tmp_path, entry("web-1", HOUR, max_freeze=timedelta(seconds=20))) as made:
        control = Control(made.engine, disk=made.disk)
        with made.engine.events.heard_by(control.hear):
            made.backend.fail("resume", "web-1", BackendUnavailable("away"))
            await made.engine.scheduler.serving.wait()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(Requests(made.engine).run_now, made.schedule("web-1").instance_id)
                await trio.sleep(15)
                assert (await judged(control)).level is OK
                await trio.sleep(15)
                verdict = await judged(control)
                assert verdict.level is CRITICAL
                assert "web-1: stands still for 30 s in a run, longer than its budget of 20 s" in verdict.line
                made.backend.heal("resume", "web-1")
            assert "last run succeeded" in (await judged(control)).line


async def judged(control: Control) -> Verdict:
    told = status_document(await control.overview())
    return judge(told, check_instant(told["at"]))


async def test_a_schedule_whose_runs_are_all_skipped_becomes_stale(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path, entry("web-1", HOUR), max_freeze=timedelta(days=9)) as made:
        control = Control(made.engine, disk=made.disk)
        with made.engine.events.heard_by(control.hear):
            await trio.sleep(1.2 * HOUR.total_seconds())
            assert (await judged(control)).level is OK
            made.backend.fail("publish", "web-1")  # the next run hangs, its guest runs
            await trio.sleep(1.5 * HOUR.total_seconds())
            assert (await judged(control)).level is OK
            await trio.sleep(0.7 * HOUR.total_seconds())
            verdict = await judged(control)
            assert verdict.level is CRITICAL
            assert "last good snapshot 2h" in verdict.line


# Made to happen: by a real daemon.


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


async def check(lab: Lab, *args: str) -> Ran:
    told = await run_cli("status", "--check", "-c", lab.config, *args)
    (line,) = told.stdout.splitlines()
    assert line.startswith(("OK: ", "WARNING: ", "CRITICAL: ", "UNKNOWN: ")[told.status])
    return told


async def test_from_well_to_uncovered_to_hung_to_down(lab: Lab) -> None:
    before = await check(lab.write())
    assert before.status == 2  # not started yet
    async with running_daemon(lab.config) as daemon:
        await daemon.wait_for("snapshot taken")
        await lab.recorded()
        well = await check(lab)
        assert (well.status, well.stderr) == (0, "")
        assert "1 schedule, last good snapshot at most" in well.stdout
        lab.write(instances=("web-1", "db-1"))
        daemon.send(signal.SIGHUP)
        await daemon.wait_for("config in force")
        uncovered = await check(lab)
        assert uncovered.status == 1
        assert "without a schedule: db-1" in uncovered.stdout
        assert (await check(lab, "web-1")).status == 0
        as_json = (await run_cli("status", "--check", "--json", "-c", lab.config)).json
        assert as_json["level"] == "WARNING"
        assert [finding["level"] for finding in as_json["findings"]] == ["WARNING"]
        lab.replace(lab.config.read_text() + "bogus = 1\n")
        invalid = await check(lab, "web-1")
        assert invalid.status == 1
        assert "config invalid" in invalid.stdout
        lab.write()
        daemon.send(signal.SIGSTOP)
        hung = await check(lab)
        assert hung.status == 2
        assert f"the daemon (pid {daemon.pid}) does not answer" in hung.stdout
        shown = await run_cli("status", "-c", lab.config)
        assert shown.status == 0
        assert re.search("^web-1 +Running +1h ", shown.stdout, re.MULTILINE)
        assert f"daemon (pid {daemon.pid}) gives no answer over its socket; this is from its files" in shown.stderr
        daemon.send(signal.SIGCONT)
        await daemon.stop()
    down = await check(lab)
    assert down.status == 2
    assert "the daemon is not running" in down.stdout


async def test_a_schedule_without_a_snapshot_for_long_and_a_run_that_fails_are_critical(lab: Lab) -> None:
    two = {"web-1": "Running", "web-2": "Paused"}
    lab.write(RUN_NOW.replace('"now"', '"00:00"') + RUN_NOW.replace("web-1", "web-2"), instances=two)
    lab.prepare(settings={"first_run": "00:00"})
    async with running_daemon(lab.config) as daemon:
        await daemon.wait_for("run failed", instance_id="web-2")
        await lab.recorded(instance="web-2")
        stale = await check(lab, "web-1")
        assert stale.status == 2
        assert "web-1: no good snapshot, and its schedule was made 2d ago" in stale.stdout
        failing = await check(lab, "web-2")
        assert failing.status == 2
        assert "web-2: last run failed" in failing.stdout
        assert "web-2: is Paused, and not by a run of hypemand" in failing.stdout
        await daemon.stop()


async def test_a_guest_that_a_killed_daemon_left_frozen_is_critical_until_it_is_settled(lab: Lab) -> None:
    async with running_daemon(lab.write(backend=SLOW, runs=ALONE).config) as daemon:
        await lab.in_mid_capture()
        assert (await check(lab)).status == 0
        await daemon.kill()
    frozen = await check(lab)
    assert frozen.status == 2
    assert "web-1: stands still: its run of" in frozen.stdout
    assert "the daemon is not running" in frozen.stdout
    assert (await run_cli("recover", "-c", lab.config)).status == 0
    settled = await check(lab)
    assert "stands still" not in settled.stdout
    assert "last run interrupted" in settled.stdout


async def test_what_can_not_be_told_is_unknown(lab: Lab, tmp_path: Path) -> None:
    missing = await run_cli("status", "--check", "-c", tmp_path / "nowhere.toml")
    assert (missing.status, missing.stdout.partition(":")[0]) == (3, "UNKNOWN")
    lab.write()
    nobody = await check(lab, "web-9")
    assert nobody.status == 3
    assert "'web-9'" in nobody.stdout
    lab.state.write_text("a file stands here")
    unreadable = await check(lab)
    assert unreadable.status == 3
    assert str(lab.state) in unreadable.stdout


async def test_with_a_daemon_the_state_need_not_be_readable(lab: Lab, tmp_path: Path) -> None:
    async with running_daemon(lab.write().config) as daemon:
        await daemon.wait_for("snapshot taken")
        await lab.recorded()
        other = tmp_path / "other.toml"  # of somebody who knows the socket, and may see nothing else
        nothing = tmp_path / "nothing"
        nothing.write_text("")
        other.write_text(f'state_dir = "{nothing}"\n[api]\nsocket = "{lab.state}/api.sock"\n')
        assert (await run_cli("status", "--check", "-c", other)).status == 0
        for command in ("plan", "history"):
            told = await run_cli(command, "-c", other)
            assert (told.status, told.stdout.count("web-1") > 0) == (0, True)
        await daemon.stop()
    gone = await run_cli("status", "--check", "-c", other)
    assert gone.status == 3
