"""The guard process by itself: what it says, when it acts, whom it kills, and what it costs."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio
from attrs import define

from hypemand.engine import guard
from tests.processes import wait_until

OWNER_PROGRAM = """
import os, signal, subprocess, sys, time
read, write = map(int, sys.argv[1:3])
process = subprocess.Popen(sys.argv[3:] , pass_fds=(read, write), start_new_session=True)
os.close(read); os.close(write)
print(process.pid, flush=True)
signal.pause()
"""
"""Stands for a daemon: the parent of a guard. The test itself speaks for it over the pipes."""

SETTLER = """
import json, os, sys, time
streams = [os.path.exists(f"/proc/self/fd/{number}") for number in range(3)]
with open(sys.argv[1], "a") as file:
    called = {"at": time.monotonic(), "arguments": sys.argv[2:], "streams": streams, "pid": os.getpid()}
    file.write(json.dumps(called) + "\\n")
status = open(sys.argv[1] + ".status").read()
if status == "hangs":
    time.sleep(600)
sys.exit(int(status))
"""
"""Stands for the process that settles: notes that it ran, and ends as it is told."""


@define
class Guarded:
    """A guard, the process that it guards, and the daemon's ends of its pipes."""

    owner: trio.Process
    guard_pid: int
    inbox: trio.lowlevel.FdStream
    outbox: int
    directory: Path

    async def hears(self, line: str, within_s: float = 10.0) -> None:
        """Wait until the guard says *line*; what it says before that is dropped."""
        with trio.fail_after(within_s):
            rest = b""
            while f"{line}\n".encode() not in rest:
                data = await self.inbox.receive_some()
                assert data, f"the guard ended before it said {line!r}"
                rest += data

    def say(self, line: str) -> None:
        os.write(self.outbox, f"{line}\n".encode())

    async def lease(self, run: str, within_s: float) -> float:
        deadline = time.monotonic() + within_s
        self.say(f"freeze {run} {deadline}")
        await self.hears(f"ack {run}")
        return deadline

    async def keeps_answering(self) -> None:
        while True:
            for line in (await self.inbox.receive_some()).decode().splitlines():
                if line.startswith("ping"):
                    self.say(line.replace("ping", "pong"))

    def hang_up(self) -> None:
        if self.outbox >= 0:
            os.close(self.outbox)
            self.outbox = -1

    @property
    def settlings(self) -> list[dict[str, object]]:
        """What the process that settles was called with, each time."""
        note = self.directory / "settled"
        return [json.loads(line) for line in note.read_text().splitlines()] if note.exists() else []

    async def settled(self, times: int = 1) -> dict[str, object]:
        await wait_until(lambda: len(self.settlings) >= times, f"settled {times} times")
        return self.settlings[times - 1]

    @property
    def lives(self) -> bool:
        return is_alive(self.guard_pid)


