"""Nothing due: what do 10,000 schedules take of processor and memory, daemon and guard together?

For a minute, beside APScheduler with as many jobs in memory at the same time.
Memory is PSS: pages that several processes share are divided among them.
"""

import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import trio

from benchmarks.scale.host import Host, Table
from benchmarks.scale.machine import cpu_s, memory_mb
from benchmarks.scale.rows import Goal, Row
from benchmarks.scale.setting import NO_APSCHEDULER, NotMeasuredError, Setting, child_command, has_apscheduler
from tests.processes import ROOT, environment, guards_of

NAME = "idle"
ABOUT = "processor time and memory of 10,000 schedules while nothing is due"
COUNT = 10_000
FULL_S, QUICK_S = 60, 10
SETTLE_S = 3.0
GOAL_PERCENT, GOAL_MB = 0.05, 60.0


@asynccontextmanager
async def apscheduler(count: int) -> AsyncIterator[int | None]:
    """The process id of one that has so many jobs; None where there is none to be had."""
    if not has_apscheduler():
        yield None
        return
    process = await trio.lowlevel.open_process(
        child_command("apscheduler_peer", "idle", "--count", count),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env=environment(),
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if await process.stdout.receive_some() != b"ready\n":
            raise NotMeasuredError("APScheduler did not start")
        yield process.pid
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            await process.stdin.aclose()
            await process.stdout.aclose()


async def measure(setting: Setting) -> Sequence[Row]:
    """Both at the same time."""
    seconds = setting.size(FULL_S, QUICK_S)
    table, host = Table(count=COUNT), Host(setting.place("hypemand"))
    host.write([table], concurrency=4)
    now = datetime.now(UTC)
    host.schedules(((n, now + timedelta(hours=2, seconds=n * 70_000 / COUNT)) for n in range(COUNT)), table)
    async with host.serving() as daemon, apscheduler(COUNT) as peer:
        setting.tell(f"{NAME}: {seconds} s with {COUNT} schedules")
        await trio.sleep(SETTLE_S)
        guards = guards_of(daemon.pid)
        pids = {"daemon": daemon.pid, **({"guard": guards[0]} if guards else {})}
        watched = {**pids, **({} if peer is None else {"APScheduler": peer})}
        before = {name: cpu_s(pid) for name, pid in watched.items()}
        await trio.sleep(seconds)
        used = {name: 100 * (cpu_s(pid) - before[name]) / seconds for name, pid in watched.items()}
        pss = {name: memory_mb(pid) for name, pid in watched.items()}
        rss = {name: memory_mb(pid, "Rss") for name, pid in watched.items()}
        if not guards:
            raise NotMeasuredError("the daemon has no guard")
        await daemon.stop()
    cpu = _row("cpu", f"idle for {seconds} s, {COUNT:,} schedules: processor", "% of a core", used, ours=[*pids])
    memory = _row("memory", f"idle, {COUNT:,} schedules: memory (PSS)", "MB", pss, ours=[*pids], beside=rss)
    return [cpu, memory]


def _row(
    key: str,
    title: str,
    unit: str,
    values: dict[str, float],
    *,
    ours: Sequence[str],
    beside: dict[str, float] | None = None,
) -> Row:
    theirs = values.get("APScheduler")
    return Row(
        figure=NAME,
        key=f"{NAME}/{key}",
        title=title,
        unit=unit,
        ours=sum(values[name] for name in ours),
        peer="APScheduler, memory",
        theirs=theirs,
        goal=Goal(GOAL_PERCENT if key == "cpu" else GOAL_MB),
        checked=key == "memory",
        note=NO_APSCHEDULER if theirs is None else "",
        detail={"each": values, **({} if beside is None else {"rss_mb": beside})},
    )
