"""What an operator asks, answered from the state files and the backends. Changes nothing."""

from collections.abc import Collection
from datetime import datetime, timedelta
from pathlib import Path

import trio
from attrs import define, field, frozen

from hypemand.backends.base import BackendError
from hypemand.config import GUARD_OFF, Config
from hypemand.core.model import InstanceId, RunFinished, Schedule, Snapshot
from hypemand.core.retention import future_dated, scheduled_only
from hypemand.engine.clock import Clock, ClockWatch, SystemClock
from hypemand.engine.fleet import Fleet, UnknownBackendError, new_fleet
from hypemand.engine.limits import answer
from hypemand.engine.made import MakingOrder
from hypemand.engine.reconcile import Discovery, Wanted, created, discover, wanted_schedules
from hypemand.engine.records import FreezeRecords, LongestFreeze, can_abort, why_over_budget
from hypemand.state.files import Disk
from hypemand.state.lock import LockOwner, lock_owner
from hypemand.state.replay import lay_over, under_way
from hypemand.state.runlog import LogContent, read_log
from hypemand.state.scan import quarantine_notes, scan_schedules

ANSWER_S = 5.0
AT_ONCE = 16
NEVER_USED = " (never used so far; the daemon makes its directories when it first starts)"


@frozen(kw_only=True)
class State:
    """The state directory as it is now."""

    state_dir: Path
    owner: LockOwner | None
    schedules: dict[InstanceId, Schedule]
    log: LogContent
    trouble: tuple[str, ...]
    quarantine: tuple[str, ...]


def read_state(state_dir: Path) -> State:
    """Read the state in *state_dir*. Blocking; also beside a running daemon.

    Raises:
        OSError: It can't be read.
    """
    disk = Disk()
    scan = scan_schedules(state_dir / "schedules", disk)
    log = read_log(state_dir, disk)
    schedules = {}
    for instance, (schedule, _) in scan.schedules.items():
        schedules[instance] = lay_over(schedule, [line for line in log.lines if line.instance_id == instance])
    return State(
        state_dir=state_dir,
        owner=lock_owner(state_dir),
        schedules=schedules,
        log=log,
        trouble=tuple(f"{bad.path}: {bad.problem}" for bad in (*scan.invalid, *scan.newer, *scan.unreadable)),
        quarantine=tuple(quarantine_notes(state_dir)),
    )


@define
class InstanceView:
    """An instance: its schedule if it has one, and what its backend says of it.

    Attributes:
        snapshots: Scheduled ones, oldest first; None where they can't be listed.
        in_order: Ids of its snapshots in the order in which they were made, as far as the run log tells.
        made: False for a schedule that the config wants, but that no daemon has made yet.
        future: Scheduled snapshots dated in the future: a clock was wrong once; they count for nothing.
        max_freeze: Its freeze budget; None where only an invalid config could tell.
        longest: Its longest freeze in a capture, *found_frozen*: until a recovery resumed it. Both of the kind that
            it had last.
        over_budget: Why its next run is going to fail, in view of that.
        open_run: A run is not finished; *under_way*: and a daemon is at it.
        trouble: Why the backend's part is missing.
    """

    instance_id: InstanceId
    backend: str | None
    schedule: Schedule | None = None
    made: bool = True
    state: str | None = None
    snapshots: tuple[Snapshot, ...] | None = None
    trouble: str | None = None
    last_run: RunFinished | None = None
    open_run: bool = False
    under_way: bool = False
    future: tuple[Snapshot, ...] = ()
    in_order: tuple[str, ...] = ()
    max_freeze: timedelta | None = None
    longest: LongestFreeze | None = None
    found_frozen: LongestFreeze | None = None
    over_budget: str | None = None


@define
class Overview:
    """Everything that `status` shows."""

    state: State
    instances: list[InstanceView] = field(factory=list)
    problems: list[str] = field(factory=list)
    warnings: list[str] = field(factory=list)


async def look_offline(state: State, config: Config | None, only: str | None) -> Overview:
    """`look`, with backends of its own; *config* is None where it is invalid."""
    fleet = new_fleet(state.state_dir)
    fleet.have(config.backends if config else {})
    try:
        return await look(state, config, fleet, SystemClock(), only)
    finally:
        await fleet.aclose()


