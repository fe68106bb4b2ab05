"""Durable runs per second, 64 at once: every run's lines are in the run log and its schedule file is written.

From the instant at which all are due until the last of both is on the disk.
APScheduler with sqlite writes a job's next run, and keeps no history.
"""

from collections.abc import Sequence
from statistics import median

from benchmarks.scale.due_at_once import apscheduler_flood, flood
from benchmarks.scale.host import Host, Table
from benchmarks.scale.rows import Better, Goal, Of, Row, short
from benchmarks.scale.setting import NO_APSCHEDULER, Setting, has_apscheduler

NAME = "runs-per-second"
ABOUT = "durable runs per second with a hypervisor that answers at once, 64 at once"
AT_ONCE = 64
FULL, QUICK = 2000, 300
GOAL_RATIO = 2.0


async def measure(setting: Setting) -> Sequence[Row]:
    """By turns."""
    count = setting.size(FULL, QUICK)
    ours, theirs = [], []
    for number in range(setting.runs):
        setting.tell(f"{NAME}: round {number + 1} of {setting.runs}: {count} runs")
        table, host = Table(count=count), Host(setting.place("hypemand"))
        took = await flood(host, [table], counted=table, concurrency=AT_ONCE)
        ours.append(count / took.took_s)
        if has_apscheduler():
            setting.tell(f"{NAME}: the same by APScheduler")
            theirs.append(count / (await apscheduler_flood(setting, "sqlite", count, AT_ONCE)).took_s)
    return [
        Row(
            figure=NAME,
            key=NAME,
            title=f"durable runs, {count:,} of them, {AT_ONCE} at once",
            unit="/s",
            better=Better.MORE,
            ours=median(ours),
            peer="APScheduler, sqlite",
            theirs=median(theirs) if theirs else None,
            goal=Goal(GOAL_RATIO, Of.RATIO),
            checked=True,
            note="" if theirs else NO_APSCHEDULER,
            detail={"hypemand": [short(rate) for rate in ours], "peer": [short(rate) for rate in theirs]},
        )
    ]
