"""The run log alone, in durable lines per second, beside sqlite with a write-ahead log and full sync.

Writers are tasks that append one line after another, each durable before the
next. sqlite has one writer at a time: its are threads that take turns on one
connection, a transaction for each line; and, the best that can be made of it,
one transaction for as many lines as there are writers (group commit by hand).
"""

import json
import sqlite3
import sys
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median

import trio

from benchmarks.scale.rows import Better, Goal, Row
from benchmarks.scale.setting import Setting, child
from hypemand.core.model import (
    Freezer,
    InstanceId,
    InstanceState,
    Outcome,
    RunFinished,
    RunStarted,
    SnapshotKind,
    Trigger,
)
from hypemand.state.codec import Line, encode_line
from hypemand.state.files import Disk
from hypemand.state.runlog import RunLog

NAME = "run-log"
ABOUT = "the run log alone, in durable lines per second"
GOAL_LINES = 20_000.0
FEW, MANY = 64, 1000


def lines_of(writer: int, runs: int) -> list[Line]:
    """What a writer has to append: the two lines of each run."""
    now = datetime(2026, 1, 1, tzinfo=UTC)
    instance = InstanceId(f"vm-{writer:06}")
    lines: list[Line] = []
    for number in range(runs):
        run_id, began = f"r{writer:011x}{number:012x}", now + timedelta(hours=number)
        lines += [_started(run_id, instance, began), _finished(run_id, instance, began)]
    return lines


def _started(run_id: str, instance: InstanceId, at: datetime) -> RunStarted:
    return RunStarted(
        run_id=run_id,
        instance_id=instance,
        backend="noop",
        trigger=Trigger.SCHEDULE,
        kind=SnapshotKind.STANDBY,
        state_before=InstanceState.RUNNING,
        due_at=at,
        next_run_at=at + timedelta(hours=24),
        started_at=at + timedelta(milliseconds=3),
        snapshot_name="nightly-20260101-000000",
        tags={"hypeman.scheduled": "true", "hypeman.schedule_instance_id": instance},
        max_freeze_s=120.0,
        freezes=Freezer.HYPERVISOR,
        boot_id="0f9b6c1e-5a55-4c53-9a0b-0d6f4f1a2b3c",
        connection={"type": "noop", "prefix": "vm", "count": 1000},
        boot_s=12345.678901,
    )


def _finished(run_id: str, instance: InstanceId, at: datetime) -> RunFinished:
    return RunFinished(
        run_id=run_id,
        instance_id=instance,
        due_at=at,
        started_at=at + timedelta(milliseconds=3),
        finished_at=at + timedelta(milliseconds=30),
        outcome=Outcome.SUCCEEDED,
        kind=SnapshotKind.STANDBY,
        snapshot_id=run_id,
        snapshot_name="nightly-20260101-000000",
        size_bytes=0,
        freeze_s=0.012345,
        capture_s=0.012345,
        late_s=0.003,
    )


async def append_all(directory: Path, writers: int, runs: int) -> float:
    """Lines per second of the run log in *directory*."""
    log = RunLog(directory, Disk())
    await log.open()
    work = [lines_of(writer, runs) for writer in range(writers)]

    async def write(lines: Sequence[Line]) -> None:
        for line in lines:
            await log.append(line)

    began = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for lines in work:
            nursery.start_soon(write, lines)
    took_s = time.perf_counter() - began
    log.close()
    return 2 * writers * runs / took_s


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("CREATE TABLE lines (line BLOB NOT NULL)")
    return connection


def insert_each(directory: Path, writers: int, runs: int) -> float:
    """Lines per second of sqlite, a transaction each."""
    connection, turn = _connect(directory / "each.sqlite"), threading.Lock()
    work = [lines_of(writer, runs) for writer in range(writers)]

    def write(lines: Sequence[Line]) -> None:
        for line in lines:
            data = encode_line(line)
            with turn:
                connection.execute("INSERT INTO lines VALUES (?)", (data,))

    threads = [threading.Thread(target=write, args=(lines,)) for lines in work]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took_s = time.perf_counter() - began
    connection.close()
    return 2 * writers * runs / took_s


def insert_together(directory: Path, writers: int, runs: int) -> float:
    """Lines per second of sqlite, as many in a transaction as there are writers."""
    connection = _connect(directory / "together.sqlite")
    rounds = [*zip(*(lines_of(writer, runs) for writer in range(writers)), strict=True)]
    began = time.perf_counter()
    for lines in rounds:
        connection.execute("BEGIN")
        connection.executemany("INSERT INTO lines VALUES (?)", [(encode_line(line),) for line in lines])
        connection.execute("COMMIT")
    took_s = time.perf_counter() - began
    connection.close()
    return 2 * writers * runs / took_s


async def measure(setting: Setting) -> Sequence[Row]:
    """By turns, each in a process of its own."""
    rates: dict[tuple[str, int], list[float]] = {}
    for number in range(setting.runs):
        setting.tell(f"{NAME}: round {number + 1} of {setting.runs}")
        for way, writers, full, quick in (
            ("ours", FEW, 150, 20),
            ("each", FEW, 15, 5),
            ("together", FEW, 150, 20),
            ("ours", MANY, 20, 4),
            ("together", MANY, 20, 4),
        ):
            rate = await child("run_log", way, setting.place(way), writers, setting.size(full, quick))
            rates.setdefault((way, writers), []).append(rate)
    few, many = median(rates["ours", FEW]), median(rates["ours", MANY])
    each, together = "sqlite WAL, full sync, a transaction each", "the same, a transaction for all writers"
    return [
        _row("each", FEW, few, each, median(rates["each", FEW]), goal=None),
        _row("together", FEW, few, together, median(rates["together", FEW]), goal=GOAL_LINES),
        _row("together", MANY, many, together, median(rates["together", MANY]), goal=GOAL_LINES),
    ]


def _row(key: str, writers: int, ours: float, peer: str, theirs: float, *, goal: float | None) -> Row:
    return Row(
        figure=NAME,
        key=f"{NAME}/{key}/{writers}",
        title=f"run log alone, {writers:,} writers at once",
        unit="lines/s",
        better=Better.MORE,
        ours=ours,
        peer=peer,
        theirs=theirs,
        goal=None if goal is None else Goal(goal),
        checked=key == "together",  # a sync for each line is as slow as the disk is busy
    )


def main() -> int:
    """One way, in this process."""
    way, directory, writers, runs = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    if way == "ours":
        rate = trio.run(append_all, directory, writers, runs)
    else:
        rate = (insert_each if way == "each" else insert_together)(directory, writers, runs)
    print(json.dumps(rate))
    return 0


if __name__ == "__main__":
    sys.exit(main())
