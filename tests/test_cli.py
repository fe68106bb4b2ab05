"""Every command as its user meets it: what it prints where, and how it ends."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio

from hypemand import __version__
from tests.processes import ALONE, ROOT, Lab, Ran, command, environment, run_cli, running_daemon, wait_until

COMMANDS = {
    "run": "foreground",
    "check-config": "every problem",
    "status": "next and last run",
    "plan": "what will be pruned, and why",
    "snapshots": "snapshots that are kept",
    "history": "newest last",
    "run-now": "taken at once",
    "recover": "every guest runs",
    "import-hypeman": "Begin with --dry-run",
}
REPORTS = ("status", "plan", "snapshots", "history")

SCHEDULES = """
[[schedules]]
instance = "web-1"
interval = "1h"
first_run = "now"
retention = { max_count = 2 }
name_prefix = "nightly"
metadata = { team = "backend" }
[[schedules]]
instance = "web-2"
interval = "24h"
enabled = false
"""
INSTANCES = ("web-1", "web-2", "db-1")
RUNS = 3

BAD = """
state_dir = "state"
colour = "red"
[backends.lab]
type = "embedded"
root = "lab"
speed = 3
[[schedules]]
instance = "../x"
interval = "59s"
retention = { max_count = -1 }
[[schedules]]
instance = "web-1"
backend = "nowhere"
interval = "1d"
name_prefix = "ends-"
"""
BAD_PATHS = {
    "colour",
    "backends.lab.speed",
    "schedules[0].instance",
    "schedules[0].interval",
    "schedules[0].retention.max_count",
    "schedules[1].backend",
    "schedules[1].interval",
    "schedules[1].name_prefix",
}


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A lab in which a daemon has done a few runs, and runs no more. Only for looking."""
    lab = Lab(tmp_path_factory.mktemp("used"))

    async def use() -> None:
        async with running_daemon(lab.write(SCHEDULES, instances=INSTANCES).config) as daemon:
            for times in range(1, RUNS + 1):
                await daemon.wait_for("snapshot taken", times=times)
                await lab.recorded(times)
                if times < RUNS:
                    lab.make_due(daemon)
            await daemon.stop()

    trio.run(use)
    return lab


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


async def on(lab: Lab, *args: str) -> Ran:
    return await run_cli(args[0], "-c", lab.config, *args[1:])


# Help, version, arguments.


async def test_each_command_says_what_it_does() -> None:
    every = await run_cli("--help")
    assert every.status == 0
    for name, about in COMMANDS.items():
        assert name in every.stdout
        one = await run_cli(name, "--help")
        assert (one.status, one.stderr) == (0, "")
        assert about in " ".join(one.stdout.split())
        assert "--config" in one.stdout
    for status in ("75", "78", "SIGHUP", "HYPEMAND_CONFIG"):
        assert status in every.stdout


async def test_the_version_is_that_of_the_package() -> None:
    told = await run_cli("--version")
    assert (told.status, told.stdout) == (0, f"hypemand {__version__}\n")


@pytest.mark.parametrize(
    "args", [(), ("bogus",), ("status", "--bogus"), ("plan", "--for", "1d"), ("plan", "--for=-1h")]
)
async def test_wrong_arguments_are_told_without_a_traceback(used: Lab, args: tuple[str, ...]) -> None:
    config = ("-c", str(used.config)) if args[:1] in (("status",), ("plan",)) else ()
    told = await run_cli(*args, *config)
    assert (told.status, told.stdout) == (2, "")
    assert "hypemand" in told.stderr
    assert "Traceback" not in told.stderr


# The config.


async def test_recover_goes_on_without_a_config(used: Lab, tmp_path: Path) -> None:
    """It may run after a crash, when somebody has lost the file, and guests stand still."""
    told = await run_cli("recover", "-c", tmp_path / "nowhere.toml", env={"STATE_DIRECTORY": str(used.state)})
    assert (told.status, told.stdout) == (0, "no open runs\n")
    assert f"going on with the state in {used.state}" in told.stderr


