"""What the engine adds to a freeze: `benchmarks.freeze --engine`, as a row for each backend."""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import trio

from benchmarks.scale.rows import Goal, Row
from benchmarks.scale.setting import NotMeasuredError, Setting
from tests.processes import ROOT, environment

NAME = "freeze-overhead"
ABOUT = "what a run of the daemon adds to a guest's freeze over the bare calls (python -m benchmarks.freeze --engine)"
GOAL_MS = 2.0
RUNS_EACH = 5
"""Freezes of each kind in a round."""


async def measure(setting: Setting) -> Sequence[Row]:
    """Called as a program of its own."""
    if missing := [name for name in ("qemu-system-x86_64", "qemu-img") if shutil.which(name) is None]:
        note = f"{' and '.join(missing)} not found; on Debian: apt-get install qemu-system-x86 qemu-utils"
        return [Row(figure=NAME, key=NAME, title="freeze overhead", unit="ms", note=note)]
    runs = 2 if setting.quick else RUNS_EACH * setting.runs
    setting.tell(f"{NAME}: {runs} rounds of benchmarks.freeze --engine")
    options = ["--engine", "--json", "--runs", str(runs), "--directory", str(setting.place("freeze"))]
    done = await trio.run_process(
        [sys.executable, "-m", "benchmarks.freeze", *options],
        stdin=subprocess.DEVNULL,
        capture_stdout=True,
        capture_stderr=True,
        check=False,
        cwd=ROOT,
        env=environment(),
    )
    if not done.stdout:
        raise NotMeasuredError(done.stderr.decode().strip()[-2000:])
    return [_row(backend) for backend in json.loads(done.stdout)["backends"]]


def _row(told: Mapping[str, Any]) -> Row:
    name = told["backend"]
    overhead_ms: float | None = told["overhead_ms"]
    return Row(
        figure=NAME,
        key=f"{NAME}/{name}",
        title=f"freeze that the engine adds, {name} ({told['who_freezes']} freezes)",
        unit="ms",
        ours=overhead_ms,
        peer="whole freeze by the bare calls",
        theirs=None if overhead_ms is None else median(told["bare_ms"]),
        goal=Goal(GOAL_MS),
        note=told["note"] or "",
        failed=told["failed"],
        detail=told,
    )