def is_alive(pid: int) -> bool:
    """Whether the process is there and no zombie: nobody here waits for a guard that its daemon left behind."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    return False


@asynccontextmanager
async def guarded(
    directory: Path, *, token: str = "none", status: int | str = 0, started_by: str = ""
) -> AsyncIterator[Guarded]:
    """A guard of a process that stands for a daemon.

    Args:
        status: What the process that settles ends with.
        started_by: More for the program that starts the guard, before it does.
    """
    settler = directory / "settle.py"
    settler.write_text(SETTLER)
    (directory / "settled.status").write_text(str(status))
    theirs_in, outbox = os.pipe()
    ours_in, theirs_out = os.pipe()
    command = [sys.executable, "-I", "-S", guard.__file__, str(theirs_in), str(theirs_out)]
    settle = [sys.executable, str(settler), str(directory / "settled")]
    # The owner's pid is known to itself alone before it starts the guard: it puts it in the place of "OWNER".
    arguments = "[str(os.getpid()) if a == 'OWNER' else a for a in sys.argv[3:]]"
    program = OWNER_PROGRAM.replace("process =", f"{started_by}\nprocess =").replace("sys.argv[3:]", arguments)
    owner = await trio.lowlevel.open_process(
        [
            *(sys.executable, "-c", program, str(theirs_in), str(theirs_out)),
            *(*command, "OWNER", token, *settle),
        ],
        stdout=subprocess.PIPE,
        pass_fds=(theirs_in, theirs_out),
    )
    os.close(theirs_in)
    os.close(theirs_out)
    assert owner.stdout is not None
    pid = int((await owner.stdout.receive_some()).decode())
    async with AsyncExitStack() as stack:
        inbox = await stack.enter_async_context(trio.lowlevel.FdStream(ours_in))
        made = Guarded(owner, pid, inbox, outbox, directory)
        await made.hears("hello")
        try:
            yield made
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            owner.kill()
            await owner.wait()
            await owner.stdout.aclose()
            made.hang_up()


async def gone(made: Guarded) -> None:
    await wait_until(lambda: not made.lives, "the guard ends")


# When it acts.


async def test_a_goodbye_ends_it_and_nothing_is_settled(tmp_path: Path) -> None:
    async with guarded(tmp_path) as made:
        await made.lease("r1", 60)
        made.say("thawed r1")
        made.say("goodbye")
        await gone(made)
        assert (made.settlings, made.owner.poll()) == ([], None)


async def test_a_daemon_that_is_killed_has_its_runs_settled_at_once(tmp_path: Path) -> None:
    async with guarded(tmp_path) as made:
        await made.lease("r1", 60)
        died_at = time.monotonic()
        made.owner.kill()
        made.hang_up()
        called = await made.settled()
        assert called["arguments"] == [
            *("--because", "the daemon has ended"),
            *("--daemon", str(made.owner.pid)),
            *("--frozen", "r1"),
        ]
        assert isinstance(called["at"], float)
        assert called["at"] - died_at < 3.0
        await gone(made)


async def test_a_daemon_that_closes_the_pipe_without_a_goodbye_is_ended_first(tmp_path: Path) -> None:
    async with guarded(tmp_path) as made:
        made.hang_up()
        await made.settled()
        assert await made.owner.wait() == -signal.SIGKILL


async def test_a_daemon_that_answers_keeps_its_duty_past_every_deadline(tmp_path: Path) -> None:
    async with guarded(tmp_path) as made, trio.open_nursery() as nursery:
        await made.lease("r1", 0.5)
        nursery.start_soon(made.keeps_answering)
        await trio.sleep(3)
        assert (made.lives, made.settlings, made.owner.poll()) == (True, [], None)
        nursery.cancel_scope.cancel()


async def test_a_daemon_that_does_not_answer_is_killed_at_the_deadline(tmp_path: Path) -> None:
    async with guarded(tmp_path) as made:
        deadline = await made.lease("r1", 2)
        called = await made.settled()
        assert isinstance(called["at"], float)
        assert deadline <= called["at"] < deadline + 3.0
        assert "did not answer" in str(called["arguments"])
        assert await made.owner.wait() == -signal.SIGKILL


async def test_a_daemon_that_never_answers_is_not_waited_for_until_a_far_deadline(tmp_path: Path) -> None:
    async with guarded(tmp_path) as made:
        deadline = await made.lease("r1", 600)
        called = await made.settled()
        assert isinstance(called["at"], float)
        assert called["at"] < deadline - 500


async def test_a_daemon_without_leases_is_not_asked_whether_it_answers(tmp_path: Path) -> None:
    async with guarded(tmp_path) as made:
        await made.lease("r1", 0.2)
        made.say("thawed r1")
        with trio.move_on_after(2):
            await made.hears("ping 1", within_s=60)
            raise AssertionError("it was pinged")
        assert (made.lives, made.owner.poll()) == (True, None)


async def test_a_guard_that_was_stopped_itself_gives_the_daemon_another_chance(tmp_path: Path) -> None:
    async with guarded(tmp_path) as made, trio.open_nursery() as nursery:
        await made.lease("r1", 1)
        await made.hears("ping 1")
        os.kill(made.guard_pid, signal.SIGSTOP)
        await trio.sleep(2.5)
        made.say("thawed another")
        os.kill(made.guard_pid, signal.SIGCONT)
        await trio.sleep(0.5)
        made.say("pong 1")
        nursery.start_soon(made.keeps_answering)
        await trio.sleep(2)
        assert (made.lives, made.settlings, made.owner.poll()) == (True, [], None)
        nursery.cancel_scope.cancel()


# Whom it kills, and whom it waits for.


async def test_children_of_the_daemon_die_with_it_and_others_do_not(tmp_path: Path) -> None:
    marked = {**os.environ, "HYPEMAND_OWNER": "token-1"}
    async with guarded(tmp_path, token="token-1") as made:
        child = await trio.lowlevel.open_process(["sleep", "600"], env=marked)
        other = await trio.lowlevel.open_process(["sleep", "600"], env={**marked, "HYPEMAND_OWNER": "token-12"})
        try:
            made.owner.kill()
            made.hang_up()
            with trio.fail_after(20):
                assert await child.wait() == -signal.SIGKILL
            await made.settled()
            assert other.poll() is None
        finally:
            for process in (child, other):
                process.kill()
                await process.wait()


async def test_what_could_not_be_settled_is_tried_again_until_it_is(tmp_path: Path) -> None:
    async with guarded(tmp_path, status=1) as made:
        made.owner.kill()
        made.hang_up()
        await made.settled(2)
        (tmp_path / "settled.status").write_text("0")
        await gone(made)
        assert len(made.settlings) >= 3


async def test_while_a_guest_may_be_frozen_the_tries_follow_each_other(tmp_path: Path) -> None:
    async with guarded(tmp_path, status=1) as made:
        await made.lease("r1", 60)
        made.owner.kill()
        made.hang_up()
        times = [float(str((await made.settled(number))["at"])) for number in range(1, 6)]
        gaps = [after - before for before, after in itertools.pairwise(times)]
        assert max(gaps) < 3.0


MISSING = "sys.argv[-3] = sys.argv[-1] + '.python'"
"""For the program that starts the guard: the process that settles can't be started, until it is put there."""


