"""A process that runs an engine until it is killed, by itself, at one step of a run.

``python -m hypemand.conformance.victim``, with one JSON document on stdin:
what a `Bench` is made of, the step, and when at it.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import trio

from hypemand.backends.base import Surroundings
from hypemand.conformance.bench import Bench
from hypemand.conformance.faults import KILLS
from hypemand.conformance.steps import STEPS, Step, Trap, trap_of
from hypemand.core.model import InstanceId


async def run_victim(bench: Bench, step: Step, kill: str) -> str:
    """Have two runs of *bench* in another process, of which the second is killed at *step*.

    Returns:
        What the process told, where it lived through that; empty if it was killed.
    """
    order = {
        "state_dir": str(bench.state_dir),
        "name": bench.name,
        "connection": dict(bench.connection),
        "surroundings": str(bench.surroundings.state_dir),
        "instance": bench.instance,
        "step": step.name,
        "kill": kill,
    }
    done = await trio.run_process(
        [sys.executable, "-m", "hypemand.conformance.victim"],
        stdin=json.dumps(order).encode(),
        stderr=subprocess.STDOUT,
        capture_stdout=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    return "" if done.returncode == -signal.SIGKILL else f"exit {done.returncode}: {done.stdout.decode()}"


async def _live(bench: Bench, trap: Trap) -> None:
    async with bench.engine() as running:
        await running.runs_are_over(1)
        await running.begin_run(trap)
        await running.runs_are_over(2)


def main() -> None:
    """Read the order, and carry it out."""
    order = json.load(sys.stdin)
    bench = Bench(
        Path(order["state_dir"]),
        order["name"],
        order["connection"],
        Surroundings(Path(order["surroundings"])),
        InstanceId(order["instance"]),
    )
    (step,) = [step for step in STEPS if step.name == order["step"]]
    trio.run(_live, bench, trap_of(step, KILLS[order["kill"]]))


if __name__ == "__main__":
    main()
