"""Victims and what they leave behind, as the kernel sees them."""

import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic

import trio
from attrs import frozen

from tests.kills.places import Note, Trigger
from tests.processes import ROOT, environment, wait_until


@frozen
class Victim:
    """A daemon that comes to harm. *log* is its stderr."""

    process: trio.Process
    note: Path
    log: Path

    async def harmed(self, within_s: float) -> Note | None:
        """Wait until it has come to harm; None if it ended otherwise, or never got to its place."""
        with trio.move_on_after(within_s):
            while (note := Note.read(self.note)) is None and self.process.poll() is None:
                await trio.sleep(0.002)
            return note or Note.read(self.note)
        return None

    def state(self) -> str:
        """The kernel's letter for what it does: ``T`` stopped, ``Z`` gone."""
        return state_of(self.process.pid)

    async def until(self, *letters: str) -> None:
        """Wait until it is in one of these states."""
        await wait_until(lambda: self.state() in letters, f"victim in state {letters}, it is {self.state()}")

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    async def gone(self, within_s: float) -> bool:
        """Whether it ends within that time."""
        with trio.move_on_after(within_s):
            await self.process.wait()
            return True
        return False


@asynccontextmanager
async def victim(config: Path, trigger: Trigger, log: Path, command: str = "run") -> AsyncIterator[Victim]:
    """A daemon on *config* that comes to harm as *trigger* says; killed at the end of the block, if it still lives."""
    with log.open("wb") as file:
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "tests.kills.victim", command, "-c", str(config)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=file,
            cwd=ROOT,
            env=environment(**trigger.environment()),
        )
    try:
        yield Victim(process, trigger.note, log)
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


async def slow_machine_s() -> float:
    """What may take long where others use the processors: as long as it takes now to start hypemand five times.

    On a machine of our own that is less than any limit that it is compared with.
    """
    began = monotonic()
    await trio.run_process([sys.executable, "-c", "import hypemand.daemon"], cwd=ROOT)
    return 5 * (monotonic() - began)


def state_of(pid: int) -> str:
    """The kernel's letter for the state of a process; ``Z`` also for one that is not there."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


def born_of(note: Path) -> list[int]:
    """Processes that live and have the environment of the victim of *note*: its guard, and whom that has started."""
    told = str(note).encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if told in path.read_bytes() and state_of(int(path.parent.name)) != "Z":
                found.append(int(path.parent.name))
        except OSError:
            continue  # gone by now, or somebody else's
    return found


async def all_gone(note: Path, children: tuple[int, ...], within_s: float) -> list[int]:
    """Wait until none of *children* is left, nor anything that they started; what is left after that time."""
    left: list[int] = []
    with trio.move_on_after(within_s):
        while left := [*{*born_of(note), *(pid for pid in children if state_of(pid) != "Z")}]:
            await trio.sleep(0.05)
    return left