async def test_a_process_to_settle_that_can_not_be_started_is_started_when_it_can(tmp_path: Path) -> None:
    async with guarded(tmp_path, started_by=MISSING) as made:
        made.owner.kill()
        made.hang_up()
        await trio.sleep(1.5)
        assert (made.lives, made.settlings) == (True, [])
        (tmp_path / "settled.python").symlink_to(sys.executable)
        await made.settled()
        await gone(made)


async def test_a_process_to_settle_that_hangs_is_killed_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient = tmp_path / "guard.py"
    impatient.write_text(Path(guard.__file__).read_text().replace("SETTLE_S = 90.0", "SETTLE_S = 1.0"))
    monkeypatch.setattr(guard, "__file__", str(impatient))
    async with guarded(tmp_path, status="hangs") as made:
        made.owner.kill()
        made.hang_up()
        first = await made.settled()
        (tmp_path / "settled.status").write_text("0")
        await made.settled(2)
        await gone(made)
        assert not is_alive(int(str(first["pid"])))


# What it withstands, and what it costs.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGABRT, signal.SIGQUIT])
async def test_signals_do_not_end_it(tmp_path: Path, number: signal.Signals) -> None:
    async with guarded(tmp_path) as made:
        for lease in (False, True):
            if lease:
                await made.lease("r1", 60)
            os.kill(made.guard_pid, number)
        await made.lease("r2", 60)
        assert made.lives
        made.owner.kill()
        made.hang_up()
        assert (await made.settled())["pid"]


async def test_a_reader_of_the_log_that_is_gone_does_not_end_it(tmp_path: Path) -> None:
    closed = "reader, writer = os.pipe(); os.close(reader); os.dup2(writer, 2)"
    async with guarded(tmp_path, started_by=f"{closed}; {MISSING}") as made:
        made.owner.kill()
        made.hang_up()
        await trio.sleep(0.5)
        assert made.lives
        (tmp_path / "settled.python").symlink_to(sys.executable)
        await made.settled()
        await gone(made)


async def test_without_streams_those_who_settle_get_some(tmp_path: Path) -> None:
    async with guarded(tmp_path, started_by="os.close(2)") as made:
        made.owner.kill()
        made.hang_up()
        called = await made.settled()
        assert called["streams"] == [True, True, True]
        await gone(made)


async def test_who_ignores_the_end_of_children_does_not_keep_it_from_settling_once(tmp_path: Path) -> None:
    async with guarded(tmp_path, started_by="signal.signal(signal.SIGCHLD, signal.SIG_IGN)") as made:
        made.owner.kill()
        made.hang_up()
        await gone(made)
        assert len(made.settlings) == 1


async def test_a_freeze_with_a_short_budget_beside_one_with_a_long_one_ends_in_time(tmp_path: Path) -> None:
    async with guarded(tmp_path) as made:
        await made.lease("long", 600)
        await made.hears("ping 1")
        made.say("pong 1")
        deadline = await made.lease("short", 0.3)
        called = await made.settled()
        assert isinstance(called["at"], float)
        assert deadline <= called["at"] < deadline + 3.0


async def test_a_daemon_that_has_answered_after_a_deadline_may_be_slow_again(tmp_path: Path) -> None:
    async with guarded(tmp_path) as made:
        await made.lease("r1", 0.2)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(made.keeps_answering)
            await trio.sleep(1)
            nursery.cancel_scope.cancel()
        await trio.sleep(3)
        assert (made.lives, made.settlings, made.owner.poll()) == (True, [], None)


async def test_it_is_in_a_session_of_its_own_and_small(tmp_path: Path) -> None:
    async with guarded(tmp_path) as made:
        for number in range(1000):
            await made.lease(f"r{number}", 600)
        for number in range(1000):
            made.say(f"thawed r{number}")
        await made.lease("last", 600)
        status = Path(f"/proc/{made.guard_pid}/status").read_text()
        peak_kib = int(status.partition("VmHWM:")[2].split()[0])
        assert peak_kib <= 12 * 1024
        assert os.getsid(made.guard_pid) == made.guard_pid


async def test_it_uses_no_cpu_and_does_not_even_wake_while_no_lease_is_open(tmp_path: Path) -> None:
    async with guarded(tmp_path) as made:
        await made.lease("r1", 60)
        made.say("thawed r1")
        await wait_until(settles_down(made.guard_pid), "the guard sleeps")
        before = switches(made.guard_pid)
        await trio.sleep(3)
        assert switches(made.guard_pid) == before


def switches(pid: int) -> list[str]:
    """How often it gave up the processor, or was made to."""
    return [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "ctxt_switches" in line]


def settles_down(pid: int) -> Callable[[], bool]:
    """Whether it has not been woken since the last look."""
    last: list[str] = []

    def look() -> bool:
        nonlocal last
        before, last = last, switches(pid)
        return before == last

    return look