@pytest.mark.parametrize("name", sorted({*COMMANDS} - {"recover"}))
async def test_a_missing_config_is_told_with_what_to_do(tmp_path: Path, name: str) -> None:
    missing = tmp_path / "nowhere.toml"
    told = await run_cli(name, *(["web-1"] if name == "run-now" else []), "-c", missing)
    assert (told.status, told.stdout) == (78, "")
    (line,) = told.stderr.splitlines()
    assert str(missing) in line
    assert "--config" in line
    assert "config.example.toml" in line


async def test_the_config_is_found_by_the_environment_and_the_option_wins(used: Lab, tmp_path: Path) -> None:
    found = await run_cli("snapshots", env={"HYPEMAND_CONFIG": str(used.config)})
    assert (found.status, found.stderr) == (0, "")
    wins = await run_cli("snapshots", "-c", tmp_path / "no.toml", env={"HYPEMAND_CONFIG": str(used.config)})
    assert wins.status == 78


async def test_check_config_lists_every_problem_with_its_path_and_run_refuses_with_the_same_text(lab: Lab) -> None:
    lab.config.write_text(BAD)
    checked = await on(lab, "check-config")
    assert (checked.status, checked.stdout) == (78, "")
    *problems, total = checked.stderr.splitlines()
    prefix = f"{lab.config}: "
    assert all(line.startswith(prefix) for line in problems)
    assert {line.removeprefix(prefix).partition(": ")[0] for line in problems} == BAD_PATHS
    assert f"{len(BAD_PATHS)} problems" in total
    refused = await on(lab, "run")
    assert (refused.status, refused.stdout, refused.stderr) == (78, "", checked.stderr)
    assert not lab.state.exists()


async def test_check_config_as_json_has_the_same_problems(lab: Lab) -> None:
    lab.config.write_text(BAD)
    checked = await on(lab, "check-config", "--json")
    assert (checked.status, checked.stderr) == (78, "")
    assert checked.json.keys() == {"config", "problems", "warnings"}
    assert all(problem.keys() == {"path", "message"} for problem in checked.json["problems"])
    assert {problem["path"] for problem in checked.json["problems"]} == BAD_PATHS


async def test_a_config_that_is_no_toml_is_one_problem(lab: Lab) -> None:
    lab.config.write_text("state_dir = ")
    told = await on(lab, "check-config")
    assert told.status == 78
    assert "not TOML" in told.stderr
    assert "1 problem in" in told.stderr


async def test_a_valid_config_is_told_as_such_and_nothing_is_made(lab: Lab, used: Lab) -> None:
    told = await on(used, "check-config")
    assert told.status == 0
    assert "valid" in told.stdout
    assert "'web-2' sets no limit" in told.stderr  # a warning
    fresh = await on(lab.write(SCHEDULES, instances=INSTANCES), "check-config", "--json")
    assert (fresh.status, fresh.stderr, fresh.json["problems"]) == (0, "", [])
    assert [path.name for path in lab.directory.iterdir()] == ["config.toml"]


async def test_an_instance_that_two_backends_know_is_a_problem_that_names_both(used: Lab, tmp_path: Path) -> None:
    lab = used.copy_to(tmp_path / "copy")
    other = '[backends.other]\ntype = "embedded"\nroot = "other"\n'
    (lab.directory / "other" / "instances" / "web-1").mkdir(parents=True)
    lab.replace(
        lab.config.read_text() + other + '[[schedules]]\ninstance = "web-*"\nbackend = "lab"\ninterval = "1h"\n'
    )
    text = lab.config.read_text().replace('instance = "web-1"\n', 'instance = "web-1"\nbackend = "lab"\n')
    lab.replace(text.replace('instance = "web-2"\n', 'instance = "web-2"\nbackend = "lab"\n'))
    told = await on(lab, "check-config")
    assert told.status == 78
    assert "'web-1'" in told.stderr
    assert "lab, other" in told.stderr


# Reports.

