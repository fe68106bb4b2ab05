"""From the config's schedules to the store: made, changed, retired and put back, by the rules of a PUT."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from datetime import datetime, tzinfo

import structlog
import trio
from attrs import define, evolve, field

from hypemand.backends.base import Backend, BackendError
from hypemand.config import Config, ScheduleEntry
from hypemand.core.cadence import first_run, next_slot
from hypemand.core.model import InstanceId, ManagedBy, RunFinished, Schedule, Settings
from hypemand.core.naming import check_instance_id
from hypemand.engine.clock import Clock
from hypemand.engine.limits import answer
from hypemand.engine.recorder import Recorder
from hypemand.state.replay import with_outcome
from hypemand.state.store import Store

DISCOVERY_TIMEOUT_S = 10.0
AT_ONCE = 64
"""So many new schedules are written at a time: together, they share syncs."""
AT_A_TIME = 200
"""So many that stay as they are, are looked through before runs that are due get their turn."""
_log = structlog.get_logger()


@define
class Discovery:
    """What the backends know: instances by backend, and what could not be asked."""

    instances: dict[str, frozenset[InstanceId]] = field(factory=dict)
    errors: dict[str, str] = field(factory=dict)

    def doubled(self) -> dict[InstanceId, list[str]]:
        """Instances that more than one backend knows, with those backends' names."""
        if sum(map(len, self.instances.values())) == len(frozenset().union(*self.instances.values())):
            return {}
        homes: dict[InstanceId, list[str]] = {}
        for name, instances in self.instances.items():
            for instance in instances:
                homes.setdefault(instance, []).append(name)
        return {instance: sorted(names) for instance, names in homes.items() if len(names) > 1}


async def discover(backends: Mapping[str, Backend], within_s: float = DISCOVERY_TIMEOUT_S) -> Discovery:
    """Ask every backend for its instances, all at once; one that hangs holds up the answer for *within_s*."""
    found = Discovery()

    async def ask(name: str, backend: Backend) -> None:
        try:
            found.instances[name] = await answer("instances", within_s, backend.instances)
        except BackendError as error:
            found.errors[name] = str(error)
        except Exception as error:  # noqa: BLE001 - a bug in one backend stops no other
            _log.exception("internal error of a backend", backend=name)
            found.errors[name] = f"internal error: {error!r}"

    async with trio.open_nursery() as nursery:
        for name, backend in backends.items():
            nursery.start_soon(ask, name, backend)
    return found


_Entry = tuple[ScheduleEntry, str]
"""What the config has for an instance, and the name of its backend."""


@define
class Wanted:
    """What the config wants: an entry and a backend for each instance, and what stands in the way."""

    entries: dict[InstanceId, _Entry] = field(factory=dict)
    problems: list[str] = field(factory=list)


def wanted_schedules(config: Config, discovery: Discovery, present: Collection[Schedule]) -> Wanted:
    """Which entry of *config* each instance has: its exact name wins, then the first pattern that matches.

    Args:
        present: Schedules in the store. Those that a pattern once took in stay,
            also while their instance isn't seen: discovery only adds.
    """
    wanted = Wanted()
    for entry in config.schedules:
        if not entry.is_pattern:
            wanted.entries[check_instance_id(entry.instance)] = (entry, config.backend_of(entry))
    doubled = discovery.doubled()
    for entry in config.schedules:
        if entry.is_pattern:
            name = config.backend_of(entry)
            seen = discovery.instances.get(name, frozenset()) - doubled.keys()
            kept = {s.instance_id for s in present if s.managed_by is ManagedBy.CONFIG and s.backend == name}
            for instance in entry.matching(sorted((seen | kept) - wanted.entries.keys())):
                wanted.entries[instance] = (entry, name)
    for instance, names in sorted(doubled.items()):
        if any(entry.is_pattern and entry.matches(instance) for entry in config.schedules):
            wanted.problems.append(f"instance {instance!r} is known to several backends: {', '.join(names)}")
    return wanted


