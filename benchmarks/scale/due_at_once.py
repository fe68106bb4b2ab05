"""Many schedules due at one instant: how late does each begin, beside APScheduler and a loop that polls?

hypemand is the real daemon with its guard, durable as always. Two instants
count as the begin: the one that its history tells (``late_s``: the run is
claimed, right before its started line is written), and the one at which the
hypervisor is called, with the started line durable. APScheduler's is the one
at which the job's function runs. Each round is a fresh process; by turns.
"""

import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from statistics import median

import trio
from attrs import frozen

from benchmarks.scale.host import Host, Table
from benchmarks.scale.machine import cpu_s
from benchmarks.scale.noop import instance_name
from benchmarks.scale.polling import SNAPSHOT_S, polled_anywhere
from benchmarks.scale.rows import Goal, Row, late_row, short
from benchmarks.scale.setting import NO_APSCHEDULER, Setting, child, has_apscheduler, patiently

NAME = "due-at-once"
ABOUT = "lateness of 1,000 schedules that are due at one instant, concurrency 1,000"
GOAL_MS = 50.0
FULL, QUICK = 1000, 200
_MARGIN_S = 3.0


@frozen
class Flood:
    """What came of one, in seconds: how late each run was, as claimed and called, when all was written; processor."""

    claimed_s: Sequence[float]
    called_s: Sequence[float]
    took_s: float
    cpu_s: float


async def flood(host: Host, tables: Sequence[Table], *, counted: Table, concurrency: int) -> Flood:
    """Have every schedule of *tables* come due at one instant; those of *counted* are waited for, and count."""
    total = sum(table.count for table in tables)

    async def attempt(margin_s: float) -> Flood | None:
        shutil.rmtree(host.state, ignore_errors=True)  # an attempt that came too late has runs in it
        moment = datetime.now(UTC) + timedelta(seconds=margin_s)
        host.write(tables, concurrency=concurrency)
        for table in tables:
            host.schedules(((number, moment) for number in range(table.count)), table)
        async with host.serving() as daemon:
            left_s = (moment - datetime.now(UTC)).total_seconds()
            if left_s < 1.0:
                return None
            used_before = cpu_s(daemon.pid)
            await trio.sleep(left_s + 0.5)
            await host.wait_finished(daemon, counted.count)
            written = await _written(host)
            used = cpu_s(daemon.pid) - used_before
            await daemon.stop()
        late_s, begun = host.late_s(counted.prefix), moment.timestamp()
        called = host.called_s(counted)
        names = (instance_name(counted.prefix, number) for number in range(counted.count))
        return Flood(late_s, [called[name] - begun for name in names], written - begun, used)

    return await patiently(attempt, _MARGIN_S + total / 400)


async def _written(host: Host) -> float:
    """When the last schedule file was written: once no more are for a while."""
    last = 0.0
    while (written := host.written_s()) != last:
        last = written
        await trio.sleep(0.5)
    return last


async def apscheduler_flood(setting: Setting, store: str, count: int, workers: int) -> Flood:
    """The same by APScheduler."""

    async def attempt(margin_s: float) -> Flood | None:
        at = datetime.now(UTC).timestamp() + margin_s
        place = setting.place(f"apscheduler-{store}")
        options = ("--store", store, "--count", count, "--workers", workers, "--directory", place, "--at", at)
        told = await child("apscheduler_peer", "due", *options)
        return None if told is None else Flood(told["late_s"], told["late_s"], told["took_s"], told["cpu_s"])

    return await patiently(attempt, _MARGIN_S + count / 200)


async def measure(setting: Setting) -> Sequence[Row]:
    """By turns: hypemand, hypemand with leases of its guard, APScheduler in memory, APScheduler with sqlite."""
    count = setting.size(FULL, QUICK)
    ours: dict[str, list[Flood]] = {"hypervisor": [], "engine": []}
    theirs: dict[str, list[Flood]] = {"memory": []} if setting.sparing else {"sqlite": [], "memory": []}
    for number in range(setting.runs):
        for freezes, rounds in ours.items():
            setting.tell(f"{NAME}: round {number + 1} of {setting.runs}: {count} due at once, {freezes} freezes")
            table, host = Table(count=count, freezes=freezes), Host(setting.place("hypemand"))
            rounds.append(await flood(host, [table], counted=table, concurrency=count))
        for store, rounds in theirs.items() if has_apscheduler() else ():
            setting.tell(f"{NAME}: the same by APScheduler, {store}")
            rounds.append(await apscheduler_flood(setting, store, count, count))
    return [*_beside_apscheduler(ours, theirs, count), *_beside_polling(ours["hypervisor"], count)]


def _beside_apscheduler(
    ours: Mapping[str, Sequence[Flood]], theirs: Mapping[str, Sequence[Flood]], count: int
) -> list[Row]:
    note = "" if has_apscheduler() else NO_APSCHEDULER
    claimed = [flood.claimed_s for flood in ours["hypervisor"]]
    called = [flood.called_s for flood in ours["hypervisor"]]
    leased = [flood.called_s for flood in ours["engine"]]
    return [
        late_row(
            figure=NAME,
            key=f"{key}/{store}",
            title=f"{count:,} due at once, {title}",
            ours=rounds,
            peer=f"APScheduler, {store}",
            theirs=[flood.called_s for flood in theirs[store]],
            goal=goal,
            checked=store == "memory",  # how long a sync takes on a busy disk is anything but steady
            note=note,
        )
        for key, title, rounds, goal in (
            ("claimed", "claimed (late_s)", claimed, Goal(GOAL_MS)),
            ("called", "hypervisor called", called, Goal(GOAL_MS)),
            ("leased", "hypervisor called, with leases of the guard", leased, None),
        )
        for store in theirs
    ]


def _beside_polling(ours: Sequence[Flood], count: int) -> list[Row]:
    """Against the loop as if a run took no longer than one of hypemand's here, and as if guests were captured."""
    own_s = median(flood.took_s for flood in ours) / count
    return [
        late_row(
            figure=NAME,
            key=f"polling/{key}",
            title=f"{count:,} due at once, hypervisor called",
            ours=[flood.called_s for flood in ours],
            peer=f"polling loop, simulated, {short(1000 * run_s)} ms a run",
            theirs=[polled_anywhere(count, run_s, phases=5)],
        )
        for key, run_s in (("at-once", own_s), ("snapshots", SNAPSHOT_S))
    ]