SCHEDULE_KEYS = {
    "instance_id",
    "interval",
    "retention",
    "created_at",
    "updated_at",
    "next_run_at",
    "last_run_at",
    "last_snapshot_id",
    "metadata",
    "name_prefix",
    "backend",
    "managed_by",
    "settings",
    "format",
}
RUN_KEYS = {
    "run_id",
    "instance_id",
    "due_at",
    "started_at",
    "finished_at",
    "outcome",
    "trigger",
    "kind",
    "snapshot_id",
    "snapshot_name",
    "size_bytes",
    "freeze_s",
    "found_frozen",
    "capture_s",
    "late_s",
    "missed",
    "pruned",
    "error",
    "warnings",
}
SNAPSHOT_KEYS = {"id", "instance_id", "name", "kind", "created_at", "size_bytes", "tags", "restore"}


async def test_status_as_json_has_stable_keys(used: Lab) -> None:
    told = await on(used, "status", "--json")
    assert (told.status, told.stderr) == (0, "")
    document = told.json
    assert document.keys() == {
        "at",
        "answered_by",
        "daemon",
        "lock",
        "socket_trouble",
        "state_dir",
        "config_problems",
        "problems",
        "clock_doubts",
        "warnings",
        "unreadable_state_files",
        "quarantine",
        "damaged_log_lines",
        "open_runs",
        "instances",
    }
    assert (document["answered_by"], document["lock"]) == ("files", None)
    assert document["daemon"] == {"running": False, "pid": None}
    assert document["state_dir"] == str(used.state)
    for key in (
        "config_problems",
        "problems",
        "unreadable_state_files",
        "quarantine",
        "damaged_log_lines",
        "open_runs",
    ):
        assert document[key] == []
    views = {view["instance_id"]: view for view in document["instances"]}
    assert list(views) == sorted(INSTANCES)
    for view in views.values():
        assert view.keys() == {
            "instance_id",
            "backend",
            "state",
            "covered",
            "made",
            "schedule",
            "last_run",
            "last_attempt",
            "open_run",
            "under_way",
            "current_run",
            "last_snapshot",
            "last_snapshot_age_s",
            "last_good_at",
            "snapshots_kept",
            "snapshots_bytes",
            "freeze",
            "trouble",
        }
    web = views["web-1"]
    assert web["schedule"].keys() == SCHEDULE_KEYS
    assert web["last_run"].keys() == RUN_KEYS
    assert web["last_snapshot"].keys() == SNAPSHOT_KEYS
    assert (web["snapshots_kept"], web["snapshots_bytes"]) == (2, 2 * 320 * 1024)
    assert web["last_snapshot_age_s"] > 0
    assert (views["db-1"]["covered"], views["db-1"]["schedule"]) == (False, None)
    assert views["web-2"]["schedule"]["settings"] == {"enabled": False}


async def test_snapshots_and_history_as_json_have_stable_keys(used: Lab) -> None:
    history = (await on(used, "history", "--json")).json
    assert len(history) == RUNS
    assert all(run.keys() == RUN_KEYS for run in history)
    assert [run["started_at"] for run in history] == sorted(run["started_at"] for run in history)
    (pruned,) = history[-1]["pruned"]
    assert pruned.keys() == {"snapshot_id", "reasons"}
    assert pruned["snapshot_id"] == history[0]["snapshot_id"]
    snapshots = (await on(used, "snapshots", "--json")).json
    assert all(snapshot.keys() == SNAPSHOT_KEYS for snapshot in snapshots)
    assert [snapshot["id"] for snapshot in snapshots] == [run["snapshot_id"] for run in history[1:]]
    assert snapshots[0]["tags"]["team"] == "backend"
    assert all(re.fullmatch(r"nightly-\d{8}-\d{6}", snapshot["name"]) for snapshot in snapshots)


async def test_snapshots_as_json_have_the_commands_that_bring_them_back(used: Lab, tmp_path: Path) -> None:
    lab = used.copy_to(tmp_path / "copy")
    home = used.root / "instances" / "web-1"
    snapshot = (await on(lab, "snapshots", "web-1", "--json")).json[-1]
    assert [step.keys() for step in snapshot["restore"]] == [{"action", "command"}] * 2
    assert [step["action"] for step in snapshot["restore"]] == ["run", "run"]
    for step, name in zip(snapshot["restore"], ("memory", "disk"), strict=True):
        kept = used.root / "snapshots" / "web-1" / snapshot["id"] / name
        assert step["command"].split() == ["cp", "--sparse=always", str(kept), str(home / name)]


