"""Deleting what retention no longer keeps: one at a time, each with its reason in the log and in the run."""

from collections.abc import Awaitable, Callable, Collection, Sequence

import structlog
import trio
from attrs import define, field, frozen

from hypemand.backends.base import Backend, BackendError
from hypemand.core.model import InstanceId, Pruned, Retention, Schedule, Snapshot
from hypemand.core.retention import Expired, future_dated, scheduled_only, select_expired, without_age
from hypemand.engine.clock import Clock, ClockWatch
from hypemand.engine.events import Events, SnapshotsListed, Step, TellStep, tell_nobody
from hypemand.engine.limits import Patience, answer
from hypemand.state.store import Store

DELETE_TIMEOUT_S = 600.0
_log = structlog.get_logger()


@define
class PruneResult:
    """What was deleted, what could not be, and what is left."""

    pruned: list[Pruned] = field(factory=list)
    errors: list[str] = field(factory=list)
    left: list[Snapshot] = field(factory=list)
    tell: TellStep = tell_nobody

    def note(self) -> str | None:
        """The errors as one text, or None."""
        if not self.errors:
            return None
        return "pruning failed, it is tried again after the next run: " + "; ".join(self.errors)


@frozen
class LastGood:
    """The last good snapshot until now, which may go once its successor is written down in the schedule's file.

    Attributes:
        write_successor: Does that, and tells whether it lasts.
    """

    snapshot_id: str
    write_successor: Callable[[], Awaitable[bool]]


class Pruner:
    """Applies the retention of a schedule."""

    def __init__(
        self,
        *,
        clock: Clock,
        watch: ClockWatch,
        patience: Patience,
        store: Store,
        made: Callable[[InstanceId], Sequence[str]],
        events: Events,
    ) -> None:
        self._clock = clock
        self._watch = watch
        self._patience = patience
        self._store = store
        self._made = made
        self._events = events

    async def prune(
        self,
        backend: Backend,
        schedule: Schedule,
        protected: Collection[str],
        result: PruneResult,
        *,
        last_good: LastGood | None = None,
    ) -> None:
        """Delete the scheduled snapshots that *schedule* no longer keeps, oldest first.

        A failure keeps the others from nothing; a hypervisor that does not
        answer at all ends it. Decided anew before each: a deletion may take
        minutes, and meanwhile the clock may jump, and somebody may want to
        keep more, or take the schedule out. It ends when an instance that was
        gone is there again: then other snapshots are protected.

        Args:
            protected: Ids that stay whatever the retention says.
            last_good: What stays, too, unless it expires as the last of all and its successor is written down.
            result: Takes what is done, as it is done: a cancellation must not lose it.
        """
        instance = schedule.instance_id
        try:
            listed = await answer("list", self._patience.answer_s, lambda: backend.list_snapshots(instance))
        except BackendError as error:
            result.errors.append(f"snapshots can't be listed: {error}")
            return
        snapshots = scheduled_only(instance, listed)
        result.left = [*snapshots]
        self._events.tell(SnapshotsListed(instance, tuple(snapshots)))
        self._warn(schedule, snapshots, protected)
        tried: set[str] = set()
        while (current := self._store.schedules.get(instance)) is not None:
            if current.gone_since_at != schedule.gone_since_at:
                break
            # From all that were there: next to those that are deleted by now, a wrong date is seen to be wrong.
            expired = [one for one in self._expired(current, snapshots, protected) if one.snapshot.id not in tried]
            others = [one for one in expired if last_good is None or one.snapshot.id != last_good.snapshot_id]
            if not expired:
                break
            if not others:  # at no moment is the one pruned that the schedule's file names
                if last_good is None or not await last_good.write_successor():
                    break
                last_good = None
                continue
            tried.add(others[0].snapshot.id)
            began = trio.current_time()
            await self._delete(backend, others[0], result)
            if trio.current_time() - began >= DELETE_TIMEOUT_S:
                break
        if tried:
            self._events.tell(SnapshotsListed(instance, tuple(result.left)))

    def _warn(self, schedule: Schedule, snapshots: Collection[Snapshot], protected: Collection[str]) -> None:
        """Log what stands in the way of the retention."""
        for ahead in future_dated(snapshots, self._clock.now()):
            _log.warning(
                "snapshot dated in the future: neither counted nor deleted",
                instance_id=schedule.instance_id,
                snapshot_id=ahead.id,
                snapshot_name=ahead.name,
            )
        why = self._why_age_waits(schedule)
        if why is None:
            return
        wanted = self._select(schedule, schedule.retention, snapshots, protected)
        waiting = len(wanted) - len(self._select(schedule, without_age(schedule.retention), snapshots, protected))
        if waiting:
            _log.warning("pruning by age waits", instance_id=schedule.instance_id, snapshots=waiting, why=why)

    def _why_age_waits(self, schedule: Schedule) -> str | None:
        return self._watch.why_age_waits(schedule.interval) if schedule.retention.max_age else None

    def _expired(
        self, schedule: Schedule, snapshots: Collection[Snapshot], protected: Collection[str]
    ) -> tuple[Expired, ...]:
        waits = self._why_age_waits(schedule) is not None
        retention = without_age(schedule.retention) if waits else schedule.retention
        return self._select(schedule, retention, snapshots, protected)

    def _select(
        self, schedule: Schedule, retention: Retention, snapshots: Collection[Snapshot], protected: Collection[str]
    ) -> tuple[Expired, ...]:
        made = self._made(schedule.instance_id)
        return select_expired(snapshots, retention, now=self._clock.now(), protected=protected, made=made)

    async def _delete(self, backend: Backend, expired: Expired, result: PruneResult) -> None:
        snapshot = expired.snapshot
        log = _log.bind(
            instance_id=snapshot.instance_id,
            snapshot_id=snapshot.id,
            snapshot_name=snapshot.name,
            reasons=list(expired.reasons),
        )
        log.info("deleting expired snapshot")
        try:
            await answer("delete", DELETE_TIMEOUT_S, lambda: backend.delete_snapshot(snapshot))
        except BackendError as error:
            log.error("expired snapshot not deleted", error=str(error))
            result.errors.append(f"{snapshot.name}: {error}")
        else:
            result.pruned.append(Pruned(snapshot.id, expired.reasons))
            result.left.remove(snapshot)
            facts = {"snapshot_id": snapshot.id, "snapshot_name": snapshot.name, "reasons": list(expired.reasons)}
            result.tell(Step.PRUNED, **facts)
