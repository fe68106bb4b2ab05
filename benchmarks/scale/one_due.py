"""One due schedule among many: how late does it begin, beside a bare `trio.sleep_until` to such instants?

The daemon has all schedules, a few of which come due one by one, at instants
half a second apart. The sleeper is a process of its own that sleeps to the
instants in between, meanwhile.
"""

import json
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import trio

from benchmarks.scale.host import Host, Table, write_schedules
from benchmarks.scale.noop import instance_name
from benchmarks.scale.rows import Goal, Row, late_row
from benchmarks.scale.setting import Setting, child, patiently

NAME = "one-due"
ABOUT = "lateness of one due schedule among 100,000"
FULL, QUICK = 100_000, 5_000
DUE_FULL, DUE_QUICK = 100, 12
STEP_S = 0.5
GOAL_MS = 5.0
_MARGIN_S = 8.0


async def sleeper(first: float, count: int) -> list[float]:
    """How late `trio.sleep_until` ends at each of so many instants from *first* on, seconds."""
    late = []
    for number in range(count):
        at = first + number * STEP_S
        await trio.sleep_until(trio.current_time() + at - time.time())
        late.append(time.time() - at)
    return late


async def measure(setting: Setting) -> Sequence[Row]:
    """Once: the instants are the rounds."""
    count, due = setting.size(FULL, QUICK), setting.size(DUE_FULL, DUE_QUICK)
    table, host = Table(count=count), Host(setting.place("hypemand"))
    host.write([table], concurrency=4)
    now = datetime.now(UTC)
    setting.tell(f"{NAME}: writing {count} schedules")
    others = ((number, now + timedelta(hours=2, seconds=number * 70_000 / count)) for number in range(due, count))
    await trio.to_thread.run_sync(write_schedules, host.state / "schedules", others, table)

    async def attempt(margin_s: float) -> tuple[list[float], list[float], list[float]] | None:
        return await _come_due(setting, host, table, due, datetime.now(UTC) + timedelta(seconds=margin_s))

    claimed, called, slept = await patiently(attempt, _MARGIN_S + count / 5000)
    return [
        late_row(
            figure=NAME,
            key=key,
            title=f"one due among {count:,}, {title}",
            ours=[late_s],
            peer="trio.sleep_until",
            theirs=[slept],
            goal=Goal(GOAL_MS),
        )
        for key, title, late_s in (("claimed", "claimed (late_s)", claimed), ("called", "hypervisor called", called))
    ]


async def _come_due(
    setting: Setting, host: Host, table: Table, due: int, first: datetime
) -> tuple[list[float], list[float], list[float]] | None:
    moments = {number: first + timedelta(seconds=number * STEP_S) for number in range(due)}
    for log in host.state.glob("runs.jsonl*"):
        log.unlink()  # of an attempt that came too late
    host.schedules(moments.items(), table)
    slept: list[float] = []

    async def sleep() -> None:
        slept.extend(await child("one_due", first.timestamp() + STEP_S / 2, due))

    async with host.serving() as daemon:
        if (first - datetime.now(UTC)).total_seconds() < 2.0:
            return None
        setting.tell(f"{NAME}: {due} come due one by one")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sleep)
            await trio.sleep((moments[due - 1] - datetime.now(UTC)).total_seconds() + 0.5)
        await host.wait_finished(daemon, due)
        await daemon.stop()
    called = host.called_s(table)
    late = [called[instance_name(table.prefix, number)] - at.timestamp() for number, at in moments.items()]
    return host.late_s(), late, slept


def main() -> int:
    """The sleeper."""
    print(json.dumps(trio.run(sleeper, float(sys.argv[1]), int(sys.argv[2]))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
