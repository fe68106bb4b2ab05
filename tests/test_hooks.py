"""Hooks: what they are told, and that whatever becomes of one holds up nothing else. Real processes."""

import gc
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from attrs import define, evolve, field
from structlog.typing import EventDict

from hypemand.config import HooksConfig
from hypemand.core.model import InstanceId, Outcome, Pruned, RunFinished
from hypemand.engine.events import RunEnded, RunStepped, Step
from hypemand.state.codec import line_document
from hypemand.surface.hooks import hooks
from hypemand.surface.hooks.hooks import Hooks
from hypemand.surface.hooks.process import LONGEST_LINE, OUTPUT_BYTES, OUTPUT_LINES, Output
from tests.processes import ROOT, children_of, wait_until

AT = datetime(2026, 3, 9, 1, 0, tzinfo=UTC)
FOREVER = "sleep 1000"


def ended(outcome: Outcome = Outcome.FAILED, instance: str = "web-1", **facts: Any) -> RunFinished:
    facts = {"error": None if outcome is Outcome.SUCCEEDED else f"it has {outcome}", **facts}
    return RunFinished(
        run_id=f"r-{instance}",
        instance_id=InstanceId(instance),
        due_at=AT,
        started_at=AT,
        finished_at=AT,
        outcome=outcome,
        **facts,
    )


@define
class Site:
    """Hooks that serve, and a directory for their scripts and what these write."""

    directory: Path
    log: list[EventDict]
    config: HooksConfig = field(factory=HooksConfig)
    hooks: Hooks = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.hooks = Hooks(lambda: self.config)

    def script(self, body: str, name: str = "hook") -> str:
        """A shell script that runs in the directory."""
        path = self.directory / name
        path.write_text(f"#!/bin/sh\ncd {self.directory}\n{body}\n")
        path.chmod(0o755)
        return str(path)

    def configure(self, body: str, timeout_s: float = 60.0, kind: str = "on_failure") -> None:
        command = (self.script(body, kind),)
        self.config = evolve(self.config, timeout=timedelta(seconds=timeout_s), **{kind: command})

    def tell(self, *runs: RunFinished) -> None:
        for run in runs:
            self.hooks.heard(RunEnded(run))

    def read(self, name: str) -> list[str]:
        path = self.directory / name
        return path.read_text().splitlines() if path.exists() else []

    async def wrote(self, name: str, lines: int = 1) -> list[str]:
        await wait_until(lambda: len(self.read(name)) >= lines, f"{lines} lines in {name}")
        return self.read(name)

    def told(self, event: str, **facts: Any) -> list[EventDict]:
        return [
            line
            for line in self.log
            if line["event"] == event and all(line.get(key) == value for key, value in facts.items())
        ]

    async def heard(self, event: str, times: int = 1, **facts: Any) -> EventDict:
        await wait_until(lambda: len(self.told(event, **facts)) >= times, event)
        return self.told(event, **facts)[-1]

    def output(self) -> list[str]:
        return [line["line"] for line in self.told("hook output")]


@pytest.fixture
def site(tmp_path: Path, heard_log: list[EventDict]) -> Site:
    return Site(tmp_path, heard_log)


