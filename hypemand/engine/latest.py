"""How the last run of each instance ended, and the last that made a snapshot: a schedule keeps only parts of that."""

from collections.abc import Iterable

from attrs import define, field

from hypemand.core.model import InstanceId, Outcome, RunFinished, Schedule
from hypemand.state.codec import Line


@define
class LatestRuns:
    """The latest runs that the run log still tells of, skips aside."""

    _last: dict[InstanceId, RunFinished] = field(factory=dict)
    _made: dict[InstanceId, RunFinished] = field(factory=dict)

    def learn(self, lines: Iterable[Line]) -> None:
        """Take in *lines* of the run log, oldest first."""
        for line in lines:
            if isinstance(line, RunFinished):
                self.finished(line)

    def finished(self, run: RunFinished) -> None:
        """Take in how *run* ended."""
        if run.outcome is not Outcome.SKIPPED:
            self._last[run.instance_id] = run
        if run.snapshot_id is not None:
            self._made[run.instance_id] = run

    def of(self, schedule: Schedule) -> RunFinished | None:
        """The last run of *schedule*; None where the log has lost it, or it is not settled yet."""
        run = self._last.get(schedule.instance_id)
        return run if run is not None and run.started_at == schedule.last_run_at else None

    def that_made(self, schedule: Schedule) -> RunFinished | None:
        """The run that made the last snapshot of *schedule*; None where the log has lost it, or it is not over yet."""
        run = self._made.get(schedule.instance_id)
        return run if run is not None and run.snapshot_id == schedule.last_snapshot_id else None
