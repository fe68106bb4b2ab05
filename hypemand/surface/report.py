"""What an operator asks, answered from what hypemand knows and from the backends. Changes nothing."""

from collections.abc import Collection
from datetime import datetime

from attrs import define, field

from hypemand.config import GUARD_OFF, Config
from hypemand.core.model import InstanceId, Schedule
from hypemand.engine.capture import NOT_AGAIN
from hypemand.engine.clock import Clock, ClockWatch, SystemClock
from hypemand.engine.fleet import Fleet, UnknownBackendError, new_fleet
from hypemand.engine.reconcile import Discovery, Wanted, created, discover, wanted_schedules
from hypemand.engine.records import FreezeRecords, can_abort, why_over_budget
from hypemand.surface.known import State
from hypemand.surface.views import ANSWER_S, NOT_AT_WORK, AtWork, InstanceView, ask_all

NEVER_USED = " (never used so far; the daemon makes its directories when it first starts)"


@define
class Overview:
    """Everything that `status` shows, as of *at*.

    Attributes:
        clock_doubts: Why the wall clock is not trusted.
    """

    state: State
    at: datetime
    instances: list[InstanceView] = field(factory=list)
    problems: list[str] = field(factory=list)
    clock_doubts: list[str] = field(factory=list)
    warnings: list[str] = field(factory=list)


async def look_offline(state: State, config: Config | None, only: str | None) -> Overview:
    """`look`, with backends of its own; *config* is None where it is invalid."""
    fleet, clock = new_fleet(state.state_dir), SystemClock()
    fleet.have(config.backends if config else {})
    chosen = None if only is None else {only}
    try:
        return await look(state, config, fleet=fleet, clock=clock, watch=ClockWatch(clock), only=chosen)
    finally:
        await fleet.aclose()


async def look(
    state: State,
    config: Config | None,
    *,
    fleet: Fleet,
    clock: Clock,
    watch: ClockWatch,
    only: Collection[str] | None = None,
    at_work: AtWork = NOT_AT_WORK,
) -> Overview:
    """Ask the backends of *config* about every instance with a schedule, and about those that none covers.

    One that hangs delays the answer by a few seconds, however many instances it has.

    Args:
        only: These instances alone.
        at_work: The instances that must not be asked about.
    """
    discovery = await discover(fleet.backends, ANSWER_S)
    wanted = wanted_schedules(config, discovery, state.schedules.values()) if config else Wanted()
    overview = Overview(state, clock.now(), _views(state, discovery, fleet, _to_come(state, wanted, clock), only))
    for view in overview.instances:
        _judge_freezes(view, state.freezes, fleet, config)
    overview.problems += wanted.problems
    for name, error in sorted(discovery.errors.items()):
        told = overview.problems if name in state.used_backends else overview.warnings
        told.append(f"backend {name}: {error}" + ("" if told is overview.problems else NEVER_USED))
    if config is not None and not config.runs.guard:
        overview.warnings.append(GUARD_OFF)
    overview.clock_doubts += _clock_doubts(state.schedules.values(), watch)
    await ask_all(overview.instances, fleet, at_work, overview.at)
    for view in overview.instances:
        view.warnings += _warnings_of(view)
    return overview


def _to_come(state: State, wanted: Wanted, clock: Clock) -> dict[InstanceId, Schedule]:
    """Schedules that the config wants, and that the daemon will make."""
    now, zone = clock.now(), clock.zone()
    return {
        instance: created(instance, entry, backend, now, zone)
        for instance, (entry, backend) in wanted.entries.items()
        if instance not in state.schedules
    }


def _views(
    state: State,
    discovery: Discovery,
    fleet: Fleet,
    to_come: dict[InstanceId, Schedule],
    only: Collection[str] | None,
) -> list[InstanceView]:
    views = {i: InstanceView(i, _backend_of(s, fleet), s) for i, s in state.schedules.items()}
    views |= {i: InstanceView(i, s.backend, s, made=False) for i, s in to_come.items()}
    for name, instances in sorted(discovery.instances.items()):
        for instance in instances:
            views.setdefault(instance, InstanceView(instance, name))
    chosen = [views[instance] for instance in sorted(views) if only is None or instance in only]
    for view in chosen:
        good = state.latest.makers.get(view.instance_id)
        view.last_run = state.latest.ended.get(view.instance_id)
        view.last_attempt = state.latest.attempts.get(view.instance_id)
        view.last_good_at = good.started_at if good else None
        view.open_run = state.open_runs.get(view.instance_id)
        view.in_order = state.order.of(view.instance_id)
    return chosen


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


def _clock_doubts(schedules: Collection[Schedule], watch: ClockWatch) -> list[str]:
    by_age = [schedule.interval for schedule in schedules if schedule.retention.max_age]
    why = watch.why_age_waits(min(by_age)) if by_age else None
    return [f"snapshots are not pruned by age for now: {why}"] if why else []


def _warnings_of(view: InstanceView) -> list[str]:
    warnings = []
    if view.over_budget is not None:
        warnings.append(f"its next run will not begin: {view.over_budget}")
    warnings += [
        f"snapshot {snapshot.name} is dated in the future: neither counted nor deleted" for snapshot in view.future
    ]
    of_last_run = view.last_run.warnings if view.last_run else ()
    told = view.over_budget is not None
    return warnings + [f"last run: {warning}" for warning in of_last_run if not (told and NOT_AGAIN in warning)]