@define
class _Applied:
    """What came of a config so far.

    Attributes:
        new: Those that it wants and that were never in force before.
    """

    zone: tzinfo
    problems: list[str]
    new: frozenset[InstanceId] = frozenset()
    changed: set[InstanceId] = field(factory=set)


class Reconciler:
    """Brings the store in line with a config."""

    def __init__(
        self, clock: Clock, store: Store, recorder: Recorder, remembered: Mapping[InstanceId, RunFinished]
    ) -> None:
        self._clock = clock
        self._store = store
        self._recorder = recorder
        self._remembered = remembered

    async def apply(self, config: Config, discovery: Discovery) -> tuple[frozenset[InstanceId], tuple[str, ...]]:
        """Upsert what *config* wants, retire what it no longer has, leave alone what the API made.

        Returns:
            Instances whose schedule came, changed or went; and a line for each
            thing that is wanted and can't be.
        """
        wanted = wanted_schedules(config, discovery, self._store.schedules.values())
        done = _Applied(self._clock.zone(), [*wanted.problems])
        differing = await self._differing(wanted, done)
        done.new = await self._never_in_force(instance for instance, _ in differing)
        waiting = iter(differing)
        async with trio.open_nursery() as nursery:
            for _ in range(min(AT_ONCE, len(differing))):
                nursery.start_soon(self._upsert_each, waiting, done)
        for schedule in [*self._store.schedules.values()]:
            if schedule.managed_by is ManagedBy.CONFIG and schedule.instance_id not in wanted.entries:
                await self._retire(schedule.instance_id)
                done.changed.add(schedule.instance_id)
        return frozenset(done.changed), tuple(done.problems)

    async def _differing(self, wanted: Wanted, done: _Applied) -> list[tuple[InstanceId, _Entry]]:
        """Those that are not in force as they are *wanted*: mostly none, of many."""
        differing = []
        for number, (instance, wish) in enumerate(wanted.entries.items(), 1):
            if self._differs(instance, wish, done):
                differing.append((instance, wish))
            if number % AT_A_TIME == 0:
                await trio.lowlevel.checkpoint()
        return differing

    def _differs(self, instance: InstanceId, wish: _Entry, done: _Applied) -> bool:
        present = self._store.schedules.get(instance)
        if present is None or present.managed_by is ManagedBy.API or instance in self._store.unreadable_instances:
            return True
        return self._after(present, wish, done) is not present

    async def _never_in_force(self, instances: Iterable[InstanceId]) -> frozenset[InstanceId]:
        """Those of *instances* that are not in force now, and were never retired."""
        absent = frozenset(instances) - self._store.schedules.keys()
        return absent and absent - await self._store.retired_among(absent)

    async def _upsert_each(self, waiting: Iterator[tuple[InstanceId, _Entry]], done: _Applied) -> None:
        for instance, wish in waiting:
            present = self._store.schedules.get(instance)
            if present is not None and present.managed_by is ManagedBy.API:
                done.problems.append(
                    f"schedules: {instance!r} has a schedule made over the API,"
                    f" schedules/{instance}.json in the state directory; remove one of both"
                )
            elif instance in self._store.unreadable_instances:
                done.problems.append(
                    f"schedules: the file of {instance!r} can't be read; it is neither made anew nor run"
                )
            elif await self._upsert(instance, wish, present, done):
                done.changed.add(instance)

    async def _upsert(self, instance: InstanceId, wish: _Entry, present: Schedule | None, done: _Applied) -> bool:
        now, (entry, backend) = self._clock.now(), wish
        retired = None
        if present is None and instance not in done.new:
            retired = await self._store.read_retired(instance)
            if instance in self._store.schedules:
                return False  # a client has made one meanwhile; the next look tells
        before = present or retired
        if before is not None:
            after = self._after(before, wish, done)
            if present is None:
                after = put_back(after, now)
        else:
            after = created(instance, entry, backend, now, done.zone)
            if instance in self._store.set_aside:
                after = self._with_history(after)
        if after == present:
            return False
        await self._recorder.put(after)
        if retired is not None and instance not in self._store.unsaved:
            await self._forget_retired(instance)
        _log.info("schedule changed" if before else "schedule made", instance_id=instance, backend=backend)
        return True

    def _after(self, before: Schedule, wish: _Entry, done: _Applied) -> Schedule:
        return updated(before, *wish, self._clock.now(), done.zone)

    async def _forget_retired(self, instance: InstanceId) -> None:
        try:
            await self._store.forget_retired(instance)
        except OSError as error:  # the file in force comes first at the next start, too
            _log.error("retired file not removed", instance_id=instance, error=str(error))

    def _with_history(self, schedule: Schedule) -> Schedule:
        """*schedule*, made anew for a file that was set aside, with what the run log still knows of it."""
        run = self._remembered.get(schedule.instance_id)
        if run is None:
            return schedule
        created_at = min(run.started_at, schedule.created_at)
        return with_outcome(evolve(schedule, created_at=created_at, next_run_at=run.due_at + schedule.interval), run)

    async def _retire(self, instance: InstanceId) -> None:
        try:
            await self._store.retire(instance)
        except OSError as error:
            _log.error("retired schedule not moved", instance_id=instance, error=str(error))
        _log.info("schedule retired; its snapshots stay", instance_id=instance)


