"""`hypemand run-now` beside a real daemon: what it prints where while a run goes on, and how it ends."""

import os
import pty
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from hypemand.surface.run_progress import Progress
from tests.processes import (
    ROOT,
    DaemonProcess,
    Lab,
    Ran,
    command,
    environment,
    run_cli,
    running_daemon,
    wait_until,
)

SCHEDULES = """
[[schedules]]
instance = "web-*"
backend = "lab"
interval = "24h"
name_prefix = "nightly"
retention = { max_count = 1 }
[[schedules]]
instance = "off-1"
backend = "lab"
interval = "24h"
enabled = false
[[schedules]]
instance = "slow-1"
backend = "slow"
interval = "24h"
[backends.slow]
type = "embedded"
root = "slow"
copy_rate = "64KiB"
instances = { slow-1 = { state = "Running", memory = "64KiB", disk = "256KiB" } }
"""
INSTANCES = ("web-1", "web-2", "web-3", "off-1", "db-1")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A lab with a daemon beside all tests of this module; each takes an instance of its own."""
    lab = Lab(tmp_path_factory.mktemp("served")).write(SCHEDULES, instances=INSTANCES)
    with daemon_beside(lab):
        yield lab


@contextmanager
def daemon_beside(lab: Lab) -> Iterator[DaemonProcess]:
    """The same daemon for tests that each have an event loop of their own."""
    log = lab.directory / "daemon.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command("run", "-c", lab.config), stdin=subprocess.DEVNULL, stderr=file, cwd=ROOT, env=environment()
        )
    try:
        trio.run(wait_until, lambda: (lab.state / "api.sock").exists() or process.poll() is not None, "it listens")
        yield log  # type: ignore[misc]
    finally:
        process.terminate()
        assert process.wait(60) == 0, log.read_text()


async def run_now(lab: Lab, instance: str, *args: str) -> Ran:
    return await run_cli("run-now", instance, "-c", lab.config, *args)
