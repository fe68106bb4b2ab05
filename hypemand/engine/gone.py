"""Instances that are gone: when that is certain, and what then becomes of their schedules."""

from collections.abc import Callable
from datetime import datetime, timedelta

import structlog
from attrs import evolve

from hypemand.backends.base import Backend, BackendError
from hypemand.core.fields import format_instant
from hypemand.core.model import InstanceId, ManagedBy, Schedule
from hypemand.core.retention import outlived
from hypemand.engine.clock import Clock, ClockWatch
from hypemand.engine.limits import Patience, answer
from hypemand.engine.pruning import Pruner, PruneResult
from hypemand.engine.recorder import Recorder
from hypemand.state.store import Store

LATE = timedelta(minutes=20)
"""By so much runs may be late, retries included."""
CERTAIN_AFTER = timedelta(hours=24)
_log = structlog.get_logger()


class GoneWatch:
    """Remembers since when an authoritative answer says that an instance does not exist.

    After 24 hours of that answer alone its snapshots lose their protection,
    and its schedule ends once it has nothing left to prune. A schedule from
    the config stays: there the operator says what is wanted.
    """

    def __init__(
        self,
        *,
        clock: Clock,
        watch: ClockWatch,
        store: Store,
        recorder: Recorder,
        pruner: Pruner,
        patience: Patience,
        on_removed: Callable[[InstanceId], None],
    ) -> None:
        self._clock = clock
        self._watch = watch
        self._store = store
        self._recorder = recorder
        self._pruner = pruner
        self._patience = patience
        self._on_removed = on_removed

    async def found(self, instance: InstanceId) -> None:
        """The hypervisor knows *instance*: whatever was said before no longer counts."""
        schedule = self._store.schedules.get(instance)
        if schedule is not None and schedule.gone_since_at is not None:
            await self._recorder.put(evolve(schedule, gone_since_at=None))

    async def not_found(self, backend: Backend, instance: InstanceId, result: PruneResult) -> None:
        """The hypervisor says that there is no *instance*: remember since when, and prune once that is certain.

        Args:
            result: Takes what is pruned.
        """
        schedule = self._store.schedules.get(instance)
        if schedule is None:
            return
        now = self._clock.now()
        if self._watch.why_age_waits(CERTAIN_AFTER):
            return  # neither counted to the end nor begun: a clock set right again would make a day of a minute
        if schedule.gone_since_at is None or schedule.gone_since_at > now or _was_not_asked(schedule, now):
            await self._recorder.put(evolve(schedule, gone_since_at=now))
            return
        if now - schedule.gone_since_at < CERTAIN_AFTER:
            return
        await self._prune_and_end(backend, schedule, now, result)

    async def _prune_and_end(self, backend: Backend, schedule: Schedule, now: datetime, result: PruneResult) -> None:
        """Do what is due, unless a client changes that meanwhile: to ask the hypervisor takes its time."""
        existed = await self._existed_since(backend, schedule, now)
        current = self._still_gone(schedule)
        if current is None:
            return
        if existed:
            await self._recorder.put(evolve(current, gone_since_at=now))
            return
        await self._pruner.prune(backend, current, protected=(), result=result)
        current = self._still_gone(schedule)
        if current is not None and not result.errors and outlived(result.left, current.retention):
            await self._end(current)

    def _still_gone(self, schedule: Schedule) -> Schedule | None:
        """*schedule* as it is now; None where it was taken out, or its instance is known to be there."""
        current = self._store.schedules.get(schedule.instance_id)
        if current is None or current.gone_since_at != schedule.gone_since_at:
            return None
        return current

    async def _existed_since(self, backend: Backend, schedule: Schedule, now: datetime) -> bool:
        """Whether a snapshot was made of the instance after it is said to have gone: a clock was wrong then."""
        instance = schedule.instance_id
        try:
            listed = await answer("list", self._patience.answer_s, lambda: backend.list_snapshots(instance))
        except BackendError:
            return False  # the pruning will say so
        dates = [snapshot.created_at for snapshot in listed if snapshot.created_at <= now]
        return (
            schedule.gone_since_at is not None and max(dates, default=schedule.gone_since_at) > schedule.gone_since_at
        )

    async def _end(self, schedule: Schedule) -> None:
        if schedule.managed_by is ManagedBy.CONFIG:
            return
        _log.warning(
            "instance is gone and nothing is left to prune; its schedule ends",
            instance_id=schedule.instance_id,
            gone_since=format_instant(schedule.gone_since_at) if schedule.gone_since_at else None,
        )
        try:
            await self._store.remove(schedule.instance_id)
        except OSError as error:
            _log.error("schedule not removed", instance_id=schedule.instance_id, error=str(error))
        self._on_removed(schedule.instance_id)


def _was_not_asked(schedule: Schedule, now: datetime) -> bool:
    """Whether nobody has asked for more than two intervals: meanwhile it may have been there, and gone again."""
    return schedule.last_run_at is not None and now - schedule.last_run_at > 2 * schedule.interval + LATE
