"""An engine over fakes, in virtual time: real scheduler, runner, store and run log, no threads."""

import itertools
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import trio
from attrs import define, evolve

from hypemand.backends.base import Backend
from hypemand.config import BackendConfig, Config, RetentionEntry, RunsConfig, ScheduleEntry
from hypemand.core.model import InstanceId, RunFinished, Schedule
from hypemand.engine.engine import Engine
from hypemand.engine.fleet import Fleet
from hypemand.engine.limits import Patience
from hypemand.engine.outside import Outside, Tempo
from hypemand.state.files import Disk
from hypemand.state.segments import read_log
from tests.disks import UnsyncedDisk
from tests.fakes import FakeBackend, FakeClock, FakeLeases, FakeRoom

BOOT_ID = "this-boot"


def entry(instance: str, interval: timedelta, **more: Any) -> ScheduleEntry:
    """A config entry; the keys of its retention as arguments of their own."""
    count = more.pop("max_count", None)
    age = more.pop("max_age", None)
    return ScheduleEntry(instance=instance, interval=interval, retention=RetentionEntry(age, count), **more)


@define
class World:
    """What a test of the engine works with; made by `world`."""

    state_dir: Path
    clock: FakeClock
    room: FakeRoom
    leases: FakeLeases
    disk: Disk
    backends: dict[str, FakeBackend]
    config: Config
    engine: Engine

    @property
    def backend(self) -> FakeBackend:
        """The first backend."""
        return next(iter(self.backends.values()))

    def schedule(self, instance: str) -> Schedule:
        return self.engine.store.schedules[InstanceId(instance)]

    def history(self, instance: str | None = None) -> list[RunFinished]:
        """Finished lines, in the order of the log."""
        return read_log(self.state_dir, Disk()).finished(InstanceId(instance) if instance else None)

    def outcomes(self, instance: str | None = None) -> list[str]:
        return [str(run.outcome) for run in self.history(instance)]

    async def apply(self, *entries: ScheduleEntry) -> None:
        """Put other schedules in force, as an edit of the config does."""
        self.config = evolve(self.config, schedules=entries)
        await self.engine.apply_config(self.config)


def config_of(
    state_dir: Path,
    entries: Iterable[ScheduleEntry],
    backends: Mapping[str, FakeBackend],
    **runs: Any,
) -> Config:
    """A config with the fakes as its backends."""
    runs = {"min_free": 0, "shutdown_grace": timedelta(seconds=10), **runs}
    tables = {name: BackendConfig("fake", name, runs.pop(f"{name}_concurrency", None)) for name in backends}
    return Config(state_dir, runs=RunsConfig(**runs), backends=tables, schedules=tuple(entries))


@asynccontextmanager
async def world(
    tmp_path: Path,
    *entries: ScheduleEntry,
    backends: Iterable[FakeBackend] | None = None,
    clock: FakeClock | None = None,
    disk: Disk | None = None,
    leases: FakeLeases | None = None,
    before_start: Callable[[World], None] | None = None,
    serve: bool = True,
    first_id: int = 1,
    tempo: Tempo | None = None,
    boot_id: str = BOOT_ID,
    **runs: Any,
) -> AsyncIterator[World]:
    """An engine that serves *entries* in the background until the end of the block, then is stopped without grace.

    Instances named in the entries exist and run, unless the backends have some already.

    Args:
        first_id: Of the runs of this engine; in a test of a restart, none that is used already.
    """
    clock = clock or FakeClock()
    fakes = {fake.name: fake for fake in backends or [FakeBackend(clock)]}
    first = next(iter(fakes.values()))
    if not any(fake.machines for fake in fakes.values()):
        first.add(*(e.instance for e in entries if not e.is_pattern))
    config = config_of(tmp_path, entries, fakes, **runs)
    room = FakeRoom()
    disk = disk or UnsyncedDisk()
    leases = leases or FakeLeases()
    async with trio.open_nursery() as background:
        outside = _outside(clock, disk, room, leases, first_id=first_id, tempo=tempo, boot_id=boot_id)
        engine = Engine(config, _fleet(fakes), outside, background)
        made = World(tmp_path, clock, room, leases, disk, fakes, config, engine)
        await engine.load()
        if before_start is not None:
            before_start(made)
        await engine.start()
        if serve:
            background.start_soon(engine.serve)
        yield made
        engine.give_up.set()
        engine.stop(0)
        background.cancel_scope.cancel()


def _fleet(fakes: Mapping[str, FakeBackend]) -> Fleet:
    def build(name: str, config: BackendConfig) -> Backend:
        return fakes[name]

    def connect(name: str, connection: Mapping[str, Any]) -> Backend:
        return fakes[name]

    return Fleet(build, connect)


def _outside(
    clock: FakeClock,
    disk: Disk,
    room: FakeRoom,
    leases: FakeLeases,
    *,
    first_id: int,
    tempo: Tempo | None,
    boot_id: str,
) -> Outside:
    ids = (f"r{number:06d}" for number in itertools.count(first_id))
    return Outside(
        clock=clock,
        disk=disk,
        measure=room.measure,
        new_id=lambda: next(ids),
        boot_id=boot_id,
        leases=leases,
        patience=Patience(),
        tempo=tempo or Tempo(),
    )
