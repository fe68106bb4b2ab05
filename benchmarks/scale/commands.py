"""The command line: wall and processor time of commands, beside ``python -c pass`` by turns."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from statistics import median

import trio
from attrs import frozen

from benchmarks.scale.host import Host, Table
from benchmarks.scale.rows import Goal, Row
from benchmarks.scale.setting import NotMeasuredError, Setting
from tests.processes import ROOT, environment

NAME = "commands"
ABOUT = "hypemand --help, and status of 10,000 schedules"
FULL, QUICK = 10_000, 500
RUNS_EACH = 3
"""Times that a command is run in each round: starts of processes are noisy, and cost little."""
GOAL_HELP_S, GOAL_STATUS_S = 0.2, 1.0
_BARE = [sys.executable, "-c", "pass"]


@frozen
class Took:
    """Seconds of one command: by the clock, and of the processor."""

    wall_s: float
    cpu_s: float


def run(command: Sequence[str], env: Mapping[str, str]) -> Took:
    """Run *command* to its end; it must end well."""
    began = time.perf_counter()
    with subprocess.Popen(  # noqa: S603 - our own command
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT, env=env
    ) as process:
        _, status, used = os.wait4(process.pid, 0)
        took = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise NotMeasuredError(f"{' '.join(command)} ended with {process.returncode}")
    return Took(took, used.ru_utime + used.ru_stime)


async def measure(setting: Setting) -> Sequence[Row]:
    """With a daemon that answers, and without one."""
    count = setting.size(FULL, QUICK)
    host, table = Host(setting.place("hypemand")), Table(count=count)
    host.write([table], concurrency=4)
    now = datetime.now(UTC)
    host.schedules(((n, now + timedelta(hours=2, seconds=n * 70_000 / count)) for n in range(count)), table)
    env = environment(**host.environment)
    hypemand = [sys.executable, "-m", "hypemand"]
    status = [*hypemand, "status", "-c", str(host.config)]
    setting.tell(f"{NAME}: --help")
    about = [*hypemand, "--help"]
    rows = await _rows(setting, "help", "hypemand --help", command=about, env=env, goal_s=GOAL_HELP_S)
    setting.tell(f"{NAME}: status of {count} schedules, from the files")
    title = f"status of {count:,} schedules"
    rows += await _rows(setting, "status-files", f"{title}, no daemon", command=status, env=env, goal_s=GOAL_STATUS_S)
    async with host.serving() as daemon:
        setting.tell(f"{NAME}: the same by a daemon")
        by_daemon = f"{title}, by the daemon"
        rows += await _rows(setting, "status-daemon", by_daemon, command=status, env=env, goal_s=GOAL_STATUS_S)
        await daemon.stop()
    return rows


async def _rows(
    setting: Setting, key: str, title: str, *, command: Sequence[str], env: Mapping[str, str], goal_s: float
) -> list[Row]:
    ours, bare = [], []
    for _ in range(setting.runs * RUNS_EACH):
        ours.append(await trio.to_thread.run_sync(run, command, env))
        bare.append(await trio.to_thread.run_sync(run, _BARE, env))
    return [
        Row(
            figure=NAME,
            key=f"{NAME}/{key}/{part}",
            title=f"{title}: {word}",
            unit="s",
            ours=median(getattr(one, part) for one in ours),
            peer="python -c pass",
            theirs=median(getattr(one, part) for one in bare),
            goal=Goal(goal_s) if part == "wall_s" else None,
            checked=part == "cpu_s",
        )
        for part, word in (("wall_s", "wall"), ("cpu_s", "processor"))
    ]
