"""Settling open runs: those that a crash left behind, and those whose hypervisor did not answer in time."""

from contextlib import nullcontext
from datetime import datetime, timedelta

import structlog
import trio
from attrs import define, evolve, field, frozen

from hypemand.backends.base import Backend, BackendError, Settled
from hypemand.core.errors import InvalidInput
from hypemand.core.model import Freezer, Outcome, RunFinished, RunStarted
from hypemand.engine.clock import Clock
from hypemand.engine.fleet import Fleet
from hypemand.engine.leases import Leases
from hypemand.engine.limits import Patience, answer
from hypemand.engine.recorder import Recorder
from hypemand.state.runlog import RunLog

PROVABLY_OURS = timedelta(minutes=10)
"""After another boot, how long past its deadline a run may still be the one that froze a guest."""
AT_ONCE = 8
TELL_AGAIN = timedelta(minutes=1)
MOST_TOLD = 10
_log = structlog.get_logger()


@frozen
class LeftOpen:
    """What a runner knows of a run that it had to leave open.

    Attributes:
        reason: Why it is open.
        thawed: Its guest was resumed; a pause that is found later is somebody else's.
        freeze_s: How long its guest stood still, where it was resumed.
    """

    reason: str
    thawed: bool
    freeze_s: float | None = None
    warnings: tuple[str, ...] = ()


CRASHED = "hypemand was killed or crashed during the run"


