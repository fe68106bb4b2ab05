"""Deleting what retention no longer keeps: one at a time, each with its reason in the log and in the run."""

from collections.abc import Callable, Collection, Sequence

import structlog
from attrs import define, field

from hypemand.backends.base import Backend, BackendError
from hypemand.core.model import InstanceId, Pruned, Schedule, Snapshot
from hypemand.core.retention import Expired, future_dated, scheduled_only, select_expired, without_age
from hypemand.engine.clock import Clock, ClockWatch
from hypemand.engine.limits import Patience, answer

DELETE_TIMEOUT_S = 600.0
_log = structlog.get_logger()


@define
class PruneResult:
    """What was deleted, what could not be, and what is left."""

    pruned: list[Pruned] = field(factory=list)
    errors: list[str] = field(factory=list)
    left: list[Snapshot] = field(factory=list)

    def note(self) -> str | None:
        """The errors as one text, or None."""
        if not self.errors:
            return None
        return "pruning failed, it is tried again after the next run: " + "; ".join(self.errors)


class Pruner:
    """Applies the retention of a schedule."""

    def __init__(
        self, clock: Clock, watch: ClockWatch, patience: Patience, made: Callable[[InstanceId], Sequence[str]]
    ) -> None:
        self._clock = clock
        self._watch = watch
        self._patience = patience
        self._made = made

    async def prune(
        self, backend: Backend, schedule: Schedule, protected: Collection[str], result: PruneResult
    ) -> None:
        """Delete the scheduled snapshots that *schedule* no longer keeps, oldest first.

        A failure keeps the others from nothing.

        Args:
            protected: Ids that stay whatever the retention says.
            result: Takes what is done, as it is done: a cancellation must not lose it.
        """
        instance = schedule.instance_id
        try:
            listed = await answer("list", self._patience.answer_s, lambda: backend.list_snapshots(instance))
        except BackendError as error:
            result.errors.append(f"snapshots can't be listed: {error}")
            return
        snapshots = scheduled_only(instance, listed)
        for expired in self._expired(schedule, snapshots, protected):
            await self._delete(backend, expired, result)
        gone = {pruned.snapshot_id for pruned in result.pruned}
        result.left = [snapshot for snapshot in snapshots if snapshot.id not in gone]

    def _expired(
        self, schedule: Schedule, snapshots: Collection[Snapshot], protected: Collection[str]
    ) -> tuple[Expired, ...]:
        now, retention = self._clock.now(), schedule.retention
        for ahead in future_dated(snapshots, now):
            _log.warning(
                "snapshot dated in the future: neither counted nor deleted",
                instance_id=schedule.instance_id,
                snapshot_id=ahead.id,
                snapshot_name=ahead.name,
            )
        made = self._made(schedule.instance_id)
        expired = select_expired(snapshots, retention, now=now, protected=protected, made=made)
        why = self._watch.why_age_waits(schedule.interval) if retention.max_age else None
        if why is None:
            return expired
        certain = select_expired(snapshots, without_age(retention), now=now, protected=protected, made=made)
        if len(certain) < len(expired):
            waiting = len(expired) - len(certain)
            _log.warning("pruning by age waits", instance_id=schedule.instance_id, snapshots=waiting, why=why)
        return certain

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
