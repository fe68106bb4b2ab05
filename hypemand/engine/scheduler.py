"""One heap of due times and one dispatcher. What is due starts at once, in a task of its own."""

import heapq
import itertools
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import NamedTuple

import structlog
import trio
from attrs import define, evolve, field, frozen

from hypemand.core.cadence import jitter, next_slot, reanchor
from hypemand.core.errors import HypemandError
from hypemand.core.fields import format_instant
from hypemand.core.model import InstanceId, RunFinished, RunStarted, Schedule, Trigger
from hypemand.engine.clock import Clock, ClockWatch
from hypemand.engine.events import ClockJumped, Events
from hypemand.engine.runner import Runner
from hypemand.state.runlog import RunLog
from hypemand.state.store import Store

LONGEST_SLEEP_S = 5.0
_log = structlog.get_logger()


class _Entry(NamedTuple):
    """A slot to be started at *start_at*; not the newest of its instance: dropped when it comes up."""

    start_at: datetime
    number: int
    instance: InstanceId
    due_at: datetime


@frozen(eq=False)
class _Running:
    due_at: datetime
    scope: trio.CancelScope
    trigger: Trigger = Trigger.SCHEDULE


@define(eq=False)
class RunUnderWay:
    """A run that somebody asked for. It goes on also when nobody waits for it."""

    _over: trio.Event = field(factory=trio.Event)
    _ended: RunFinished | None = None

    async def ended(self) -> RunFinished | None:
        """How it ended; None when it was left open, or cut short by the end of hypemand."""
        await self._over.wait()
        return self._ended

    def end(self, ended: RunFinished | None) -> None:
        """Tell whoever waits."""
        self._ended = ended
        self._over.set()


class BusyError(HypemandError):
    """The instance has a run that is not over."""


class StoppingError(HypemandError):
    """No run begins any more."""