async def look(state: State, config: Config | None, fleet: Fleet, clock: Clock, only: str | None = None) -> Overview:
    """Ask the backends of *config* about every instance with a schedule, and about those that none covers."""
    discovery = await discover(fleet.backends)
    wanted = wanted_schedules(config, discovery, state.schedules.values()) if config else Wanted()
    overview = Overview(state, _views(state, discovery, fleet, _to_come(state, wanted, clock), only))
    records, order = FreezeRecords(), MakingOrder()
    records.learn(state.log.lines)
    order.learn(state.log.lines)
    for view in overview.instances:
        _judge_freezes(view, records, fleet, config)
        view.in_order = order.of(view.instance_id)
    overview.problems += wanted.problems
    for name, error in sorted(discovery.errors.items()):
        told = overview.problems if name in used_backends(state) else overview.warnings
        told.append(f"backend {name}: {error}" + ("" if told is overview.problems else NEVER_USED))
    if config is not None and not config.runs.guard:
        overview.warnings.append(GUARD_OFF)
    overview.warnings += _clock_warnings(state.schedules.values(), clock)
    limiter = trio.CapacityLimiter(AT_ONCE)
    async with trio.open_nursery() as nursery:
        for view in overview.instances:
            nursery.start_soon(_ask, view, fleet, limiter, clock.now())
    for view in overview.instances:
        if view.over_budget is not None:
            overview.warnings.append(f"{view.instance_id}: its next run will not begin: {view.over_budget}")
        overview.warnings += [
            f"{view.instance_id}: snapshot {snapshot.name} is dated in the future: neither counted nor deleted"
            for snapshot in view.future
        ]
        of_last_run = view.last_run.warnings if view.last_run else ()
        overview.warnings += [f"{view.instance_id}: last run: {warning}" for warning in of_last_run]
    return overview


def used_backends(state: State) -> frozenset[str]:
    """Names of backends through which something was captured before."""
    return frozenset(line.backend for line in state.log.started())


def _to_come(state: State, wanted: Wanted, clock: Clock) -> dict[InstanceId, Schedule]:
    """Schedules that the config wants, and that the daemon will make."""
    now, zone = clock.now(), clock.zone()
    return {
        instance: created(instance, entry, backend, now, zone)
        for instance, (entry, backend) in wanted.entries.items()
        if instance not in state.schedules
    }


def _views(
    state: State, discovery: Discovery, fleet: Fleet, to_come: dict[InstanceId, Schedule], only: str | None
) -> list[InstanceView]:
    last_runs = {run.instance_id: run for run in state.log.finished()}
    open_runs = {run.instance_id: run for run in state.log.open_runs().values()}
    views = {i: InstanceView(i, _backend_of(s, fleet), s) for i, s in state.schedules.items()}
    views |= {i: InstanceView(i, s.backend, s, made=False) for i, s in to_come.items()}
    for name, instances in sorted(discovery.instances.items()):
        for instance in instances:
            views.setdefault(instance, InstanceView(instance, name))
    for instance, view in views.items():
        view.last_run = last_runs.get(instance)
        if (run := open_runs.get(instance)) is not None:
            view.open_run, view.under_way = True, under_way(run, view.schedule, state.owner)
    return [views[instance] for instance in sorted(views) if only in (None, instance)]


def _backend_of(schedule: Schedule, fleet: Fleet) -> str | None:
    try:
        return fleet.resolve(schedule.backend)
    except UnknownBackendError:
        return schedule.backend


def _judge_freezes(view: InstanceView, records: FreezeRecords, fleet: Fleet, config: Config | None) -> None:
    """Budget and record. Until its next run begins, a guest is taken to be frozen as it was last."""
    if view.schedule is not None:
        overall = config.runs.max_freeze if config else None
        view.max_freeze = view.schedule.settings.max_freeze or overall
    key = records.latest_key(view.instance_id, view.backend or "")
    if key is None:
        return
    view.longest, view.found_frozen = records.longest(key), records.longest_found(key)
    backend = fleet.backends.get(key.backend)
    if backend is not None and view.max_freeze is not None and not can_abort(backend.capabilities, key.freezes):
        view.over_budget = why_over_budget(view.longest, view.max_freeze)


async def _ask(view: InstanceView, fleet: Fleet, limiter: trio.CapacityLimiter, now: datetime) -> None:
    instance = view.instance_id
    async with limiter:
        try:
            backend = fleet.backends[fleet.resolve(view.backend)]
            status = await answer("state", ANSWER_S, lambda: backend.state(instance))
            view.state = status.state
        except (BackendError, UnknownBackendError) as error:
            view.trouble = str(error)
            if isinstance(error, UnknownBackendError):
                return
        try:
            listed = await answer("list", ANSWER_S, lambda: backend.list_snapshots(instance))
            found = sorted(scheduled_only(instance, listed), key=lambda s: (s.created_at, s.id))
            view.future = future_dated(found, now)
            view.snapshots = tuple(snapshot for snapshot in found if snapshot not in view.future)
        except BackendError as error:
            view.trouble = view.trouble or str(error)


def _clock_warnings(schedules: Collection[Schedule], clock: Clock) -> list[str]:
    by_age = [schedule.interval for schedule in schedules if schedule.retention.max_age]
    why = ClockWatch(clock).why_age_waits(min(by_age)) if by_age else None
    return [f"snapshots are not pruned by age for now: {why}"] if why else []
