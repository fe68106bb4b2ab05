"""`hypemand run-now` beside a real daemon: what it prints where while a run goes on, and how it ends."""

import json
import os
import pty
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import trio

from hypemand.surface.run_progress import Progress
from tests.processes import ALONE, ROOT, Lab, Ran, command, environment, run_cli, running_daemon, wait_until
from tests.serving_lab import TOKEN, ServingLab, serving_lab

SCHEDULES = """
[[schedules]]
instance = "web-*"
backend = "lab"
interval = "24h"
name_prefix = "nightly"
retention = { max_count = 1 }
[[schedules]]
instance = "off-1"
backend = "lab"
interval = "24h"
enabled = false
[[schedules]]
instance = "slow-*"
backend = "slow"
interval = "24h"
[backends.slow]
type = "embedded"
root = "slow"
copy_rate = "80KiB"
concurrency = 3
instances = { slow-1 = { memory = "64KiB", disk = "256KiB" }, slow-2 = { memory = "64KiB", disk = "256KiB" } }
"""
STEPS = ("run begins", "paused", "captured 320.0 KiB", "resumed after", "is complete")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServingLab]:
    """A lab with one daemon for all tests of this module; each takes an instance of its own."""
    instances = ("web-1", "web-2", "web-3", "off-1", "db-1")
    with serving_lab(tmp_path_factory.mktemp("lab"), SCHEDULES, instances) as made:
        yield made


async def run_now(lab: Lab, instance: str, *args: str) -> Ran:
    return await run_cli("run-now", instance, "-c", lab.config, *args)


async def test_in_a_pipe_stdout_has_the_snapshots_id_alone_and_stderr_each_step(lab: ServingLab) -> None:
    first = await run_now(lab, "web-1")
    assert first.status == 0
    (snapshot,) = lab.snapshots("web-1")
    assert first.stdout == f"{snapshot}\n"
    assert_in_order(first.stderr.splitlines(), *STEPS)
    second = await run_now(lab, "web-1")
    assert_in_order(second.stderr.splitlines(), *STEPS, "pruned nightly-")
    assert "max_count 1" in second.stderr
    assert lab.snapshots("web-1") == [second.stdout.strip()] != [snapshot]
    table = (await run_cli("history", "web-1", "-c", lab.config)).stdout.splitlines()
    assert [line.count("succeeded (manual)") for line in table] == [0, 1, 1]


def assert_in_order(lines: list[str], *parts: str) -> None:
    assert len(lines) == len(parts), lines
    assert all(part in line for part, line in zip(parts, lines, strict=True)), lines
    assert all(line.startswith("web-1: ") for line in lines)


async def test_as_json_stdout_has_the_line_of_the_history(lab: ServingLab) -> None:
    told = await run_now(lab, "web-2", "--json")
    assert told.status == 0
    assert told.json == (await run_cli("history", "web-2", "-c", lab.config, "--json")).json[-1]
    assert (told.json["trigger"], told.json["outcome"]) == ("manual", "succeeded")


async def test_a_run_that_fails_is_told_on_stderr_and_by_the_exit_status(lab: ServingLab) -> None:
    lab.set_guest_state("Paused", "web-3")
    told = await run_now(lab, "web-3")
    assert (told.status, told.stdout) == (1, "")
    assert told.stderr.startswith("hypemand: web-3: the run failed: ")
    assert "Paused" in told.stderr
    as_json = await run_now(lab, "web-3", "--json")
    assert (as_json.status, as_json.json["outcome"]) == (1, "failed")


@pytest.mark.parametrize(
    ("instance", "why"),
    [("db-1", "no snapshot schedule"), ("off-1", "disabled"), ("../x", "'../x'"), ("web-9", "no snapshot schedule")],
)
async def test_what_can_not_run_is_told_in_one_line(lab: ServingLab, instance: str, why: str) -> None:
    told = await run_now(lab, instance)
    assert (told.status, told.stdout) == (1, "")
    (line,) = told.stderr.splitlines()
    assert line.startswith("hypemand: ")
    assert why in line
    assert line.endswith(f"; see: hypemand status {instance}")


def test_on_a_terminal_each_step_is_told_when_it_happens(lab: ServingLab) -> None:
    ours, its = pty.openpty()
    with subprocess.Popen(
        command("run-now", "slow-1", "-c", lab.config), stdout=its, stderr=its, cwd=ROOT, env=environment()
    ) as process:
        os.close(its)
        shown = b""
        while b": paused" not in shown:
            shown += os.read(ours, 4096)
        assert b"captured" not in shown
        guest = json.loads((lab.directory / "slow/instances/slow-1/instance.json").read_text())
        assert guest["state"] == "Paused"
        busy = subprocess.run(
            command("run-now", "slow-1", "-c", lab.config),
            capture_output=True,
            cwd=ROOT,
            env=environment(),
            check=False,
        )
        assert busy.returncode == 1
        assert b"still going" in busy.stderr
        while piece := read(ours):
            shown += piece
    os.close(ours)
    assert process.returncode == 0
    lines = shown.decode().splitlines()
    copied = [line for line in lines if re.fullmatch(r"slow-1: copied [\d.]+ KiB of 320\.0 KiB \(\d+ %\)", line)]
    assert copied, "a copy that takes four seconds tells nothing of how far it is"
    assert "resumed after" in lines[-3]
    assert re.fullmatch("r[0-9a-f]+", lines[-1])


