"""One run: attempts at its snapshot, pruning, and the record of how it ended."""

from datetime import datetime
from typing import Any

import structlog
import trio
from attrs import evolve

from hypemand.backends.base import Backend, BackendUnavailable, InstanceNotFound
from hypemand.core.cadence import next_slot
from hypemand.core.errors import HypemandError
from hypemand.core.model import InstanceId, Outcome, RunFinished, RunStarted, Schedule, Trigger
from hypemand.engine.capture import Attempt, WithdrawnError
from hypemand.engine.events import RunStepped, Step
from hypemand.engine.freeze import StillFrozenError
from hypemand.engine.leases import NoGuardError
from hypemand.engine.limits import answer
from hypemand.engine.means import Means
from hypemand.engine.progress import Progress
from hypemand.engine.pruning import LastGood, PruneResult
from hypemand.engine.recovery import LeftOpen

RETRY_WAITS_S = (60.0, 300.0, 900.0)
_log = structlog.get_logger()


class Runner:
    """Does runs. Each ends with one finished line, or stays open for the recovery to settle."""

    def __init__(self, means: Means) -> None:
        self._means = means
        self.active: dict[InstanceId, Progress] = {}

    async def run(
        self, schedule: Schedule, due_at: datetime, trigger: Trigger = Trigger.SCHEDULE
    ) -> RunFinished | None:
        """Do the run of *schedule* that was due at *due_at*.

        Raises nothing but cancellation, and then the guest runs. A run that is
        cancelled before its started line leaves no trace: its slot stays due.

        Returns:
            How it ended; None when it was left open.
        """
        means = self._means
        progress = self._begin(schedule, due_at, trigger)
        finished = None
        try:
            name = means.fleet.resolve(schedule.backend)
        except HypemandError as error:
            progress.end(Outcome.FAILED, str(error))
            with trio.CancelScope(shield=True):
                finished = await self._record(schedule, progress)
            return finished
        self.active[schedule.instance_id] = progress
        try:
            async with means.fleet.lease(name) as backend:
                finished = await self._run_on(backend, schedule, progress)
        finally:
            del self.active[schedule.instance_id]
        return finished

    async def skip(self, schedule: Schedule, due_at: datetime, why: str) -> None:
        """Record that the slot of *due_at* is not used, and why."""
        progress = self._begin(schedule, due_at, Trigger.SCHEDULE)
        progress.end(Outcome.SKIPPED, why)
        with trio.CancelScope(shield=True):
            await self._record(schedule, progress)

    def _begin(self, schedule: Schedule, due_at: datetime, trigger: Trigger) -> Progress:
        run_id, now = self._means.new_id(), self._means.clock.now()
        missed = next_slot(due_at, schedule.interval, now).missed

        def tell(step: Step, **facts: Any) -> None:
            self._means.events.tell(RunStepped(run_id, schedule.instance_id, step, facts))

        return Progress(run_id, due_at, trigger, now, missed, tell, PruneResult(tell=tell))

    async def _run_on(self, backend: Backend, schedule: Schedule, progress: Progress) -> RunFinished | None:
        try:
            await self._perform_or_find_gone(backend, schedule, progress)
        except trio.Cancelled:
            if progress.started is None and not progress.pruning.pruned:
                raise
            progress.end(Outcome.INTERRUPTED, "hypemand was stopped during the run")
            with trio.CancelScope(shield=True):
                await self._conclude(backend, schedule, progress)
            raise
        except StillFrozenError as error:
            _log.critical("guest left frozen", instance_id=schedule.instance_id, error=str(error))
            progress.notes.append(str(error))
            with trio.CancelScope(shield=True):
                await self._leave_open(schedule, progress, thawed=False)
            return None
        except WithdrawnError as error:
            progress.end(Outcome.SKIPPED, str(error))
        except (HypemandError, OSError) as error:
            progress.end(Outcome.FAILED, str(error) or type(error).__name__)
        except Exception as error:  # noqa: BLE001 - the boundary of a run: a bug in one stops no other
            _log.exception("internal error in a run", run_id=progress.run_id, instance_id=schedule.instance_id)
            progress.end(Outcome.FAILED, f"internal error: {type(error).__name__}: {error}")
        finished = None
        with trio.CancelScope(shield=True):
            finished = await self._conclude(backend, schedule, progress)
        return finished

    async def _perform_or_find_gone(self, backend: Backend, schedule: Schedule, progress: Progress) -> None:
        try:
            await self._perform(backend, schedule, progress)
        except InstanceNotFound as error:
            progress.end(Outcome.FAILED, str(error))
        else:
            return
        await self._means.gone.not_found(backend, schedule.instance_id, progress.pruning)

    async def _perform(self, backend: Backend, schedule: Schedule, progress: Progress) -> None:
        """Try until the started line is written, the failure is not one that passes, or it is too late."""
        too_late = trio.current_time() + schedule.interval.total_seconds() / 4
        by_hand = progress.trigger is Trigger.MANUAL  # whoever asked for it waits, and asks again
        for wait_s in () if by_hand else RETRY_WAITS_S:
            try:
                return await self._attempt(backend, schedule, progress)
            except (BackendUnavailable, NoGuardError) as error:
                if progress.started is not None or trio.current_time() + wait_s > too_late:
                    raise
                _log.warning(
                    "run can't start yet; trying again",
                    instance_id=schedule.instance_id,
                    run_id=progress.run_id,
                    in_s=wait_s,
                    error=str(error),
                )
                progress.tell(Step.WAITING, error=str(error), in_s=wait_s)
            await trio.sleep(wait_s)
        return await self._attempt(backend, schedule, progress)

    async def _attempt(self, backend: Backend, schedule: Schedule, progress: Progress) -> None:
        await Attempt(self._means, backend, schedule.instance_id, progress).make_snapshot()
        await self._prune(backend, schedule, progress)

    async def _prune(self, backend: Backend, schedule: Schedule, progress: Progress) -> None:
        assert progress.snapshot is not None
        store, taken = self._means.store, progress.snapshot.id
        current = store.schedules.get(schedule.instance_id)
        if current is None:
            return  # of a schedule that was taken out meanwhile all snapshots stay
        last = current.last_snapshot_id

        async def write_successor() -> bool:
            now = store.schedules.get(schedule.instance_id)
            if now is not None:
                await self._means.recorder.put(evolve(now, last_snapshot_id=taken))
            return now is not None and schedule.instance_id not in store.unsaved

        last_good = None
        is_behind = not store.is_written(schedule.instance_id)  # its file may name one that is older still
        if last is not None and last != taken and not (is_behind and await write_successor()):
            last_good = LastGood(last, write_successor)
        await self._means.pruner.prune(backend, current, {taken}, progress.pruning, last_good=last_good)

    async def _conclude(self, backend: Backend, schedule: Schedule, progress: Progress) -> RunFinished | None:
        if progress.started is not None and progress.snapshot is None:
            settled = await self._settle(backend, progress, progress.started)
            if not settled:
                await self._leave_open(schedule, progress, thawed=not progress.freeze.pause_unclear)
                return None
        return await self._record(schedule, progress)

    async def _settle(self, backend: Backend, progress: Progress, started: RunStarted) -> bool:
        """Clear up after a capture that went wrong.

        The guest runs already, so no pause that is found now is ours, but for
        one that got no answer and took hold late.
        """
        ours = progress.freeze.pause_unclear
        try:
            settled = await answer("settle", self._means.patience.settle_s, lambda: backend.settle(started, ours=ours))
        except Exception as error:  # noqa: BLE001 - whatever it is, the run stays open and is tried again
            progress.notes.append(f"what it left behind is not cleared up yet: {error}")
            return False
        if settled.snapshot is not None:
            progress.snapshot = settled.snapshot
            progress.notes.append("its snapshot was complete and is kept")
        return True

    async def _leave_open(self, schedule: Schedule, progress: Progress, *, thawed: bool) -> None:
        """Hand the run to the recovery. *thawed*: the guest runs, and no pause that is found later is ours."""
        assert progress.started is not None
        reason = "; ".join(progress.notes)
        freeze_s = progress.freeze.freeze_s
        self._means.hand_over(progress.started, LeftOpen(reason, thawed, freeze_s, tuple(progress.warnings)))
        _log.error(
            "run left open until its hypervisor answers",
            instance_id=schedule.instance_id,
            run_id=progress.run_id,
            error=reason,
        )
        current = self._means.store.schedules.get(schedule.instance_id)
        if current is not None:
            last = evolve(current, last_run_at=progress.started.started_at, last_error=reason)
            await self._means.recorder.put(last)

    async def _record(self, schedule: Schedule, progress: Progress) -> RunFinished:
        finished = progress.finished(schedule.instance_id, self._means.clock.now())
        await self._means.recorder.finished(finished)
        self._means.leases.close(progress.run_id)
        return finished