@asynccontextmanager
async def served(site: Site) -> AsyncIterator[trio.CancelScope]:
    """Hooks in the background; told to stop at the end of the block, and left only once they have."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(site.hooks.serve)
        await trio.testing.wait_all_tasks_blocked()
        yield nursery.cancel_scope
        nursery.cancel_scope.cancel()


def lives(pid: str) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    return False


def descriptors() -> int:
    return len([*Path("/proc/self/fd").iterdir()])


# What they are told


@pytest.mark.parametrize(
    ("run", "called"),
    [
        (ended(Outcome.SUCCEEDED), ["on_success"]),
        (ended(Outcome.SUCCEEDED, error="an old snapshot could not be deleted"), ["on_failure", "on_success"]),
        (ended(Outcome.FAILED), ["on_failure"]),
        (ended(Outcome.INTERRUPTED), ["on_failure"]),
        (ended(Outcome.SKIPPED), ["on_failure"]),
    ],
    ids=["succeeded", "succeeded with an error", "failed", "interrupted", "skipped"],
)
async def test_whoever_waits_for_failures_hears_of_each_run_with_trouble_and_nothing_else(
    site: Site, run: RunFinished, called: list[str]
) -> None:
    site.configure("echo $HYPEMAND_HOOK >> called")
    site.configure("echo $HYPEMAND_HOOK >> called", kind="on_success")
    async with served(site):
        site.hooks.heard(RunStepped(run.run_id, run.instance_id, Step.PAUSED))
        site.tell(run)
        await site.heard("hook done", times=len(called), status=0)
    assert sorted(site.read("called")) == called


async def test_a_hook_reads_the_line_of_the_history_and_finds_the_most_important_in_its_environment(
    site: Site,
) -> None:
    error = "no such file 'caf\udce9'\0\n\x1b[31m in red"
    run = ended(error=error, pruned=(Pruned("s1", ("too old",)),), warnings=("ü",))
    site.configure("cat > document; env > environment")
    async with served(site):
        site.tell(run)
        await site.heard("hook done", instance_id="web-1", run_id="r-web-1")
    document = (site.directory / "document").read_bytes()
    expected = line_document(evolve(run, error=error.replace("\udce9", "\\udce9")))
    assert document.endswith(b"}\n")
    assert document.count(b"\n") == 1
    assert json.loads(document) == json.loads(json.dumps(expected))
    told = dict(line.partition("=")[::2] for line in site.read("environment"))
    assert told["HYPEMAND_INSTANCE_ID"] == "web-1"
    assert told["HYPEMAND_RUN_ID"] == "r-web-1"
    assert told["HYPEMAND_OUTCOME"] == "failed"
    assert told["HYPEMAND_ERROR"] == r"no such file 'caf\udce9'\x00\n\x1b[31m in red"


async def test_an_error_of_any_length_can_be_told(site: Site) -> None:
    site.configure("wc -c > length; echo ${#HYPEMAND_ERROR} > cut")
    async with served(site):
        site.tell(ended(error="x" * 300_000))
        await site.heard("hook done")
    assert int(site.read("length")[0]) > 300_000
    assert site.read("cut") == ["4000"]


async def test_a_hook_has_nothing_of_the_daemons_own(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    private = {"HYPEMAND_OWNER", "NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "WATCHDOG_USEC", "CREDENTIALS_DIRECTORY"}
    for name in (*private, "HYPEMAND_ERROR", "PAGER_KEY"):
        monkeypatch.setenv(name, "set")
    ours, theirs = os.pipe()
    os.set_inheritable(theirs, True)
    monkeypatch.chdir(site.directory)
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    path = site.script("")
    look = f'pwd > "{site.directory}/cwd"; cat /proc/self/status > "{site.directory}/status"'
    Path(path).write_text(f"#!/bin/sh\n{look}\nenv > $0.env\nexec ls /proc/self/fd > $0.fds\n")
    site.config = HooksConfig(on_success=(path,))
    try:
        async with served(site):
            site.tell(ended(Outcome.SUCCEEDED))
            await site.heard("hook done", status=0)
    finally:
        signal.signal(signal.SIGUSR1, before)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])
        os.close(ours)
        os.close(theirs)
    names = {line.partition("=")[0] for line in site.read("hook.env")}
    assert not names & (private | {"HYPEMAND_ERROR"})
    assert names >= {"PAGER_KEY", "PATH", "HYPEMAND_OUTCOME"}
    assert site.read("cwd") == ["/"]
    assert site.read("hook.fds") == ["0", "1", "2", "3"]  # the last is its own look
    status = dict(line.split(":\t") for line in site.read("status"))
    of_the_c_library = 3 << 31  # nobody else can change those
    assert {int(status[mask], 16) & ~of_the_c_library for mask in ("SigIgn", "SigBlk")} == {0}


async def test_no_shell_reads_the_arguments(site: Site) -> None:
    path = site.script('for word in "$@"; do echo "$word" >> words; done')
    site.config = HooksConfig(on_failure=(path, "$HOME; exit 1", "*", "ü", ""))
    async with served(site):
        site.tell(ended())
        await site.heard("hook done", status=0)
    assert site.read("words") == ["$HOME; exit 1", "*", "ü", ""]


# What goes wrong with them


async def test_a_hook_that_fails_is_told_with_its_output_and_the_next_one_runs(site: Site) -> None:
    site.configure("printf 'to \\033[2Jpage\\n\\n\\377\\n'; echo nobody home >&2; exit 3")
    async with served(site):
        site.tell(ended())
        failed = await site.heard("hook failed")
        site.configure("exit 0")
        site.tell(ended())
        await site.heard("hook done", status=0)
    assert (failed["status"], failed["log_level"], failed["hook"]) == (3, "error", "on_failure")
    assert site.output() == ["to \\x1b[2Jpage", "\\xff", "nobody home"]
    assert {line["log_level"] for line in site.told("hook output")} == {"error"}


async def test_a_hook_that_a_signal_ends_is_told_with_the_signal(site: Site) -> None:
    site.configure("kill -SEGV $$")
    async with served(site):
        site.tell(ended())
        failed = await site.heard("hook failed")
    assert failed["signal"] == "SIGSEGV"


@pytest.mark.parametrize(
    ("content", "mode", "status", "why"),
    [
        (None, 0, 127, "No such file or directory"),
        ("#!/no/such/interpreter\n", 0o755, 127, "or its interpreter"),
        ("#!/bin/sh\n", 0o644, 126, "Permission denied"),
        ("echo no first line", 0o755, 126, "Exec format error"),
    ],
    ids=["missing", "without its interpreter", "not executable", "no program"],
)
async def test_a_hook_that_can_not_be_started_says_why(
    site: Site, content: str | None, mode: int, status: int, why: str
) -> None:
    path = site.directory / "pager"
    if content is not None:
        path.write_text(content)
        path.chmod(mode)
    site.config = HooksConfig(on_failure=(str(path),))
    async with served(site):
        site.tell(ended())
        await site.heard("hook failed", status=status)
    (line,) = site.output()
    assert line.startswith(f"{path} can't be started: ")
    assert why in line


async def test_when_no_process_is_to_be_had_that_is_told_and_nothing_is_left_over(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_descriptor(pid: int) -> int:
        raise OSError(24, "Too many open files")

    site.configure("exit 0")
    gc.collect()  # what earlier tests forgot goes now, and not in between
    async with served(site):
        before, children = descriptors(), children_of(os.getpid())
        with monkeypatch.context() as patched:
            patched.setattr(os, "pidfd_open", no_descriptor)
            site.tell(ended())
            told = await site.heard("hook can't be started")
            patched.undo()
            patched.setattr("sys.executable", "/no/such/python")
            site.tell(ended())
            await site.heard("hook can't be started", times=2)
        assert descriptors() == before
        assert children_of(os.getpid()) == children
        site.tell(ended())
        await site.heard("hook done", status=0)
        await wait_until(lambda: descriptors() == before, "all is closed")
    assert "Too many open files" in told["error"]


async def test_hooks_that_hang_are_killed_with_their_children_and_those_behind_them_run(site: Site) -> None:
    hang = f"{FOREVER} & echo $! >> children; echo waiting; wait"
    site.configure(f"[ $HYPEMAND_INSTANCE_ID = ok ] && echo paged > paged && exit; {hang}", timeout_s=1)
    async with served(site):
        site.tell(*[ended(instance=f"hangs-{number}") for number in range(hooks.AT_ONCE)], ended(instance="ok"))
        await site.heard("hook killed", times=hooks.AT_ONCE, why="it took longer than 1s")
        await site.wrote("paged")
    children = site.read("children")
    assert len(children) == hooks.AT_ONCE
    assert not any(map(lives, children))
    assert site.output() == ["waiting"] * hooks.AT_ONCE


async def test_hooks_for_successes_that_hang_hold_up_none_for_failures(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hooks, "GRACE_S", 0.1)
    site.configure("echo paged > paged")
    site.configure(f"exec {FOREVER}", kind="on_success")
    async with served(site):
        site.tell(*[ended(Outcome.SUCCEEDED)] * 20, ended())
        assert await site.wrote("paged") == ["paged"]
    assert len(site.told("hook killed", hook="on_success")) == hooks.AT_ONCE


@pytest.mark.parametrize("body", ["exit 0", "exec 0<&-; exec sleep 0.1", "head -c 10 > part"])
async def test_a_hook_need_not_read_what_it_is_told(site: Site, body: str) -> None:
    site.configure(body)
    async with served(site):
        site.tell(ended(warnings=("x" * 1_000_000,)))
        await site.heard("hook done", status=0)
    assert not site.told("internal error of a hook")


async def test_a_hook_that_writes_without_end_is_cut_short_and_leaves_others_their_time(site: Site) -> None:
    site.configure("echo sign >> life", kind="on_success")
    site.configure("exec yes a line", timeout_s=1)
    async with served(site):
        site.tell(ended())
        for number in range(3):
            site.tell(ended(Outcome.SUCCEEDED))
            await site.wrote("life", number + 1)
        assert not site.told("hook killed")
        await site.heard("hook killed")
    *lines, rest = site.output()
    assert set(lines) == {"a line"}
    assert len(lines) == OUTPUT_LINES
    assert rest.endswith("lines more")


async def test_a_hook_is_over_when_what_it_started_goes_on_holding_its_output(site: Site) -> None:
    site.configure(f"{FOREVER} & echo $! >> children; echo done", timeout_s=3)
    runs = [ended(instance=f"web-{number}") for number in range(2 * hooks.AT_ONCE)]
    async with served(site):
        site.tell(*runs)
        await site.heard("hook done", times=len(runs))
        assert not site.told("what a hook left running was killed")
        assert all(map(lives, site.read("children")))
        await site.heard("what a hook left running was killed", times=len(runs))
    assert not any(map(lives, site.read("children")))
    assert site.output() == ["done"] * len(runs)


async def test_what_a_hook_starts_in_the_background_may_finish(site: Site) -> None:
    site.configure("(sleep 0.3; echo sent > sent) > /dev/null 2>&1 &")
    async with served(site):
        site.tell(ended())
        await site.heard("hook done")
        await site.wrote("sent")
    assert not site.told("what a hook left running was killed")


async def test_no_more_than_a_few_hooks_leave_something_running(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "MOST_LEFT", 1)
    monkeypatch.setattr(hooks, "GRACE_S", 0.1)
    site.configure(f"{FOREVER} & echo $! >> children")
    async with served(site):
        site.tell(ended(), ended())
        killed = await site.heard("what a hook left running was killed")
        assert sorted(map(lives, site.read("children"))) == [False, True]
    assert killed["why"] == "too many hooks have left something running"
    assert not any(map(lives, site.read("children")))


# Many at once, reload, stop


async def test_a_burst_runs_a_few_at_once_and_drops_the_oldest_with_a_word(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hooks, "MOST_WAITING", 6)
    wait = "while [ ! -e go ]; do sleep 0.02; done"
    site.configure(f"echo $HYPEMAND_INSTANCE_ID >> called; echo + >> level; {wait}; echo - >> level")
    async with served(site):
        before = descriptors()
        site.tell(*[ended(instance=f"web-{number}") for number in range(1000)])
        assert descriptors() < before + 100
        await site.wrote("level", lines=hooks.AT_ONCE)
        (site.directory / "go").touch()
        await site.heard("hook done", times=hooks.AT_ONCE + 6)
    expected = [*range(hooks.AT_ONCE), *range(994, 1000)]
    assert sorted(site.read("called")) == sorted(f"web-{number}" for number in expected)
    assert len(site.told("hooks take too long: the oldest that wait are dropped")) == 1
    (dropped,) = site.told("hooks were dropped")
    assert (dropped["dropped"], dropped["log_level"]) == (1000 - len(expected), "error")
    level = most = 0
    for sign in site.read("level"):
        level += 1 if sign == "+" else -1
        most = max(most, level)
    assert most == hooks.AT_ONCE


async def test_what_ended_before_hooks_are_served_is_told_then(site: Site) -> None:
    site.configure("echo called >> called")
    site.tell(ended())
    async with served(site):
        await site.heard("hook done")
    assert site.read("called") == ["called"]


async def test_the_config_in_force_counts_when_a_hook_starts(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "AT_ONCE", 1)
    site.configure("echo old >> called; while [ ! -e go ]; do sleep 0.02; done")
    async with served(site):
        site.tell(ended(), ended())
        await site.wrote("called")
        site.config = HooksConfig(on_failure=(site.script("echo new >> called", "new"),))
        (site.directory / "go").touch()
        await site.heard("hook done", times=2)
        site.config = HooksConfig()
        site.tell(ended())
        await trio.sleep(0.1)
    assert site.read("called") == ["old", "new"]


async def test_at_the_stop_hooks_get_their_grace_and_those_that_wait_too(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hooks, "AT_ONCE", 1)
    monkeypatch.setattr(hooks, "GRACE_S", 60.0)
    site.configure("sleep 0.2; echo told >> called")
    async with served(site):
        site.tell(*[ended()] * 3)
    assert site.read("called") == ["told"] * 3
    assert not site.told("hook killed")


async def test_at_the_stop_a_hook_that_hangs_is_killed_and_those_behind_it_are_not_run(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hooks, "AT_ONCE", 1)
    monkeypatch.setattr(hooks, "GRACE_S", 0.3)
    daemonised = f"setsid {FOREVER} > /dev/null 2>&1 & echo $! >> apart"
    site.configure(f"trap '' TERM INT HUP; {daemonised}; {FOREVER} & echo $! >> children; echo $$ >> children; wait")
    async with served(site):
        site.tell(*[ended()] * 3)
        await site.wrote("children", 2)
    assert site.told("hook killed", why="hypemand stops")
    assert site.told("hooks not run: hypemand stops", hooks=2)
    (apart,) = site.read("apart")
    assert len(site.read("children")) == 2
    assert not any(map(lives, site.read("children")))
    assert lives(apart)
    os.kill(int(apart), signal.SIGKILL)


async def test_an_internal_error_of_one_hook_is_told_and_others_run(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.configure("exit 0")
    async with served(site):
        with monkeypatch.context() as patched:
            patched.setattr(hooks, "encode_run", lambda run: 1 / 0)
            site.tell(ended())
            await site.heard("internal error of a hook")
        site.tell(ended())
        await site.heard("hook done", status=0)
    assert len(site.told("hook done")) == 1


async def test_the_script_in_the_docs_mails_failures_and_logs_skips(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = (ROOT / "docs" / "operation.md").read_text().partition("```sh\n#!/bin/sh\n")[2].partition("```")[0]
    assert "page-me" in shown
    site.script('echo "$*" > mail-arguments; cat > mail-text', "mail")
    monkeypatch.setenv("PATH", str(site.directory), prepend=os.pathsep)
    site.configure(shown)
    async with served(site):
        site.tell(ended(Outcome.SKIPPED))
        await site.heard("hook done", status=0)
        assert not site.read("mail-text")
        site.tell(ended(Outcome.FAILED))
        await site.heard("hook done", times=2, status=0)
    assert site.output() == ["skipped: it has skipped"]
    assert site.read("mail-arguments") == ["-s hypemand: web-1 failed ops@example.com"]
    error, _, document = site.read("mail-text")
    assert (error, json.loads(document)["outcome"]) == ("it has failed", "failed")


# Their output


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        (b"", []),
        (b"\n \n\r\n", []),
        (b"one\r\ntwo", ["one", "two"]),
        ("tab\there, ü, \u202egnp".encode(), ["tab\there, ü, \\u202egnp"]),
        (b"\x1b]0;title\x07\x9b", ["\\x1b]0;title\\x07\\x9b"]),
        (b"x" * (LONGEST_LINE + 1), ["x" * LONGEST_LINE + "..."]),
        (b"x\n" * (OUTPUT_LINES + 2), ["x"] * OUTPUT_LINES + ["... and 0 bytes, 2 lines more"]),
        (b"x" * (OUTPUT_BYTES + 7), ["x" * LONGEST_LINE + "...", "... and 7 bytes more"]),
    ],
)
def test_output_is_shown_in_harmless_lines_up_to_a_limit(written: bytes, shown: list[str]) -> None:
    output = Output()
    for start in range(0, len(written), 1000):
        output.take(written[start : start + 1000])
    assert output.lines() == shown