class Scheduler:
    """Starts runs when they are due. Reads schedules from the store; call `refresh` when one changed.

    Attributes:
        serving: Set once runs can begin.
    """

    def __init__(
        self,
        *,
        clock: Clock,
        watch: ClockWatch,
        store: Store,
        runlog: RunLog,
        runner: Runner,
        events: Events,
        on_crash: Callable[[], None],
    ) -> None:
        self._on_crash = on_crash
        self._clock = clock
        self._watch = watch
        self._store = store
        self._runlog = runlog
        self._runner = runner
        self._events = events
        self._heap: list[_Entry] = []
        self._newest: dict[InstanceId, int] = {}
        self._numbers = itertools.count()
        self._running: dict[InstanceId, _Running] = {}
        self._begun: dict[InstanceId, datetime] = {}
        self._wake = trio.Event()
        self._stopping = False
        self._runs: trio.Nursery | None = None
        self._turned = trio.Event()
        self.serving = trio.Event()

    @property
    def running(self) -> frozenset[InstanceId]:
        """Instances with a run under way."""
        return frozenset(self._running)

    async def serve(self, concurrency: int) -> None:
        """Start what is due until `stop`; then wait for the runs under way.

        Args:
            concurrency: How many overdue runs may begin at once; more are spread.
        """
        self._reanchor_all()
        self._load(concurrency)
        async with trio.open_nursery() as self._runs:
            self.serving.set()
            try:
                while not self._stopping:
                    self._watch.check(self._on_jump)
                    wait_s = self._start_due(self._runs)
                    self._end_turn()
                    await self._sleep(wait_s)
            except BaseException:
                self._on_crash()  # guests that can't be resumed must not keep a dead engine alive
                raise
            self._end_turn()

    def _end_turn(self) -> None:
        self._turned.set()
        self._turned = trio.Event()

    async def next_turn(self) -> None:
        """Return once the dispatcher has looked through what is due, which it does each `LONGEST_SLEEP_S` at least.

        When it looks no more, for it was stopped, that is never.
        """
        await self._turned.wait()

    async def take_turn(self) -> None:
        """Have the dispatcher look now, and return once it has. Once it was stopped there is nothing to wait for."""
        turned = self._turned
        self._wake.set()
        if not self._stopping:
            await turned.wait()

    @property
    def next_start(self) -> tuple[InstanceId, datetime] | None:
        """Whose run is the next to begin, and when."""
        entry = self._first()
        return None if entry is None else (entry.instance, entry.start_at)

    def stop(self, grace_s: float) -> None:
        """Start nothing more. Runs that have begun get *grace_s* to finish, those that wait end now.

        Called again, it can only shorten the grace.
        """
        self._stopping = True
        self._wake.set()
        for instance, running in self._running.items():
            progress = self._runner.active.get(instance)
            if progress is None or progress.started is None:
                running.scope.cancel()
        if self._runs is not None:
            scope = self._runs.cancel_scope
            scope.deadline = min(scope.deadline, trio.current_time() + grace_s)

    def begin_now(self, schedule: Schedule) -> RunUnderWay:
        """Begin a run at once, beside the slots of *schedule*.

        Raises:
            BusyError: Another run of the instance is under way, or not settled yet.
            StoppingError: hypemand does not serve yet, or is about to end.
        """
        if self._runs is None or self._stopping:
            raise StoppingError("hypemand starts or stops just now: no run begins")
        why = self._why_skipped(schedule.instance_id)
        if why is not None:
            raise BusyError(why)
        running = _Running(self._clock.now(), trio.CancelScope(), Trigger.MANUAL)
        self._running[schedule.instance_id] = running
        under_way = RunUnderWay()

        async def run() -> None:
            ended = None
            try:
                ended = await self._run(schedule, running)
            finally:
                under_way.end(ended)

        self._runs.start_soon(run)
        return under_way

    def refresh(self, instance: InstanceId) -> None:
        """Take in that the schedule of *instance* came, changed or went."""
        schedule = self._store.schedules.get(instance)
        self._newest.pop(instance, None)
        if schedule is None or not schedule.settings.enabled:
            return
        schedule = self._anchored(schedule)
        due_at = schedule.next_run_at
        begun = self._begun.get(instance)
        if begun is not None and due_at <= begun:
            due_at = self._following(schedule, begun)
        self._push(instance, due_at, due_at)
        self._wake.set()

    def _following(self, schedule: Schedule, due_at: datetime) -> datetime:
        """The slot after *due_at*, no further away than an interval also when that was of a wrong clock."""
        now = self._clock.now()
        return reanchor(schedule, now, next_slot(due_at, schedule.interval, now).next_run_at)

    def _push(self, instance: InstanceId, start_at: datetime, due_at: datetime) -> None:
        number = next(self._numbers)
        self._newest[instance] = number
        heapq.heappush(self._heap, _Entry(start_at, number, instance, due_at))

    def _load(self, concurrency: int) -> None:
        """Fill the heap. What came due during a downtime is spread, when it is more than can run at once."""
        now = self._clock.now()
        enabled = [s for s in self._store.schedules.values() if s.settings.enabled]
        overdue = {s.instance_id: s for s in enabled if s.next_run_at <= now and not _awaits_first_run(s)}
        window = min((s.interval for s in overdue.values()), default=timedelta(0))
        spread = len(overdue) > concurrency
        for schedule in enabled:
            start_at = schedule.next_run_at
            if spread and schedule.instance_id in overdue:
                start_at = now + jitter(schedule.instance_id, window)
            self._push(schedule.instance_id, start_at, schedule.next_run_at)
        if spread:
            _log.info("runs missed while hypemand was down are spread out", runs=len(overdue))

    def _first(self) -> _Entry | None:
        """The entry that comes up next; those before it that are not the newest of their instances are dropped."""
        while self._heap:
            entry = self._heap[0]
            if self._newest.get(entry.instance) == entry.number:
                return entry
            heapq.heappop(self._heap)
        return None

    def _start_due(self, runs: trio.Nursery) -> float:
        """Start what is due now; seconds until the next, at most `LONGEST_SLEEP_S`."""
        while (entry := self._first()) is not None:
            wait_s = (entry.start_at - self._clock.now()).total_seconds()
            if wait_s > 0:
                return min(wait_s, LONGEST_SLEEP_S)
            heapq.heappop(self._heap)
            self._start(entry, runs)
        return LONGEST_SLEEP_S

    async def _sleep(self, seconds: float) -> None:
        with trio.move_on_after(seconds):
            await self._wake.wait()
        self._wake = trio.Event()

    def _start(self, entry: _Entry, runs: trio.Nursery) -> None:
        schedule = self._store.schedules.get(entry.instance)
        if schedule is None or not schedule.settings.enabled:
            return  # taken out a moment ago; `refresh` is about to be told
        self._begun[entry.instance] = entry.due_at
        following = self._following(schedule, entry.due_at)
        self._push(entry.instance, following, following)
        why = self._why_skipped(entry.instance)
        if why is not None:
            runs.start_soon(self._runner.skip, schedule, entry.due_at, why)
            return
        self._running[entry.instance] = running = _Running(entry.due_at, trio.CancelScope())
        runs.start_soon(self._run, schedule, running)

    def _why_skipped(self, instance: InstanceId) -> str | None:
        running = self._running.get(instance)
        if running is not None:
            which = "due at" if running.trigger is Trigger.SCHEDULE else "asked for at"
            return f"the run {which} {format_instant(running.due_at)} is still going"
        left_open = self._runlog.open_run_of(instance)
        return None if left_open is None else _describe(left_open)

    async def _run(self, schedule: Schedule, running: _Running) -> RunFinished | None:
        ended = None
        try:
            with running.scope:
                ended = await self._runner.run(schedule, running.due_at, running.trigger)
        finally:
            del self._running[schedule.instance_id]
        current = self._store.schedules.get(schedule.instance_id)
        if current is not None and not self._stopping:
            _log.info("next run", instance_id=current.instance_id, at=format_instant(current.next_run_at))
        return ended

    def _on_jump(self, jump: timedelta) -> None:
        self._events.tell(ClockJumped(jump))
        # Backwards it leaves slots too far ahead; forwards they are due, which needs nothing
        self._begun.clear()
        self._reanchor_all()
        for instance in self._store.schedules:
            self.refresh(instance)

    def _reanchor_all(self) -> None:
        for schedule in [*self._store.schedules.values()]:
            if self._anchored(schedule) is not schedule:
                self.refresh(schedule.instance_id)

    def _anchored(self, schedule: Schedule) -> Schedule:
        """*schedule*, its next run not further away than one interval: else a clock was wrong, or an editor."""
        at = reanchor(schedule, self._clock.now())
        if at == schedule.next_run_at:
            return schedule
        _log.warning(
            "next run was further away than one interval; brought back onto its grid",
            instance_id=schedule.instance_id,
            was=format_instant(schedule.next_run_at),
            at=format_instant(at),
        )
        anchored = evolve(schedule, next_run_at=at)
        self._store.hold(anchored)
        return anchored


def _awaits_first_run(schedule: Schedule) -> bool:
    return schedule.last_run_at is None and schedule.settings.first_run == "now"


def _describe(left_open: RunStarted) -> str:
    return f"the run {left_open.run_id} of {format_instant(left_open.started_at)} is not settled yet"
