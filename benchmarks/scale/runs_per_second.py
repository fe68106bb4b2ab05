"""Durable runs per second, 64 at once: every run's lines are in the run log and its schedule file is written.

From the instant at which all are due until the last of both is on the disk.
APScheduler with sqlite writes a job's next run, and keeps no history.
"""

from collections.abc import Callable, Sequence
from statistics import median

from benchmarks.scale.due_at_once import Flood, apscheduler_flood, flood
from benchmarks.scale.host import Host, Table
from benchmarks.scale.rows import Better, Goal, Of, Row, short
from benchmarks.scale.setting import NO_APSCHEDULER, Setting, has_apscheduler

NAME = "runs-per-second"
ABOUT = "durable runs per second with a hypervisor that answers at once, 64 at once"
AT_ONCE = 64
FULL, QUICK = 2000, 200
PEER = "APScheduler, sqlite"
GOAL_RATIO = 2.0


async def measure(setting: Setting) -> Sequence[Row]:
    """By turns. What a run takes of the processor depends least on the disk: that ratio is compared with kept ones."""
    count = setting.size(FULL, QUICK)
    ours: list[Flood] = []
    theirs: list[Flood] = []
    for number in range(setting.runs):
        setting.tell(f"{NAME}: round {number + 1} of {setting.runs}: {count} runs")
        table, host = Table(count=count), Host(setting.place("hypemand"))
        ours.append(await flood(host, [table], counted=table, concurrency=AT_ONCE))
        if has_apscheduler():
            setting.tell(f"{NAME}: the same by APScheduler")
            theirs.append(await apscheduler_flood(setting, "sqlite", count, AT_ONCE))
    title = f"durable runs, {count:,} of them, {AT_ONCE} at once"
    rates = Row(
        figure=NAME,
        key=f"{NAME}/rate",
        title=title,
        unit="/s",
        better=Better.MORE,
        ours=median(count / flood.took_s for flood in ours),
        peer=PEER,
        theirs=median(count / flood.took_s for flood in theirs) if theirs else None,
        goal=Goal(GOAL_RATIO, Of.RATIO),
        note="" if theirs else NO_APSCHEDULER,
        detail=_each(ours, theirs, lambda flood: count / flood.took_s),
    )
    cpu = Row(
        figure=NAME,
        key=f"{NAME}/cpu",
        title=f"{title}: processor for each",
        unit="ms",
        ours=median(1000 * flood.cpu_s / count for flood in ours),
        peer=PEER,
        theirs=median(1000 * flood.cpu_s / count for flood in theirs) if theirs else None,
        checked=True,
        note="" if theirs else NO_APSCHEDULER,
        detail=_each(ours, theirs, lambda flood: 1000 * flood.cpu_s / count),
    )
    return [rates, cpu]


def _each(ours: Sequence[Flood], theirs: Sequence[Flood], get: Callable[[Flood], float]) -> dict[str, list[str]]:
    return {"hypemand": [short(get(flood)) for flood in ours], "peer": [short(get(flood)) for flood in theirs]}