async def test_what_the_last_run_warned_of_is_told_and_is_no_error(used: Lab, tmp_path: Path) -> None:
    lab = used.copy_to(tmp_path / "copy")
    *before, last = (lab.state / "runs.jsonl").read_text().splitlines()
    run = json.loads(last) | {"warnings": ["frozen for\x1b[2J its memory", "and more"]}
    (lab.state / "runs.jsonl").write_text("\n".join([*before, json.dumps(run), ""]))
    document = (await on(lab, "status", "--json")).json
    assert document["warnings"] == [f"web-1: last run: {warning}" for warning in run["warnings"]]
    (web,) = (view for view in document["instances"] if view["instance_id"] == "web-1")
    assert web["last_run"]["warnings"] == run["warnings"]
    assert (document["problems"], "last_error" in web["schedule"]) == ([], False)
    shown = await on(lab, "status")
    assert "warning: web-1: last run: frozen for [2J its memory\n" in shown.stderr
    assert "warning: web-1: last run: and more\n" in shown.stderr
    assert "last error" not in shown.stderr
    assert (await on(lab, "history", "--json")).json[-1]["warnings"] == run["warnings"]
    assert (await on(lab, "status", "web-2", "--json")).json["warnings"] == []


async def test_plan_tells_what_will_be_pruned_and_why(used: Lab) -> None:
    told = await on(used, "plan", "--for", "2h", "--json")
    assert told.status == 0
    planned = told.json
    assert len(planned) == 2
    assert all(run.keys() == {"at", "instance_id", "snapshot_name", "prunes"} for run in planned)
    assert [run["at"] for run in planned] == sorted(run["at"] for run in planned)
    assert {run["instance_id"] for run in planned} == {"web-1"}  # web-2 is disabled
    kept = (await on(used, "snapshots", "--json")).json
    for run, doomed in zip(planned, kept, strict=True):
        (pruned,) = run["prunes"]
        assert pruned.keys() == {"snapshot_id", "snapshot_name", "reasons"}
        assert (pruned["snapshot_id"], pruned["snapshot_name"]) == (doomed["id"], doomed["name"])
        assert all("max_count 2" in reason for reason in pruned["reasons"])
    table = (await on(used, "plan", "--for", "2h")).stdout.splitlines()
    assert [line.split()[3] for line in table[1:]] == ["take", "prune", "take", "prune"]
    assert "max_count 2" in table[2]
    assert kept[0]["name"] in table[2]


@pytest.mark.parametrize(
    ("name", "headings", "rows"),
    [
        ("status", ["INSTANCE", "STATE", "NEXT RUN", "LAST SNAPSHOT", "KEPT", "FREEZE", "ERROR"], 3),
        ("plan", ["AT", "INSTANCE", "ACTION", "SNAPSHOT", "WHY"], 48),
        ("snapshots", ["INSTANCE", "NAME", "CREATED", "SIZE", "ID"], 2),
        ("history", ["STARTED", "INSTANCE", "OUTCOME", "PRUNED", "ERROR"], RUNS),
    ],
)
async def test_in_a_pipe_a_report_is_plain_columns(used: Lab, name: str, headings: list[str], rows: int) -> None:
    told = await on(used, name)
    assert told.status == 0
    assert "\x1b" not in told.stdout + told.stderr
    first, *others = told.stdout.splitlines()
    positions = [first.index(heading) for heading in headings]
    assert positions == sorted(positions)
    assert len(others) == rows
    assert told.stdout.isascii()


def test_on_a_terminal_a_report_is_a_table(used: Lab) -> None:
    ours, its = pty.openpty()
    with subprocess.Popen(
        command("history", "-c", used.config),
        stdout=its,
        stderr=subprocess.PIPE,
        env=environment(TERM="xterm-256color", COLUMNS="160"),
    ) as process:
        os.close(its)
        shown = read_all(ours)
        os.close(ours)
    assert process.returncode == 0
    assert "\x1b[" in shown
    assert "─" in shown
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert len(re.findall("succeeded", plain)) == RUNS