@define(kw_only=True)
class Recovery:
    """Settles open runs. One run is settled by one task at a time.

    Attributes:
        frozen: The runs whose guests stand still, where that is known for sure.
        crashed: Why the runs are open that no runner has handed over.
    """

    clock: Clock
    runlog: RunLog
    recorder: Recorder
    fleet: Fleet
    patience: Patience
    leases: Leases
    boot_id: str
    frozen: frozenset[str] | None = None
    crashed: str = CRASHED
    left_open: dict[str, LeftOpen] = field(factory=dict)
    settling: set[str] = field(factory=set)
    handed_over: trio.Event = field(factory=trio.Event)
    _told: dict[str, tuple[str, datetime]] = field(factory=dict)

    def hand_over(self, run: RunStarted, left: LeftOpen) -> None:
        """Take charge of *run*, which its runner could not settle."""
        self.left_open[run.run_id] = left
        self.handed_over.set()

    async def settle_all(self, busy: frozenset[str] = frozenset()) -> list[str]:
        """Try to settle every open run but those in *busy*, a few at a time.

        Returns:
            A line for each that is still open, naming instance and cause.
        """
        left: list[str] = []
        limiter = trio.CapacityLimiter(AT_ONCE)
        async with trio.open_nursery() as nursery:
            for run in self.runlog.open_runs:
                if run.run_id not in busy and run.run_id not in self.settling:
                    nursery.start_soon(self._settle, run, limiter, left)
        return left

    async def settle_each(self, pause_s: float, errors: dict[str, str]) -> None:
        """Settle every open run, each tried again by itself until it holds: one that hangs holds up no other.

        Args:
            errors: Takes, by run, why it is not settled yet.
        """
        limiter = trio.CapacityLimiter(AT_ONCE)

        async def keep_on(run: RunStarted) -> None:
            while left := await self._left_of(run, limiter):
                errors[run.run_id] = left[0]
                await trio.sleep(pause_s)
            errors.pop(run.run_id, None)

        async with trio.open_nursery() as nursery:
            for run in self.runlog.open_runs:
                nursery.start_soon(keep_on, run)

    async def _left_of(self, run: RunStarted, limiter: trio.CapacityLimiter) -> list[str]:
        left: list[str] = []
        await self._settle(run, limiter, left)
        return left

    async def _settle(self, run: RunStarted, limiter: trio.CapacityLimiter, left: list[str]) -> None:
        self.settling.add(run.run_id)
        try:
            async with nullcontext() if self._may_be_frozen(run) else limiter:  # no guest waits in a queue
                settled = await self.ask_backend(run)
            with trio.CancelScope(shield=True):
                await self.recorder.finished(self._interrupted(run, settled))
            self.left_open.pop(run.run_id, None)
            self.leases.close(run.run_id)
        except (BackendError, InvalidInput, OSError) as error:
            self._log_open(run, str(error))
            left.append(f"{run.instance_id}: run {run.run_id} of {run.started_at:%Y-%m-%d %H:%M:%S} UTC: {error}")
        except Exception as error:  # noqa: BLE001 - a bug in one backend keeps no other run from being settled
            _log.exception("internal error while settling a run", run_id=run.run_id, instance_id=run.instance_id)
            left.append(f"{run.instance_id}: run {run.run_id}: internal error: {error!r}")
        finally:
            self.settling.discard(run.run_id)

    async def ask_backend(self, run: RunStarted) -> Settled:
        """Have *run* settled by its backend, without recording it."""
        settled = None
        async with self.fleet.reconnect(run.backend, run.connection) as backend:
            ours = self.is_ours(run)
            settled = await answer("settle", self.patience.settle_s, lambda: backend.settle(run, ours=ours))
            if settled.snapshot is not None and run.run_id not in self.left_open:  # else it has not pruned yet
                settled = evolve(settled, notes=(*settled.notes, *await self._tell_of_gone(backend, run)))
        assert settled is not None
        return settled

    async def _tell_of_gone(self, backend: Backend, run: RunStarted) -> list[str]:
        """A note on snapshots whose deletion nobody recorded: *run* may have been killed while it pruned them."""
        try:
            listed = await answer("list", self.patience.answer_s, lambda: backend.list_snapshots(run.instance_id))
        except Exception as error:  # noqa: BLE001 - the run is settled, whatever is known of others
            return [f"whether it has pruned any is not known: {error}"]
        there = {snapshot.id for snapshot in listed}
        gone = [made for made in self.recorder.order.of(run.instance_id) if made not in there]
        more = f" and {len(gone) - MOST_TOLD} more" if len(gone) > MOST_TOLD else ""
        return [f"not there any more, maybe pruned by it: {', '.join(gone[-MOST_TOLD:])}{more}"] if gone else []

    def why_open(self, run_id: str) -> str | None:
        """Why *run_id* is not settled yet, as far as that was tried."""
        if run_id in self._told:
            return self._told[run_id][0]
        return self.left_open[run_id].reason if run_id in self.left_open else None

    @property
    def is_urgent(self) -> bool:
        """Whether a guest may stand still because of an open run."""
        return any(map(self._may_be_frozen, self.runlog.open_runs))

    def _may_be_frozen(self, run: RunStarted) -> bool:
        if run.freezes is Freezer.HYPERVISOR:  # some thaw by themselves, others not once their daemon was killed
            return self._is_recent(run)
        return run.freezes is Freezer.ENGINE and self.is_ours(run)

    def is_ours(self, run: RunStarted) -> bool:
        """Whether a pause that is found now can only be that of *run*."""
        if self.frozen is not None:
            return run.run_id in self.frozen
        if run.run_id in self.left_open and self.left_open[run.run_id].thawed:
            return False
        return self._is_recent(run)

    def _is_recent(self, run: RunStarted) -> bool:
        """Whether it began in this boot, or was to be over not long ago."""
        if run.boot_id and run.boot_id == self.boot_id:
            return True
        deadline = run.started_at + timedelta(seconds=run.max_freeze_s)
        return run.started_at <= self.clock.now() <= deadline + PROVABLY_OURS

    def _log_open(self, run: RunStarted, error: str) -> None:
        """Log why *run* is still open; the same thing once a minute."""
        now, before = self.clock.now(), self._told.get(run.run_id)
        if before is not None and before[0] == error and timedelta(0) <= now - before[1] < TELL_AGAIN:
            return
        self._told[run.run_id] = (error, now)
        overdue = not self.is_ours(run)
        _log.log(
            50 if overdue else 40,
            "open run can't be settled; look whether its guest runs" if overdue else "open run not settled yet",
            instance_id=run.instance_id,
            run_id=run.run_id,
            backend=run.backend,
            error=error,
        )

    def _interrupted(self, run: RunStarted, settled: Settled) -> RunFinished:
        now = self.clock.now()
        left = self.left_open.get(run.run_id, LeftOpen(self.crashed, thawed=False))
        freeze_s, how_long = self._frozen_for(run, settled, left)
        said = [left.reason]
        if settled.resumed:
            said.append(f"the guest was found frozen and was resumed {how_long}")
        elif run.freezes is not None and freeze_s is None:
            said.append("the guest runs again already; how long it stood still is not known")
        said.append("its snapshot was complete and is kept" if settled.snapshot else "no snapshot came of it")
        return RunFinished(
            run_id=run.run_id,
            instance_id=run.instance_id,
            due_at=run.due_at,
            started_at=run.started_at,
            finished_at=now,
            outcome=Outcome.INTERRUPTED,
            trigger=run.trigger,
            kind=run.kind,
            snapshot_id=settled.snapshot.id if settled.snapshot else None,
            snapshot_name=settled.snapshot.name if settled.snapshot else None,
            size_bytes=settled.snapshot.size_bytes if settled.snapshot else None,
            freeze_s=None if freeze_s is None else round(freeze_s, 6),
            found_frozen=settled.resumed,
            late_s=round((run.started_at - run.due_at).total_seconds(), 6),
            error="; ".join([*said, *settled.notes]),
            warnings=left.warnings,
        )

    def _frozen_for(self, run: RunStarted, settled: Settled, left: LeftOpen) -> tuple[float | None, str]:
        """How long the guest stood still, where that is known, and in words, should it have been found so."""
        if settled.freeze_s is None and not settled.resumed:
            return left.freeze_s, ""
        most_s = (self.clock.now() - run.started_at).total_seconds()
        if most_s < 0 or (settled.freeze_s or 0.0) < 0:
            return None, "after a time that is not known: the clock was set back meanwhile"
        if settled.freeze_s is not None:
            return settled.freeze_s, f"after {settled.freeze_s:.1f} s"
        return most_s, f"after at most {most_s:.1f} s, counted from the begin of its run"