def read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except OSError:  # how the end of a terminal is told
        return b""


async def test_ctrl_c_leaves_the_run_going_and_says_so(lab: ServingLab) -> None:
    slow = Lab(lab.directory)
    log = lab.directory / "run-now.log"
    with log.open("wb") as file:
        process = await trio.lowlevel.open_process(
            command("run-now", "slow-2", "-c", lab.config), stderr=file, cwd=ROOT, env=environment()
        )
    try:
        await wait_until(lambda: "paused" in log.read_text(), "it is paused")
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 130
    finally:
        process.kill()
        await process.wait()
    last = log.read_text().splitlines()[-1]
    assert last == "hypemand: slow-2: the run goes on; see: hypemand status slow-2"
    await wait_until(lambda: slow.history("slow-2"), "the run ended")
    assert slow.history("slow-2")[0]["outcome"] == "succeeded"


def test_over_tcp_there_is_nothing_to_control(lab: ServingLab) -> None:
    with httpx.Client(base_url=lab.url, headers={"authorization": f"Bearer {TOKEN}"}) as client:
        assert client.get("/snapshot-schedules").status_code == 200
        for path in ("status", "forecast", "snapshots", "history"):
            assert client.get(f"/control/{path}").status_code == 404
        assert client.post("/control/recover").status_code == 404


async def test_without_a_daemon_it_says_what_to_start(tmp_path: Path) -> None:
    lab = Lab(tmp_path).write()
    told = await run_now(lab, "web-1")
    assert (told.status, told.stdout) == (1, "")
    (line,) = told.stderr.splitlines()
    assert f"needs a running daemon; start it: hypemand run -c {lab.config}" in line
    assert str(lab.state / "api.sock") in line


async def test_a_daemon_that_is_killed_meanwhile_is_no_success(tmp_path: Path) -> None:
    lab = Lab(tmp_path).write('[[schedules]]\ninstance = "web-1"\ninterval = "24h"', backend='copy_rate = "8KiB"')
    lab.replace(lab.config.read_text().replace("[runs]", f"[runs]\n{ALONE}"))
    done: list[Ran] = []

    async def ask() -> None:
        done.append(await run_now(lab, "web-1"))

    async with running_daemon(lab.config) as daemon:
        await wait_until((lab.state / "api.sock").exists, "it listens")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await lab.in_mid_capture()
            await daemon.kill()
    assert (done[0].status, done[0].stdout) == (1, "")
    assert "see: hypemand status web-1" in done[0].stderr.splitlines()[-1]
    assert (await run_cli("recover", "-c", lab.config)).status == 0


# What is told, step by step.


def test_a_step_that_this_version_does_not_know_is_passed_over() -> None:
    progress = Progress("web-1")
    assert [*progress.take({"step": "polished", "shine": 3})] == []
    assert [*progress.take({"step": "captured", "bytes": 3})] == ["web-1: captured"]
    assert [*progress.take({"no": "step"})] == []


def test_a_run_that_waits_says_why_and_how_long() -> None:
    (line,) = Progress("web-1").take({"step": "waiting", "error": "no answer\nat all", "in_s": 60.0})
    assert line == "web-1: can't start yet, tries again in 60 s: no answer at all"


def test_a_success_with_something_to_tell_tells_it() -> None:
    progress = Progress("web-1")
    run = {"outcome": "succeeded", "error": "old one not deleted", "warnings": ["another mode"]}
    assert [*progress.take({"step": "finished", "run": run})] == [
        "web-1: warning: another mode",
        "web-1: warning: old one not deleted",
    ]
    assert progress.run == run


def test_a_run_that_is_left_open_has_no_end_yet() -> None:
    progress = Progress("web-1")
    assert [*progress.take({"step": "left open", "message": "until its hypervisor answers"})] == []
    assert progress.run is None
    assert progress.no_end == "web-1: until its hypervisor answers; see: hypemand status web-1"


def test_before_a_run_has_begun_nothing_is_cut_short() -> None:
    progress = Progress("web-1")
    assert progress.cut_short(OSError("gone")) is None
    assert "if it has begun" in progress.left_alone
    assert [*progress.take({"step": "paused"})] == ["web-1: paused"]
    assert "nothing more is heard" in str(progress.cut_short(OSError("gone")))
