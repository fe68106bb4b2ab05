"""One attempt of a run at its snapshot: inspect, prepare, claim, freeze, capture, thaw, complete, publish."""

from collections.abc import Awaitable, Callable, Iterable
from datetime import timedelta
from typing import TypeVar

import structlog
import trio
from attrs import frozen

from hypemand.backends.base import Backend, Captured, CaptureFailed, CaptureRequest, Preparation, Status, Unsupported
from hypemand.core.cadence import next_slot
from hypemand.core.duration import format_duration
from hypemand.core.errors import HypemandError
from hypemand.core.model import InstanceId, InstanceState, RunStarted, Schedule, Snapshot, Trigger
from hypemand.core.naming import scheduled_tags, snapshot_name
from hypemand.core.runstate import Steps, decide_steps
from hypemand.engine.events import Step
from hypemand.engine.freeze import Budget, Freeze
from hypemand.engine.limits import answer
from hypemand.engine.means import Means
from hypemand.engine.progress import Progress
from hypemand.engine.records import FreezeKey, OverBudgetError, can_abort, why_over_budget
from hypemand.engine.slots import Slot
from hypemand.engine.space import Promise
from hypemand.state.replay import advanced

T = TypeVar("T")
NOT_AGAIN = "until that is raised, no run begins that could freeze it so again"
_log = structlog.get_logger()


class WithdrawnError(HypemandError):
    """The schedule was taken out or disabled while its run waited to begin."""


@frozen
class _Found:
    """What an attempt found at its instance before the claim."""

    schedule: Schedule
    state: InstanceState
    steps: Steps


