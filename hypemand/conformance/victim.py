"""Processes that run an engine until they are killed, by themselves, at one step of a run.

`main` takes an order a line on stdin: what a `Bench` is made of, the step, and
when at it. Each is carried out by a process of its own, forked off one that
has imported all that takes time.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import trio

from hypemand.backends.base import Surroundings
from hypemand.backends.registry import BUILT_IN
from hypemand.conformance.bench import Bench
from hypemand.conformance.faults import KILLS
from hypemand.conformance.steps import STEPS, Step, Trap, trap_of
from hypemand.core.model import InstanceId

Order = Mapping[str, Any]


async def run_victim(bench: Bench, step: Step, kill: str) -> str:
    """Have two runs of *bench* in another process, of which the second is killed at *step*.

    Returns:
        What the process told, where it lived through that; empty if it was killed.
    """
    order = {
        "path": sys.path,
        "state_dir": str(bench.state_dir),
        "name": bench.name,
        "connection": dict(bench.connection),
        "surroundings": str(bench.surroundings.state_dir),
        "instance": bench.instance,
        "step": step.name,
        "kill": kill,
    }
    answer = json.loads(await trio.to_thread.run_sync(_carried_out, json.dumps(order)))
    return "" if answer["killed"] else f"exit {answer['status']}: {answer['told']}"


def _carried_out(order: str) -> str:
    forker = _forker()
    assert forker.stdin is not None
    assert forker.stdout is not None
    forker.stdin.write(order + "\n")
    forker.stdin.flush()
    answer = forker.stdout.readline()
    assert answer, "the process that forks victims is gone"
    return answer


@cache
def _forker() -> "subprocess.Popen[str]":
    """Ends with this process, whose end of its stdin it waits for."""
    return subprocess.Popen(
        [sys.executable, "-c", "from hypemand.conformance.victim import main; main()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )


def _live(order: Order) -> None:
    sys.path[:] = order["path"]
    bench = Bench(
        Path(order["state_dir"]),
        order["name"],
        order["connection"],
        Surroundings(Path(order["surroundings"])),
        InstanceId(order["instance"]),
    )
    (step,) = [step for step in STEPS if step.name == order["step"]]
    trio.run(_run, bench, trap_of(step, KILLS[order["kill"]]))


async def _run(bench: Bench, trap: Trap) -> None:
    async with bench.engine() as running:
        await running.runs_are_over(1)
        await running.begin_run(trap)
        await running.runs_are_over(2)


def _fork(order: Order) -> dict[str, Any]:
    """Carry *order* out in a process of its own, and tell how that ended."""
    with tempfile.TemporaryFile() as told:
        child = os.fork()
        if child == 0:
            _be_victim(order, told.fileno())
        _, ended = os.waitpid(child, 0)
        told.seek(0)
        return {
            "killed": os.WIFSIGNALED(ended) and os.WTERMSIG(ended) == signal.SIGKILL,
            "status": os.waitstatus_to_exitcode(ended),
            "told": told.read().decode(errors="replace"),
        }


def _be_victim(order: Order, told: int) -> None:
    for descriptor in (1, 2):
        os.dup2(told, descriptor)
    os.close(0)  # else a victim that hangs would keep whoever gives orders from being missed
    try:
        _live(order)
    except BaseException:  # noqa: BLE001 - told to who waits, by a process that ends here
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def main() -> None:
    """Carry out orders until there are no more."""
    for line in sys.stdin:
        order = json.loads(line)
        if (module := BUILT_IN.get(order["connection"]["type"])) is not None:
            import_module(module)  # once for all that follow
        print(json.dumps(_fork(order)), flush=True)  # noqa: T201 - to who has given the order
