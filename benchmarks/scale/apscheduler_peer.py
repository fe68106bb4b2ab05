"""APScheduler 3 in a process of its own, with its own documented settings: what hypemand's schedules stand beside.

``due``: so many jobs at one instant. ``idle``: so many, none of them due.
Nothing is dropped (``misfire_grace_time=None``), and the pool has a thread for
each job that is to run at once. Jobs in sqlite are durable as sqlite makes
them by itself; only while they are put in, nothing is synced, to save time.
"""

import argparse
import json
import sqlite3
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from apscheduler.events import EVENT_JOB_EXECUTED
from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.jobstores.memory import MemoryJobStore
from apscheduler.jobstores.sqlalchemy import SQLAlchemyJobStore
from apscheduler.schedulers.background import BackgroundScheduler

from benchmarks.scale.apscheduler_jobs import BEGUN

JOB = "benchmarks.scale.apscheduler_jobs:note"
_PATIENCE_S = 300.0


def scheduler(store: Any, workers: int) -> Any:
    """One that drops nothing."""
    return BackgroundScheduler(
        jobstores={"default": store},
        executors={"default": ThreadPoolExecutor(workers)},
        job_defaults={"misfire_grace_time": None, "coalesce": True, "max_instances": 1},
        timezone=UTC,
    )


def add_jobs(to: Any, count: int, first: datetime, spread: timedelta) -> None:
    """So many jobs, daily from *first* on, which is *spread* over them."""
    for number in range(count):
        at = first + spread * (number / count)
        to.add_job(JOB, "interval", hours=24, next_run_time=at, id=f"vm-{number:06}")


def fill_sqlite(path: Path, count: int, at: datetime) -> None:
    """Put the jobs in, without a sync for each."""

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(path, check_same_thread=False)
        connection.execute("PRAGMA synchronous = OFF")
        return connection

    filling = scheduler(SQLAlchemyJobStore("sqlite://", engine_options={"creator": connect}), 1)
    filling.start(paused=True)
    add_jobs(filling, count, at, timedelta(0))
    filling.shutdown()


def run_due(store: str, count: int, workers: int, directory: Path, at: float) -> dict[str, Any] | None:
    """Have the jobs come due, and tell how late each began, and when the last was done and written down."""
    moment = datetime.fromtimestamp(at, UTC)
    path = directory / "jobs.sqlite"
    if store == "sqlite":
        fill_sqlite(path, count, moment)
        jobs = scheduler(SQLAlchemyJobStore(f"sqlite:///{path}"), workers)
    else:
        jobs = scheduler(MemoryJobStore(), workers)
        add_jobs(jobs, count, moment, timedelta(0))
    executed: list[float] = []
    over = threading.Event()

    def listen(event: object) -> None:
        del event
        executed.append(time.time())
        if len(executed) == count:
            over.set()

    jobs.add_listener(listen, EVENT_JOB_EXECUTED)
    jobs.start()
    used = time.process_time()
    if time.time() > at - 0.5:
        jobs.shutdown(wait=False)
        return None
    if not over.wait(at - time.time() + _PATIENCE_S):
        raise SystemExit(f"{len(executed)} of {count} jobs ran")
    ended = max(executed)
    if store == "sqlite":
        ended = max(ended, _written(path, at))
    used = time.process_time() - used
    jobs.shutdown()
    return {"late_s": [begun - at for begun in BEGUN], "took_s": ended - at, "cpu_s": used}


def _written(path: Path, at: float) -> float:
    """When the last job's next run was committed."""
    while True:
        with sqlite3.connect(path) as connection:
            (left,) = connection.execute(
                "SELECT count(*) FROM apscheduler_jobs WHERE next_run_time <= ?", (at,)
            ).fetchone()
        if not left:
            return path.stat().st_mtime
        time.sleep(0.1)


def idle(count: int) -> None:
    """Have jobs that are not due, say so on stdout, and go on until stdin ends."""
    jobs = scheduler(MemoryJobStore(), 10)
    add_jobs(jobs, count, datetime.now(UTC) + timedelta(hours=1), timedelta(hours=22))
    jobs.start()
    print("ready", flush=True)
    sys.stdin.read()
    jobs.shutdown()


def main() -> int:
    """Do as told."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["due", "idle"])
    parser.add_argument("--store", default="memory", choices=["memory", "sqlite"])
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--workers", type=int, default=10)
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--at", type=float, default=0.0)
    options = parser.parse_args()
    if options.what == "idle":
        idle(options.count)
        return 0
    told = run_due(options.store, options.count, options.workers, options.directory, options.at)
    print(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