@pytest.mark.parametrize(
    ("args", "told"),
    [(("web-1",), True), ((), False), (("web-2",), False), (("web-1", "--json"), False)],
)
def test_on_a_terminal_somebody_who_asks_for_one_instance_is_told_of_the_way_back(
    used: Lab, args: tuple[str, ...], told: bool
) -> None:
    ours, its = pty.openpty()
    with subprocess.Popen(
        command("snapshots", "-c", used.config, *args), stdout=subprocess.DEVNULL, stderr=its, env=environment()
    ) as process:
        os.close(its)
        shown = read_all(ours)
        os.close(ours)
    assert process.returncode == 0
    assert ("hypemand snapshots web-1 --json" in shown) is told
    assert shown.count("\n") == told


async def test_in_a_pipe_nobody_is_told_of_the_way_back(used: Lab) -> None:
    told = await on(used, "snapshots", "web-1")
    assert (told.status, told.stderr) == (0, "")
    assert len(told.stdout.splitlines()) == 3


def read_all(descriptor: int) -> str:
    pieces = []
    while True:
        try:
            piece = os.read(descriptor, 65536)
        except OSError:  # how the end of a terminal is told
            break
        if not piece:
            break
        pieces.append(piece)
    return b"".join(pieces).decode()


async def test_one_instance_alone_can_be_asked_for(used: Lab) -> None:
    status = await on(used, "status", "db-1", "--json")
    assert [view["instance_id"] for view in status.json["instances"]] == ["db-1"]
    assert (await on(used, "snapshots", "web-2", "--json")).json == []
    assert len((await on(used, "history", "web-1", "--json")).json) == RUNS
    assert (await on(used, "history", "web-2", "--json")).json == []


@pytest.mark.parametrize("name", REPORTS)
async def test_an_instance_that_nobody_knows_is_an_error_with_a_hint(used: Lab, name: str) -> None:
    for unknown in ("web-9", "../x"):
        told = await on(used, name, unknown)
        assert (told.status, told.stdout) == (1, "")
        (line,) = told.stderr.splitlines()
        assert repr(unknown) in line
        assert "hypemand status" in line


async def test_a_run_under_way_is_not_called_unsettled(lab: Lab) -> None:
    lab.write(SCHEDULES, instances=INSTANCES, backend='copy_rate = "64KiB"', runs=ALONE)
    async with running_daemon(lab.config) as daemon:
        await lab.in_mid_capture()
        shown = await on(lab, "status")
        assert "under way" in shown.stdout
        assert "not settled" not in shown.stdout
        await daemon.kill()
    assert "not settled" in (await on(lab, "status")).stdout
    assert (await on(lab, "recover")).status == 0


async def test_a_snapshot_dated_in_the_future_is_not_the_last_one(used: Lab, tmp_path: Path) -> None:
    lab = used.copy_to(tmp_path / "copy")
    kept = (await on(lab, "snapshots", "--json")).json
    for manifest in lab.root.glob(f"snapshots/web-1/{kept[-1]['id']}/manifest.json"):
        manifest.write_text(manifest.read_text().replace(kept[-1]["created_at"], "2099-01-01T00:00:00Z"))
    document = (await on(lab, "status", "--json")).json
    (web,) = (view for view in document["instances"] if view["instance_id"] == "web-1")
    assert web["last_snapshot"]["id"] == kept[-2]["id"]
    assert web["snapshots_kept"] == len(kept) - 1
    assert any("dated in the future" in warning for warning in document["warnings"])
    assert len((await on(lab, "snapshots", "--json")).json) == len(kept)


async def test_before_the_first_start_the_config_says_what_is_to_come(lab: Lab) -> None:
    lab.write(SCHEDULES)
    status = (await on(lab, "status", "--json")).json
    assert [(view["instance_id"], view["made"]) for view in status["instances"]] == [("web-1", False), ("web-2", False)]
    assert status["problems"] == []
    shown = await on(lab, "status")
    assert "not begun" in shown.stdout
    assert "begins when the daemon takes up the config: web-1, web-2" in shown.stderr
    assert {run["instance_id"] for run in (await on(lab, "plan", "--json")).json} == {"web-1"}  # web-2 is disabled
    for name in ("snapshots", "history"):
        assert (await on(lab, name, "--json")).json == []
    nothing = await on(lab, "recover")
    assert nothing.status == 0
    assert "nothing to recover" in nothing.stdout
    assert not lab.state.exists()


