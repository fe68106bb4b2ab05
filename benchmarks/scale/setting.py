"""What each figure gets to be measured with, and how it has a part of that done in a process of its own."""

import json
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import trio
from attrs import frozen

from benchmarks.scale.rows import Row
from tests.processes import ROOT, environment

T = TypeVar("T")
NO_APSCHEDULER = "APScheduler is not installed: pip install -e '.[bench]'"


class NotMeasuredError(Exception):
    """A part of a figure can't be measured here; the text says why."""


@frozen
class Setting:
    """How to measure.

    Attributes:
        directory: Empty, on the filesystem that is measured; for one figure.
        quick: Small sizes.
        runs: Rounds of what is noisy.
        sparing: Rows whose ratios are not compared with kept ones may be left out.
        tell: Takes progress.
    """

    directory: Path
    quick: bool
    runs: int
    sparing: bool
    tell: Callable[[str], None]

    def size(self, full: int, quick: int) -> int:
        """One of both."""
        return quick if self.quick else full

    def place(self, name: str) -> Path:
        """A new directory called *name*, or that with a number behind it where there is one."""
        taken = len([*self.directory.glob(f"{name}*")])
        place = self.directory / (f"{name}-{taken}" if taken else name)
        place.mkdir(parents=True)
        return place


Measure = Callable[[Setting], Awaitable[Sequence[Row]]]


@frozen
class Figure:
    """Something that is measured, and a line of help on it."""

    name: str
    about: str
    measure: Measure


def has_apscheduler() -> bool:
    """Whether the peer of most figures is installed."""
    return find_spec("apscheduler") is not None and find_spec("sqlalchemy") is not None


def child_command(module: str, *args: object) -> list[str]:
    """*module* of the benchmarks in a process of its own."""
    return [sys.executable, "-m", f"benchmarks.scale.{module}", *map(str, args)]


async def child(module: str, *args: object) -> Any:
    """What *module* prints in a process of its own: one JSON document.

    Raises:
        NotMeasuredError: It failed.
    """
    done = await trio.run_process(
        child_command(module, *args),
        stdin=subprocess.DEVNULL,
        capture_stdout=True,
        capture_stderr=True,
        check=False,
        cwd=ROOT,
        env=environment(),
    )
    if done.returncode:
        raise NotMeasuredError(f"{module} ended with {done.returncode}: {done.stderr.decode().strip()[-2000:]}")
    return json.loads(done.stdout)


async def patiently(attempt: Callable[[float], Awaitable[T | None]], margin_s: float) -> T:
    """What *attempt* returns, which gets ready for a moment *margin_s* ahead; None: it was not, and gets twice that.

    Raises:
        NotMeasuredError: The machine is far too busy.
    """
    for _ in range(4):
        result = await attempt(margin_s)
        if result is not None:
            return result
        margin_s *= 2
    raise NotMeasuredError("it was not ready for the moment that it was to be measured at; is the machine too busy?")
