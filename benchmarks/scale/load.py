"""Starting with many schedules: how long until they are loaded, and what each takes of memory.

In fresh processes, by turns: hypemand's engine, from its state directory until
it would start runs, and `json.loads` of the same files, each read and parsed.
The files are in the page cache for both. Memory is what the process has more
in the end (RSS, garbage collected); modules are imported before.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

import structlog
import trio

from benchmarks.scale.host import Host, Table, write_schedules
from benchmarks.scale.machine import memory_mb
from benchmarks.scale.rows import Goal, Row
from benchmarks.scale.setting import Setting, child
from hypemand.backends import registry
from hypemand.config_files import load_config
from hypemand.engine.engine import Engine
from hypemand.engine.fleet import new_fleet
from hypemand.engine.outside import this_machine
from hypemand.garbage import lasting
from hypemand.state.lock import take_lock

NAME = "load"
ABOUT = "loading 100,000 schedules at start: time, and memory for each"
FULL, QUICK = 100_000, 4_000
GOAL_S, GOAL_KB = 2.5, 1.3
"""The goal of the time is for the full size alone."""


async def load_engine(config_path: Path) -> dict[str, float]:
    """Load the state as a start does, and tell what that took."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    registry.BUILT_IN["noop"] = "benchmarks.scale.noop"  # in this process: the one that is measured has no entry point
    config = load_config(config_path, registry.parse_settings)
    outside = this_machine()
    lock = await take_lock(config.state_dir, "daemon", outside.disk)
    gc.collect()
    memory, began, cpu = memory_mb(os.getpid(), "Rss"), time.perf_counter(), time.process_time()
    async with trio.open_nursery() as background:
        engine = Engine(config, new_fleet(config.state_dir), outside, background)
        with lasting():
            await engine.load()
            loaded = time.perf_counter()
            await engine.start()
        background.start_soon(engine.serve)
        await engine.scheduler.serving.wait()
        ready, used = time.perf_counter(), time.process_time() - cpu
        gc.collect()
        grown = memory_mb(os.getpid(), "Rss") - memory
        count = len(engine.store.schedules)
        engine.stop(0.0)
        background.cancel_scope.deadline = trio.current_time() + 1.0
    lock.release()
    return {"loaded_s": loaded - began, "ready_s": ready - began, "cpu_s": used, "kb_each": 1000 * grown / count}


def load_json(directory: Path) -> dict[str, float]:
    """Read and parse the same files, and tell what that took."""
    gc.collect()
    memory, began, cpu = memory_mb(os.getpid(), "Rss"), time.perf_counter(), time.process_time()
    documents: list[Any] = []
    with os.scandir(directory) as files:
        documents += [json.loads(Path(file.path).read_bytes()) for file in files if file.name.endswith(".json")]
    took, used = time.perf_counter() - began, time.process_time() - cpu
    gc.collect()
    grown = memory_mb(os.getpid(), "Rss") - memory
    return {"loaded_s": took, "ready_s": took, "cpu_s": used, "kb_each": 1000 * grown / len(documents)}


async def measure(setting: Setting) -> Sequence[Row]:
    """By turns, over one state."""
    count = setting.size(FULL, QUICK)
    setting.tell(f"{NAME}: writing {count} schedules")
    host, table = Host(setting.place("hypemand")), Table(count=count)
    host.write([table], concurrency=4)
    now = datetime.now(UTC)
    due = ((number, now + timedelta(hours=2, seconds=number * 70_000 / count)) for number in range(count))
    await trio.to_thread.run_sync(write_schedules, host.state / "schedules", due, table)
    ours, theirs = [], []
    for number in range(setting.runs):
        setting.tell(f"{NAME}: round {number + 1} of {setting.runs}")
        ours.append(await child("load", "engine", host.config))
        theirs.append(await child("load", "json", host.state / "schedules"))
    detail = {"hypemand": ours, "json.loads": theirs}
    goal_s = None if setting.quick else GOAL_S
    return [
        _row("loaded_s", f"load {count:,} schedules", "s", ours, theirs, goal=goal_s, detail=detail),
        _row("ready_s", f"load {count:,} schedules, until runs can begin", "s", ours, theirs),
        _row("cpu_s", f"load {count:,} schedules, until runs can begin: processor", "s", ours, theirs),
        _row("kb_each", f"memory of each of {count:,} schedules", "kB", ours, theirs, goal=GOAL_KB),
    ]


def _row(
    part: str,
    title: str,
    unit: str,
    ours: Sequence[dict[str, float]],
    theirs: Sequence[dict[str, float]],
    *,
    goal: float | None = None,
    detail: Mapping[str, Any] = MappingProxyType({}),
) -> Row:
    return Row(
        figure=NAME,
        key=f"{NAME}/{part}",
        title=title,
        unit=unit,
        ours=median(one[part] for one in ours),
        peer="json.loads of the files",
        theirs=median(one[part] for one in theirs),
        goal=None if goal is None else Goal(goal),
        checked=part in ("cpu_s", "kb_each"),
        detail=detail,
    )


def main() -> int:
    """One of both, in this process."""
    what, path = sys.argv[1], Path(sys.argv[2])
    told = trio.run(load_engine, path) if what == "engine" else load_json(path)
    print(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
