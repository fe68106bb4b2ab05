"""Victims and what they leave behind, as the kernel sees them."""

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic

import trio
from attrs import evolve, frozen

from tests.kills.places import Note, Trigger
from tests.processes import ROOT, environment, wait_until


@frozen
class Victim:
    """A daemon that comes to harm.

    Attributes:
        log: Its stderr; its name is in the environment of all that it starts.
    """

    process: trio.Process
    log: Path
    _notes: int

    async def harmed(self, within_s: float) -> Note | None:
        """Wait until it has come to harm; None if it ended otherwise, or never got to its place."""
        with trio.move_on_after(within_s):
            while (note := self._note()) is None and self.process.poll() is None:
                await trio.sleep(0.002)
            return note or self._note()
        return None

    def _note(self) -> Note | None:
        try:
            data = os.read(self._notes, 65536)
        except BlockingIOError:
            return None
        return Note.heard(data) if data else None

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
async def victim(config: Path, trigger: Trigger, command: str = "run") -> AsyncIterator[Victim]:
    """A daemon on *config* that comes to harm as *trigger* says; killed at the end of the block, if it still lives."""
    notes, telling = os.pipe()
    os.set_blocking(notes, False)
    try:
        with trigger.log.open("wb") as file:
            process = await trio.lowlevel.open_process(
                [sys.executable, "-m", "tests.kills.victim", command, "-c", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=file,
                cwd=ROOT,
                env=environment(**evolve(trigger, tell=telling).environment()),
                pass_fds=(telling,),
            )
        try:
            yield Victim(process, trigger.log, notes)
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
    finally:
        os.close(notes)
        os.close(telling)


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


def born_of(log: Path) -> list[int]:
    """Processes that live and have the environment of the victim with *log*: its guard, and whom that has started."""
    told = str(log).encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if told in path.read_bytes() and state_of(int(path.parent.name)) != "Z":
                found.append(int(path.parent.name))
        except OSError:
            continue  # gone by now, or somebody else's
    return found


async def all_gone(log: Path, children: tuple[int, ...], within_s: float) -> list[int]:
    """Wait until none of *children* is left, nor anything that they started; what is left after that time."""
    left: list[int] = []
    with trio.move_on_after(within_s):
        while left := [*{*born_of(log), *(pid for pid in children if state_of(pid) != "Z")}]:
            await trio.sleep(0.05)
    return left
