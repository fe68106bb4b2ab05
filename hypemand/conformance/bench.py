"""A real engine over one backend and one schedule in a directory of its own, and what its state tells."""

import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import trio
from attrs import evolve, field, frozen

from hypemand.backends import registry
from hypemand.backends.base import Backend, Surroundings
from hypemand.config import BackendConfig, Config, RetentionEntry, RunsConfig, ScheduleEntry
from hypemand.conformance.steps import Trap, Trapped
from hypemand.core.model import InstanceId, RunFinished, RunStarted
from hypemand.engine.engine import Engine
from hypemand.engine.fleet import Fleet
from hypemand.engine.outside import Tempo, this_machine
from hypemand.state.files import Disk
from hypemand.state.segments import LogContent, read_log

INTERVAL = timedelta(minutes=3)
"""Too short for a failure that passes to be tried again within the run."""
PATIENCE_S = 60.0
"""Longer than any run takes on a busy machine; real seconds."""
_LOOK_S = 0.01


class UnsyncedDisk(Disk):
    """A disk whose host never loses power: a process that is killed takes nothing with it that it has written."""

    def sync(self, descriptor: int) -> None:
        """Wait for nothing."""


@frozen
class Bench:
    """Where engines run one after the other, as daemons do over the years; each one has a backend of its own.

    Attributes:
        connection: From which that backend is made.
    """

    state_dir: Path
    name: str
    connection: Mapping[str, Any]
    surroundings: Surroundings
    instance: InstanceId
    config: Config = field(init=False)

    @config.default
    def _one_schedule(self) -> Config:
        entry = ScheduleEntry(
            instance=self.instance,
            interval=INTERVAL,
            retention=RetentionEntry(max_count=1),
            name_prefix="nightly",
            first_run="now",
        )
        runs = RunsConfig(min_free=0)
        if not self._connect(self.name, self.connection).capabilities.abortable:
            # A capture that can't be ended hangs for all of its time; that is not to keep the next from beginning.
            runs = evolve(runs, max_freeze=2 * runs.capture_timeout)
        return Config(
            self.state_dir,
            runs=runs,
            backends={self.name: BackendConfig(str(self.connection["type"]), self.connection)},
            schedules=(entry,),
        )

    @asynccontextmanager
    async def engine(self) -> AsyncIterator["Running"]:
        """An engine that serves the schedule until the end of the block."""
        trapped = Trapped(self._connect(self.name, self.connection))
        fleet = Fleet(lambda _name, _config: trapped.as_backend(), self._connect)
        tempo = Tempo(settle_first_s=0.05, settle_most_s=0.2)
        outside = evolve(this_machine(), disk=UnsyncedDisk(), tempo=tempo)
        async with trio.open_nursery() as background:
            engine = Engine(self.config, fleet, outside, background)
            await engine.load()
            await engine.start()
            served = trio.Event()
            background.start_soon(_serve, engine, served)
            running = Running(self, engine, trapped, served)
            yield running
            engine.stop(0)
            await running.wait(served.is_set, "the engine to stop")
            background.cancel_scope.cancel()

    def _connect(self, name: str, connection: Mapping[str, Any]) -> Backend:
        return registry.connect(name, connection, self.surroundings)

    def log(self) -> LogContent:
        """The run log as it is on the disk."""
        return read_log(self.state_dir, Disk())

    def history(self) -> list[RunFinished]:
        """Runs that are over, newest last."""
        return self.log().finished()

    def open_runs(self) -> list[RunStarted]:
        """Runs that are not."""
        return list(self.log().open_runs().values())


async def _serve(engine: Engine, served: trio.Event) -> None:
    await engine.serve()
    served.set()


@frozen
class Running:
    """An engine at work."""

    bench: Bench
    engine: Engine
    trapped: Trapped
    served: trio.Event

    async def begin_run(self, trap: Trap | None = None) -> None:
        """Have the schedule's next run begin now, into *trap*; the trap stays set."""
        self.trapped.trap = trap
        schedule = self.engine.store.schedules[self.bench.instance]
        due = evolve(schedule, next_run_at=self.engine.recovery.clock.now())
        await self.engine.store.put(due)
        self.engine.scheduler.refresh(self.bench.instance)

    async def runs_are_over(self, number: int) -> None:
        """Wait until so many runs are in the history, or the engine has stopped."""
        await self.wait(lambda: self.served.is_set() or self._are_over(number), f"{number} runs to be over")

    def _are_over(self, number: int) -> bool:
        at_work = self.engine.scheduler.running or self.engine.runlog.open_runs
        return not at_work and len(self.bench.history()) >= number

    async def wait(self, holds: Callable[[], bool], what: str) -> None:
        """Wait until *holds* does, by a clock that does not leap."""
        until = time.monotonic() + PATIENCE_S
        while not holds():
            if time.monotonic() > until:
                raise AssertionError(f"waited {PATIENCE_S:g} s for {what}; open runs: {self.bench.open_runs()}")
            await trio.sleep(_LOOK_S)
