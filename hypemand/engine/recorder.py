"""Writing down how a run ended: first the run log's finished line, then the schedule's file."""

from collections.abc import Iterable

import structlog
import trio
from attrs import evolve

from hypemand.core.cadence import reanchor
from hypemand.core.fields import format_instant
from hypemand.core.model import InstanceId, Outcome, RunFinished, Schedule, Trigger
from hypemand.engine.clock import Clock
from hypemand.engine.events import Events, RunEnded
from hypemand.engine.latest import LatestRuns
from hypemand.engine.made import MakingOrder
from hypemand.engine.records import FreezeRecords
from hypemand.state.codec import Line
from hypemand.state.replay import advanced, with_outcome
from hypemand.state.runlog import RunLog
from hypemand.state.store import Store

_LONGEST_PAUSE_S = 5.0
_log = structlog.get_logger()


class Recorder:
    """Puts outcomes where they last. A full disk delays that, and loses nothing while hypemand runs.

    Attributes:
        freezes: How long guests stood still in the runs recorded so far.
        latest: How the last of them ended, by instance.
        order: In which order snapshots were made.
    """

    def __init__(self, clock: Clock, store: Store, runlog: RunLog, give_up: trio.Event, events: Events) -> None:
        self._clock = clock
        self._store = store
        self._runlog = runlog
        self._give_up = give_up
        self._events = events
        self.freezes = FreezeRecords()
        self.latest = LatestRuns()
        self.order = MakingOrder()

    def learn(self, lines: Iterable[Line]) -> None:
        """Take in what the run log tells of earlier runs, oldest first."""
        lines = list(lines)
        self.freezes.learn(lines)
        self.latest.learn(lines)
        self.order.learn(lines)

    def made(self, instance: InstanceId) -> list[str]:
        """Ids of the snapshots of *instance* in the order in which they were made, those of open runs last."""
        under_way = [run.run_id for run in self._runlog.open_runs_of(instance)]
        return [*self.order.of(instance), *under_way]

    async def finished(self, run: RunFinished) -> None:
        """Append *run* to the log, and bring its schedule up to date. Retries until it holds or hypemand stops."""
        log_outcome(run)
        started = self._runlog.open_run(run.run_id)
        if started is not None:
            self.freezes.finished(started, run)
        self.latest.finished(run)
        self.order.finished(run)
        pause_s = 0.1
        while True:
            try:
                await self._runlog.append(run)
                break
            except OSError as error:
                _log.error("outcome of a run not recorded; trying again", run_id=run.run_id, error=str(error))
                if self._give_up.is_set():
                    return
            with trio.move_on_after(pause_s):
                await self._give_up.wait()
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        schedule = self._store.schedules.get(run.instance_id)
        if schedule is not None:
            await self.put(self._after(schedule, run))
        else:
            await self._record_retired(run)
        self._events.tell(RunEnded(run))

    def _after(self, schedule: Schedule, run: RunFinished) -> Schedule:
        if run.trigger is Trigger.SCHEDULE:
            schedule = advanced(schedule, run)
            at = reanchor(schedule, self._clock.now())
            if at != schedule.next_run_at:
                schedule = evolve(schedule, next_run_at=at)
        return with_outcome(schedule, run)

    async def _record_retired(self, run: RunFinished) -> None:
        """A schedule that was taken out during its run has it in its file when it is put back."""
        try:
            retired = await self._store.read_retired(run.instance_id)
            if retired is not None and run.instance_id not in self._store.schedules:
                await self._store.put_retired(self._after(retired, run))
        except OSError as error:
            _log.error("retired schedule not written", instance_id=run.instance_id, error=str(error))
            return
        current = self._store.schedules.get(run.instance_id)
        if current is not None and retired is not None and current.created_at == retired.created_at:
            await self.put(self._after(current, run))  # put back meanwhile, from the file as it was before

    async def put(self, schedule: Schedule) -> None:
        """Write *schedule*; where that fails it is in force, and written later."""
        try:
            await self._store.put(schedule)
        except OSError as error:
            _log.error("schedule not written; trying again", instance_id=schedule.instance_id, error=str(error))


def log_outcome(run: RunFinished) -> None:
    """One line in the log for a run that is over."""
    facts = {
        "instance_id": run.instance_id,
        "run_id": run.run_id,
        "due_at": format_instant(run.due_at),
        "late_s": run.late_s,
        "missed": run.missed or None,
        "snapshot_name": run.snapshot_name,
        "size_bytes": run.size_bytes,
        "freeze_s": run.freeze_s,
        "capture_s": run.capture_s,
        "pruned": len(run.pruned) or None,
        "error": run.error,
    }
    told = {key: value for key, value in facts.items() if value is not None}
    if run.outcome is Outcome.SUCCEEDED:
        _log.log(30 if run.error else 20, "snapshot taken", **told)
    elif run.outcome is Outcome.SKIPPED:
        _log.warning("run skipped", **told)
    else:
        _log.error(f"run {run.outcome}", **told)