async def test_beside_a_daemon_the_same_reports_and_its_pid(lab: Lab) -> None:
    async with running_daemon(lab.write(SCHEDULES, instances=INSTANCES).config) as daemon:
        await daemon.wait_for("snapshot taken")
        await lab.recorded()
        document = (await on(lab, "status", "--json")).json
        assert document["daemon"] == {"running": True, "pid": daemon.pid}
        assert [view["covered"] for view in document["instances"]] == [False, True, True]
        shown = await on(lab, "status")
        assert str(daemon.pid) in shown.stderr
        for name in ("plan", "snapshots", "history"):
            told = await on(lab, name, "--json")
            assert told.status == 0
            assert told.json
        assert daemon.alive
        await daemon.stop()
    assert len(lab.history()) == 1


async def test_the_daemon_and_the_files_tell_the_same(used: Lab, tmp_path: Path) -> None:
    lab = used.copy_to(tmp_path / "copy")
    deaf = lab.directory / "deaf.toml"
    deaf.write_text('api.socket = "nowhere.sock"\n' + lab.config.read_text())
    async with running_daemon(lab.config) as daemon:
        await wait_until((lab.state / "api.sock").exists, "it listens")
        of_daemon = [await answers(lab.config, name) for name in REPORTS]
        table = await on(lab, "status")
        of_files = [await answers(deaf, name) for name in REPORTS]
        again = await run_cli("status", "-c", deaf)
        await daemon.stop()
    assert of_daemon == of_files
    assert [line.split()[:3] for line in table.stdout.splitlines()] == [
        line.split()[:3] for line in again.stdout.splitlines()
    ]
    assert "gives no answer over its socket" not in table.stderr
    assert f"daemon (pid {daemon.pid}) gives no answer over its socket; this is from its files" in again.stderr


async def answers(config: Path, name: str) -> Any:
    """What a report tells programs, but for what tells of the moment and of who has answered."""
    told = (await run_cli(name, "-c", config, "--json")).json
    if name != "status":
        return told
    for key in ("at", "answered_by", "lock", "socket_trouble"):
        del told[key]
    for view in told["instances"]:
        del view["last_snapshot_age_s"]
    return told


async def test_a_broken_config_hides_no_state(used: Lab, tmp_path: Path) -> None:
    lab = used.copy_to(tmp_path / "copy")
    lab.replace(lab.config.read_text().replace('"1h"', '"59s"'))
    status = await on(lab, "status")
    assert status.status == 0
    assert "web-1" in status.stdout
    assert "schedules[0].interval" in status.stderr
    assert str(lab.state) in status.stderr
    document = (await on(lab, "status", "--json")).json
    (problem,) = document["config_problems"]
    assert "schedules[0].interval" in problem
    assert len((await on(lab, "history", "--json")).json) == RUNS


# What is damaged.


async def test_the_quarantine_is_told_until_somebody_clears_it(used: Lab, tmp_path: Path) -> None:
    lab = used.copy_to(tmp_path / "copy")
    lab.schedule_file("web-2").write_text("{")
    before = await on(lab, "status", "--json")
    (told,) = before.json["unreadable_state_files"]
    assert "web-2.json" in told
    assert lab.schedule_file("web-2").read_text() == "{"  # looking changes nothing
    await on(lab, "recover")  # who holds the lock sets it aside
    document = (await on(lab, "status", "--json")).json
    (note,) = document["quarantine"]
    assert note.startswith("web-2.json: ")
    shown = await on(lab, "status")
    assert "in quarantine: web-2.json" in shown.stderr
    assert str(lab.state / "quarantine") in shown.stderr