def put_back(schedule: Schedule, now: datetime) -> Schedule:
    """*schedule*, in force again after a while: at the next slot of its grid, and its instance not yet missed."""
    next_run_at = schedule.next_run_at
    if next_run_at <= now:
        next_run_at = next_slot(next_run_at, schedule.interval, now).next_run_at
    return evolve(schedule, next_run_at=next_run_at, gone_since_at=None)


def created(instance: InstanceId, entry: ScheduleEntry, backend: str, now: datetime, zone: tzinfo) -> Schedule:
    """A new schedule for *instance* as *entry* wants it."""
    return Schedule(
        instance_id=instance,
        interval=entry.interval,
        retention=entry.kept(),
        created_at=now,
        updated_at=now,
        next_run_at=first_run(instance, entry.interval, now=now, wanted=entry.first_run, zone=zone),
        metadata=entry.metadata,
        name_prefix=entry.name_prefix,
        backend=backend,
        managed_by=ManagedBy.CONFIG,
        settings=_settings(entry, Settings()),
    )


def updated(schedule: Schedule, entry: ScheduleEntry, backend: str, now: datetime, zone: tzinfo) -> Schedule:
    """*schedule* as *entry* wants it; the same object when nothing differs.

    A new interval, or another first run, begins a new cadence; anything else
    keeps ``next_run_at``. Enabled again, it goes on at the next slot of its grid.
    """
    settings = _settings(entry, schedule.settings)
    after = evolve(
        schedule,
        interval=entry.interval,
        retention=evolve(entry.kept(), extra=schedule.retention.extra),
        metadata=entry.metadata,
        name_prefix=entry.name_prefix,
        backend=backend,
        managed_by=ManagedBy.CONFIG,
        settings=settings,
    )
    if after == schedule:
        return schedule
    new_first_run = entry.first_run is not None and entry.first_run != schedule.settings.first_run
    next_run_at = schedule.next_run_at
    if entry.interval != schedule.interval or new_first_run:
        next_run_at = first_run(schedule.instance_id, entry.interval, now=now, wanted=entry.first_run, zone=zone)
    after = evolve(after, updated_at=now, next_run_at=next_run_at)
    if settings.enabled and not schedule.settings.enabled:
        return put_back(after, now)
    return after if backend == schedule.backend else evolve(after, gone_since_at=None)


def _settings(entry: ScheduleEntry, before: Settings) -> Settings:
    return Settings(first_run=entry.first_run, max_freeze=entry.max_freeze, enabled=entry.enabled, extra=before.extra)
