"""Running worlds one by one, exactly the same for the same seed, and adding up what they saw."""

import gc
import logging
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import structlog
import trio
from attrs import define, field

from tests.simulation.oracle import Violation
from tests.simulation.world import World
from tests.virtual_time import VirtualClock


def make_deterministic(seed: int) -> None:
    """Have trio order its tasks by *seed*, not by their addresses."""
    core: Any = trio._core._run
    core._ALLOW_DETERMINISTIC_SCHEDULING = True
    core._r.seed(seed)


@define
class Figures:
    """What a number of worlds came to; adds up."""

    worlds: int = 0
    runs: int = 0
    outcomes: Counter[str] = field(factory=Counter)
    faults: int = 0
    crashes: int = 0
    freezes: int = 0
    deletions: int = 0
    deletions_by_wrong_clock: int = 0
    torn_ends: int = 0
    lost_names: int = 0
    instance_years: float = 0.0
    longest_freeze_of_budget: float = 0.0
    longest_freeze_over_s: float = 0.0
    latest_control_s: float = 0.0
    wrong_deletions: int = 0
    lost_runs: int = 0
    seen: Counter[str] = field(factory=Counter)

    def add(self, world: World, seconds: float) -> None:
        oracle, ledger = world.oracle, world.ledger
        self.worlds += 1
        self.runs += len(ledger.finished)
        self.outcomes.update(str(line["outcome"]) for line in ledger.finished.values())
        self.faults += sum(world.chaos.seen.values())
        self.crashes += world.crashes
        self.freezes += oracle.freezes
        self.deletions += len(oracle.deletions)
        self.deletions_by_wrong_clock += oracle.by_wrong_clock
        self.torn_ends += world.platter.torn_ends
        self.lost_names += world.platter.lost_renames
        instances = sum(len(h.machines) + len(h.away) for h in world.hypervisors.values())
        self.instance_years += instances * (seconds + world.clock.suspended.total_seconds()) / (365.25 * 86400)
        self.longest_freeze_of_budget = max(self.longest_freeze_of_budget, oracle.longest_share)
        self.longest_freeze_over_s = max(self.longest_freeze_over_s, oracle.longest_over_s)
        self.latest_control_s = max(self.latest_control_s, ledger.latest_s)
        if oracle.violation is not None:
            self.wrong_deletions += oracle.violation.promise == 2
            self.lost_runs += oracle.violation.promise == 3
        self.seen.update({f"{fault} @ {step}": count for (fault, step), count in world.chaos.seen.items()})


@define
class Outcome:
    """How a world ended."""

    seed: int
    violation: Violation | None
    digest: str
    last_events: list[str]


def _say_nothing(*_: Any) -> Any:
    raise structlog.DropEvent


def simulate(seed: int, figures: Figures) -> Outcome:
    """One world, from its seed."""
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL), processors=[_say_nothing]
    )
    make_deterministic(seed)
    memory = Path("/dev/shm")
    root = Path(tempfile.mkdtemp(prefix="hypemand-simulation-", dir=memory if memory.is_dir() else None))
    gc.disable()  # a collection in the middle would finish generators at another moment each time
    try:
        world = World(seed, root)
        clock = VirtualClock()
        trio.run(world.run, clock=clock)
        figures.add(world, clock.current_time())
        return Outcome(seed, world.oracle.violation, world.digest, [*world.last_events])
    finally:
        gc.enable()
        gc.collect()
        shutil.rmtree(root, ignore_errors=True)