async def test_a_damaged_snapshot_is_told_on_stderr_and_leaves_stdout_to_the_document(
    used: Lab, tmp_path: Path
) -> None:
    lab = used.copy_to(tmp_path / "copy")
    damaged, whole = (lab.root / "snapshots" / "web-1" / name for name in lab.snapshots())
    (damaged / "manifest.json").write_text("{")
    for name in ("status", "snapshots", "plan"):
        told = await on(lab, name, "--json")
        assert told.status == 0
        assert isinstance(told.json, (dict, list))
        assert str(damaged) in told.stderr
    listed = (await on(lab, "snapshots", "--json")).json
    assert [snapshot["id"] for snapshot in listed] == [whole.name]


async def test_a_backend_that_is_away_is_told_and_hides_no_schedule(used: Lab, tmp_path: Path) -> None:
    lab = used.copy_to(tmp_path / "copy")
    lab.root.rename(lab.directory / "aside")
    document = (await on(lab, "status", "--json")).json
    assert "mounted" in document["problems"][0]
    views = {view["instance_id"]: view for view in document["instances"]}
    assert views.keys() == {"web-1", "web-2"}
    assert (views["web-1"]["state"], views["web-1"]["snapshots_kept"]) == (None, None)
    table = (await on(lab, "status", "web-1")).stdout.splitlines()
    at = table[0].index("LAST SNAPSHOT")
    assert table[1][at:].split()[0] == "?"  # not "-": there may be some
    assert "mounted" in views["web-1"]["trouble"]
    one = await on(lab, "snapshots", "web-1")
    assert one.status == 1
    assert "can't be listed" in one.stderr


@pytest.mark.parametrize("name", [*REPORTS, "recover", "run"])
async def test_a_state_dir_that_is_none_is_told_in_one_line(lab: Lab, name: str) -> None:
    lab.write(SCHEDULES).state.write_text("a file stands here")
    told = await on(lab, name)
    assert (told.status, told.stdout) == (1, "")
    (line,) = told.stderr.splitlines()
    assert str(lab.state) in line
    checked = await on(lab, "check-config")
    assert checked.status == 78
    assert f"{lab.config}: state_dir: " in checked.stderr


# Where stdout goes.


@pytest.mark.parametrize("args", [("--help",), ("plan", "--for", "20000h"), ("plan", "--for", "20000h", "--json")])
def test_a_pipe_that_is_closed_early_gives_no_traceback(used: Lab, args: tuple[str, ...]) -> None:
    config = () if args == ("--help",) else ("-c", str(used.config))
    with subprocess.Popen(
        command(*args, *config), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        if args != ("--help",):
            process.stdout.read(1)
        process.stdout.close()
        told = process.stderr.read().decode()
    assert process.returncode == 0
    assert "Traceback" not in told
    assert "Broken" not in told


@pytest.mark.parametrize("redirect", [">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("name", ["status", "recover"])
def test_closed_streams_give_no_traceback(used: Lab, tmp_path: Path, name: str, redirect: str) -> None:
    line = [*command(name, "-c", used.config)]
    done = subprocess.run(
        ["/bin/sh", "-c", f'"$@" {redirect}', "sh", *line], capture_output=True, env=environment(), check=False
    )
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr


def test_a_disk_too_full_for_the_report_is_told(used: Lab) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command("status", "-c", used.config), stdout=full, stderr=subprocess.PIPE, env=environment(), check=False
        )
    assert done.returncode == 1
    assert b"No space left" in done.stderr
    assert b"Traceback" not in done.stderr


# What a command imports.

TOLD_IMPORTS = """
import sys
from hypemand.cli import main
try:
    main()
finally:
    import structlog
    print("rich" in sys.modules, structlog.dev.rich is None, file=sys.stderr)
"""


async def test_a_command_imports_rich_for_tables_alone(lab: Lab) -> None:
    lab.write(SCHEDULES, instances=INSTANCES)
    arguments = [sys.executable, "-c", TOLD_IMPORTS, "history", "--json", "-c", str(lab.config)]
    ran = await trio.run_process(
        arguments, capture_stdout=True, capture_stderr=True, cwd=ROOT, env=environment(), check=False
    )
    assert (ran.stdout.strip(), ran.stderr.strip()) == (b"[]", b"False True")
