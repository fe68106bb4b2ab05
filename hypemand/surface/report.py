"""What an operator asks, answered from what hypemand knows and from the backends. Changes nothing."""

from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterator
from datetime import datetime, timedelta
from functools import partial

import structlog
import trio
from attrs import define, field, frozen

from hypemand.backends.base import Backend, BackendError
from hypemand.config import GUARD_OFF, Config
from hypemand.core.model import InstanceId, RunFinished, Schedule, Snapshot
from hypemand.core.retention import future_dated, scheduled_only
from hypemand.engine.capture import NOT_AGAIN
from hypemand.engine.clock import Clock, ClockWatch, SystemClock
from hypemand.engine.fleet import Fleet, UnknownBackendError, new_fleet
from hypemand.engine.limits import answer
from hypemand.engine.reconcile import Discovery, Wanted, created, discover, wanted_schedules
from hypemand.engine.records import FreezeRecords, LongestFreeze, can_abort, why_over_budget
from hypemand.surface.known import OpenRun, State

ANSWER_S = 5.0
"""How long a backend is waited for, for its instances, and for each of them."""
ALL_ANSWERS_S = 10.0
"""How long for all of them."""
AT_ONCE = 32
"""Questions to one backend; one that hangs hides no other."""
NEVER_USED = " (never used so far; the daemon makes its directories when it first starts)"
NOT_IN_TIME = "no answer in time, or not asked because others gave none"
_log = structlog.get_logger()


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
        last_run: Skipped ones included; *last_attempt*: without them.
        last_good_at: When the run began that left its last snapshot, as far as the run log tells.
        trouble: Why the backend's part is missing.
        warnings: What is odd about it.
    """

    instance_id: InstanceId
    backend: str | None
    schedule: Schedule | None = None
    made: bool = True
    state: str | None = None
    snapshots: tuple[Snapshot, ...] | None = None
    trouble: str | None = None
    last_run: RunFinished | None = None
    last_attempt: RunFinished | None = None
    last_good_at: datetime | None = None
    open_run: OpenRun | None = None
    future: tuple[Snapshot, ...] = ()
    in_order: tuple[str, ...] = ()
    max_freeze: timedelta | None = None
    longest: LongestFreeze | None = None
    found_frozen: LongestFreeze | None = None
    over_budget: str | None = None
    warnings: list[str] = field(factory=list)


@frozen
class AtWork:
    """The instances that hypemand is at work on. It knows their state itself; a hypervisor serves one client at a time.

    Attributes:
        on: Whether an instance is one of them, at this moment.
        listed: Its snapshots as they were listed last; None where that is not known.
    """

    on: Callable[[InstanceId], bool]
    listed: Callable[[InstanceId], tuple[Snapshot, ...] | None]


NOT_AT_WORK = AtWork(lambda _: False, lambda _: None)


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
    await _ask_all(overview, fleet, at_work)
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


async def _ask_all(overview: Overview, fleet: Fleet, at_work: AtWork) -> None:
    by_backend: defaultdict[str | None, list[InstanceView]] = defaultdict(list)
    for view in overview.instances:
        view.trouble = NOT_IN_TIME
        by_backend[view.backend].append(view)

    async def ask_some(views: Iterator[InstanceView]) -> None:
        for view in views:
            if at_work.on(view.instance_id):
                view.trouble = None
                view.state = view.open_run.guest if view.open_run else None
                _take_snapshots(view, at_work.listed(view.instance_id), overview.at)
            else:
                await _ask(view, fleet, overview.at)

    with trio.move_on_after(ALL_ANSWERS_S):
        async with trio.open_nursery() as nursery:
            for views in by_backend.values():
                waiting = iter(views)
                for _ in range(min(AT_ONCE, len(views))):
                    nursery.start_soon(ask_some, waiting)


async def _ask(view: InstanceView, fleet: Fleet, now: datetime) -> None:
    try:
        name = fleet.resolve(view.backend)
    except UnknownBackendError as error:
        view.trouble = str(error)
        return
    troubles: list[str] = []
    async with fleet.lease(name) as backend, trio.open_nursery() as nursery:
        nursery.start_soon(_noting, troubles, partial(_ask_snapshots, backend, view, now))
        await _noting(troubles, partial(_ask_state, backend, view))
    view.trouble = troubles[0] if troubles else None


async def _ask_state(backend: Backend, view: InstanceView) -> None:
    view.state = (await answer("state", ANSWER_S, lambda: backend.state(view.instance_id))).state


async def _ask_snapshots(backend: Backend, view: InstanceView, now: datetime) -> None:
    listed = await answer("list", ANSWER_S, lambda: backend.list_snapshots(view.instance_id))
    _take_snapshots(view, scheduled_only(view.instance_id, listed), now)


async def _noting(troubles: list[str], ask: Callable[[], Awaitable[None]]) -> None:
    try:
        await ask()
    except BackendError as error:
        troubles.append(str(error))
    except Exception as error:  # noqa: BLE001 - a bug in one backend hides nothing of the others
        _log.exception("internal error of a backend")
        troubles.append(f"internal error: {error!r}")


def _take_snapshots(view: InstanceView, found: Collection[Snapshot] | None, now: datetime) -> None:
    if found is not None:
        in_order = sorted(found, key=lambda s: (s.created_at, s.id))
        view.future = future_dated(in_order, now)
        view.snapshots = tuple(snapshot for snapshot in in_order if snapshot not in view.future)


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
