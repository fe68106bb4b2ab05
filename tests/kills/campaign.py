"""Many kills on several grounds at once."""

import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import trio
from attrs import define, field, frozen

from hypemand.backends.base import BackendError
from tests.kills import grounds
from tests.kills.checks import FAILED, Finding
from tests.kills.harness import Harness, Outcome
from tests.kills.places import Kill
from tests.kills.plan import matrix, random_kill

NEXT_SLOT_EVERY = 25
"""After so many kills, and at the end, an unharmed daemon shows that the next slot works."""


LOG_LINES = 25


@frozen
class Failure:
    """What was not as promised, and where to look."""

    ground: str
    what: str
    findings: tuple[Finding, ...]
    directory: Path
    log: str

    def __str__(self) -> str:
        lines = [f"{self.ground}: {self.what}", *(f"  {finding}" for finding in self.findings)]
        return "\n".join([*lines, f"  look in {self.directory}; the end of its last log:", self.log])


@define
class Campaign:
    """Kills, and what came of them.

    Attributes:
        seed: Of all that is random.
        directory: Each ground has a directory below; those with a failure are good to look into afterwards.
        tell: Takes a line on the way.
    """

    seed: int
    directory: Path
    tell: Callable[[str], None]
    guard: bool = True
    outcomes: list[Outcome] = field(factory=list)
    failures: list[Failure] = field(factory=list)
    _slots: trio.CapacityLimiter = field(init=False, factory=lambda: trio.CapacityLimiter(os.cpu_count() or 1))

    async def run(self, kills: int | None, names: Sequence[str] = grounds.NAMES) -> None:
        """Kill so many daemons, spread over the grounds called *names*; None: as many as every step takes."""
        async with trio.open_nursery() as nursery:
            for number, name in enumerate(names):
                share = None if kills is None else (kills + number) // len(names)
                nursery.start_soon(self._on_ground, name, share)

    async def _on_ground(self, name: str, kills: int | None) -> None:
        rng = random.Random(f"{self.seed} {name}")
        left: list[Kill] | None = None
        attempt = 0
        while left is None or left:
            attempt += 1
            directory = self.directory / f"{name}-{attempt}"
            directory.mkdir()
            async with grounds.opened(name, directory) as ground:
                if left is None:
                    left = matrix(rng, ground.steps, guard=self.guard)
                    if kills is not None:
                        left += [random_kill(rng, ground.steps, guard=self.guard) for _ in range(len(left), kills)]
                        del left[kills:]
                await self.use(await _set_up(ground, rng), left)

    async def use(self, harness: Harness, left: list[Kill]) -> None:
        """Kill on one ground until nothing is *left* to do, or something was not as promised."""
        while left:
            kill = left.pop(0)
            async with self._slots:  # more at once would only measure each other
                outcome = await _done(harness, kill)
            self.outcomes.append(outcome)
            self.tell(f"{len(self.outcomes):5} {outcome.ground:16} {kill}{_remark(outcome)}")
            if outcome.findings:
                return self._failed(harness, str(kill), outcome.findings)
            if harness.count % NEXT_SLOT_EVERY == 0 or not left:
                found = await harness.next_slot_works()
                if found:
                    return self._failed(harness, f"the slot after {kill}", tuple(found))
        return None

    def _failed(self, harness: Harness, what: str, findings: tuple[Finding, ...]) -> None:
        directory = harness.ground.lab.directory
        logs = [path for path in directory.glob("*.log") if path.name.startswith(("victim", "daemon"))]
        last = max(logs, key=lambda path: path.stat().st_mtime)
        log = "\n".join(f"    {line}" for line in last.read_text(errors="replace").splitlines()[-LOG_LINES:])
        self.failures.append(Failure(harness.ground.name, what, findings, directory, log))
        self.tell(str(self.failures[-1]))


async def _set_up(ground: grounds.Ground, rng: random.Random) -> Harness:
    harness = Harness(ground, rng)
    await harness.set_up()
    return harness


async def _done(harness: Harness, kill: Kill) -> Outcome:
    """The kill, also where looking itself fails: a guest's QEMU may be gone."""
    try:
        return await harness.kill(kill)
    except (AssertionError, BackendError, OSError, pytest.fail.Exception) as error:
        return Outcome(kill, harness.ground.name, (Finding(FAILED, f"{type(error).__name__}: {error}"),))


def _remark(outcome: Outcome) -> str:
    late = ", was over already" if outcome.late else ""
    return late + ("" if outcome.thawed_s is None else f", thawed after {outcome.thawed_s:.2f} s")