@frozen
class Attempt:
    """One attempt at the snapshot of a run. *progress* takes what is done, as it is done."""

    means: Means
    backend: Backend
    instance: InstanceId
    progress: Progress

    async def make_snapshot(self) -> None:
        """Make the snapshot, up to its being listed; ``progress.snapshot`` is set then, and not before.

        The overall slot covers freeze to thaw, the backend's slot all that the
        capture does. The promise of room ends with the thaw: what is written
        later has taken its room by then, and would count twice.

        Raises:
            WithdrawnError: The schedule is not there any more.
            OverBudgetError: The guest would stand still for longer than its budget; nothing was touched.
            BackendError: Transient before ``progress.started`` is set: another attempt may be made.
            NoGuardError: Likewise.
            StillFrozenError: The guest could not be resumed.
        """
        means = self.means
        # Asked before any slot is taken, so that a hypervisor that doesn't answer holds up nobody ...
        with means.rush:
            found = await self._inspect()
        with means.space.promise() as room:
            async with means.slots.take(self.backend.name) as slot:
                with means.rush:
                    if slot.waited:  # much may have changed meanwhile
                        found = await self._inspect()
                    started = await self._begin(found, room)
                if await means.rush.wait() and not Steps(started.kind, started.freezes).pauses:
                    await self._check_unchanged(started)
                budget = Budget(started.max_freeze_s, means.limits().capture_timeout.total_seconds())
                captured = await self._capture(started, budget, slot)
                room.end()
                captured = await self._complete(captured, budget.capture_timeout_s)
                self._warn_of_freeze(started, budget)
        await self._publish(captured.snapshot)

    async def _begin(self, found: _Found, room: Promise) -> RunStarted:
        """Prepare and claim; *room* gets the promise of it."""
        means = self.means
        means.rush.step()
        ready = await self._ask("prepare", lambda: self.backend.prepare(self.instance, found.steps.kind))
        means.rush.step()
        self._warn(ready.warnings, anew=True)
        if found.steps.frozen_by(ready.freezes).pauses:
            await means.leases.check()
        self._check_budget(found, ready)
        await room.fill(ready.rooms, means.limits().min_free)
        return await self._claim(found, ready)

    async def _inspect(self) -> _Found:
        schedule = self.means.store.schedules.get(self.instance)
        if schedule is None or not schedule.settings.enabled:
            raise WithdrawnError("the schedule was taken out or disabled before its run began")
        status: Status = await self._ask("state", lambda: self.backend.state(self.instance))
        await self.means.gone.found(self.instance)
        able = self.backend.capabilities
        steps = decide_steps(status.state, able.freezes, status.detail)
        if steps.kind not in able.kinds:
            raise Unsupported(
                f"instance is {status.state}: backend {self.backend.name!r} makes no {steps.kind} snapshots"
            )
        return _Found(schedule, status.state, steps)

    async def _check_unchanged(self, started: RunStarted) -> None:
        """After a wait; where hypemand pauses the guest itself, it looks right before that anyway."""
        status = await self._ask("state", lambda: self.backend.state(self.instance))
        if status.state is not started.state_before:
            raise CaptureFailed(f"instance is {status.state} now, it was {started.state_before} when its run began")

    async def _ask(self, what: str, ask: Callable[[], Awaitable[T]]) -> T:
        return await answer(what, self.means.patience.answer_s, ask)

    def _warn(self, warnings: Iterable[str], *, anew: bool = False) -> None:
        for warning in self.progress.warn(warnings, anew=anew):
            _log.warning(
                "capture with a warning", instance_id=self.instance, run_id=self.progress.run_id, warning=warning
            )

    def _check_budget(self, found: _Found, ready: Preparation) -> None:
        """Refuse a capture that can't be interrupted, of a guest that stood still for too long in such a one before.

        Raises:
            OverBudgetError: Says how to go on.
        """
        freezes = found.steps.frozen_by(ready.freezes).freezes
        if freezes is None or can_abort(self.backend.capabilities, freezes):
            return
        longest = self.means.recorder.freezes.longest(FreezeKey(self.instance, self.backend.name, freezes))
        why = why_over_budget(longest, self._max_freeze(found.schedule))
        if why is not None:
            raise OverBudgetError(why)

    def _warn_of_freeze(self, started: RunStarted, budget: Budget) -> None:
        """Tell at once what keeps the next run from beginning."""
        freeze_s, freezes = self.progress.freeze.freeze_s, started.freezes
        if freezes is None or can_abort(self.backend.capabilities, freezes) or (freeze_s or 0.0) <= budget.max_freeze_s:
            return
        limit = format_duration(timedelta(seconds=budget.max_freeze_s))
        warning = f"the guest stood still for {freeze_s:.1f} s, longer than its max_freeze of {limit}: {NOT_AGAIN}"
        self._warn([warning])

    def _max_freeze(self, schedule: Schedule) -> timedelta:
        return schedule.settings.max_freeze or self.means.limits().max_freeze

    async def _claim(self, found: _Found, ready: Preparation) -> RunStarted:
        means, progress, schedule = self.means, self.progress, found.schedule
        now = means.clock.now()
        own_slot = progress.trigger is Trigger.SCHEDULE
        following = next_slot(progress.due_at, schedule.interval, now).next_run_at
        started = RunStarted(
            run_id=progress.run_id,
            instance_id=self.instance,
            backend=self.backend.name,
            trigger=progress.trigger,
            kind=found.steps.kind,
            state_before=found.state,
            due_at=progress.due_at,
            next_run_at=following if own_slot else schedule.next_run_at,
            started_at=now,
            snapshot_name=snapshot_name(schedule.name_prefix, now, ready.taken_names),
            tags=scheduled_tags(self.instance, schedule.metadata),
            max_freeze_s=self._max_freeze(schedule).total_seconds(),
            freezes=found.steps.frozen_by(ready.freezes).freezes,
            boot_id=means.boot_id,
            connection=self.backend.connection,
            boot_s=round(means.clock.boot_s(), 6),
        )
        await means.runlog.append(started)
        progress.started = started
        current = means.store.schedules.get(self.instance)
        if current is not None and own_slot:
            means.store.remember(advanced(current, started))
        return started

    async def _capture(self, started: RunStarted, budget: Budget, slot: Slot) -> Captured:
        _log.info(
            "capture begins",
            instance_id=started.instance_id,
            run_id=started.run_id,
            snapshot_name=started.snapshot_name,
        )
        self.progress.tell(Step.BEGUN, snapshot_name=started.snapshot_name, kind=str(started.kind))
        request = CaptureRequest(
            run_id=started.run_id,
            name=started.snapshot_name,
            kind=started.kind,
            tags=started.tags,
            created_at=started.started_at,
            freezes=started.freezes,
        )
        freeze = Freeze(
            backend=self.backend,
            instance=self.instance,
            steps=Steps(started.kind, started.freezes),
            budget=budget,
            patience=self.means.patience,
            leases=self.means.leases,
            give_up=self.means.give_up,
            record=self.progress.freeze,
            tell=self.progress.tell,
        )
        captured = await freeze.capture(request, slot, self.means.beside)
        slot.release_overall()
        self._warn(captured.warnings)
        return captured

    async def _complete(self, captured: Captured, timeout_s: float) -> Captured:
        """Have the rest done that the guest need not stand still for, within what is left of the capture's time."""
        record = self.progress.freeze
        began = record.capture_began
        assert began is not None
        try:
            with trio.move_on_at(began + timeout_s):
                whole = await self.backend.complete(captured)
                record.measured(whole.freeze_s)
                self._warn(whole.warnings)
                return whole
        finally:
            record.capture_s = trio.current_time() - began
        raise CaptureFailed(
            f"the snapshot was not whole within runs.capture_timeout and was given up after {record.capture_s:.1f} s"
        )

    async def _publish(self, snapshot: Snapshot) -> None:
        limit_s = self.means.limits().capture_timeout.total_seconds()
        await answer("publish", limit_s, lambda: self.backend.publish(snapshot))
        self.progress.snapshot = snapshot
        facts = {"snapshot_id": snapshot.id, "snapshot_name": snapshot.name, "size_bytes": snapshot.size_bytes}
        self.progress.tell(Step.LISTED, **facts)
