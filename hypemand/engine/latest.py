"""How the last run of each instance ended, and the last that made a snapshot: a schedule keeps only parts of that."""

from collections.abc import Iterable

from attrs import define, field

from hypemand.core.model import InstanceId, Outcome, RunFinished, Schedule
from hypemand.state.codec import Line


@define
class LatestRuns:
    """The latest runs that the run log still tells of, by instance.

    Attributes:
        ended: The last run, a skipped one included.
        attempts: The last one that was not skipped.
        makers: The last one that made a snapshot.
    """

    ended: dict[InstanceId, RunFinished] = field(factory=dict)
    attempts: dict[InstanceId, RunFinished] = field(factory=dict)
    makers: dict[InstanceId, RunFinished] = field(factory=dict)

    def learn(self, lines: Iterable[Line]) -> None:
        """Take in *lines* of the run log, oldest first."""
        for line in lines:
            if isinstance(line, RunFinished):
                self.finished(line)

    def finished(self, run: RunFinished) -> None:
        """Take in how *run* ended."""
        self.ended[run.instance_id] = run
        if run.outcome is not Outcome.SKIPPED:
            self.attempts[run.instance_id] = run
        if run.snapshot_id is not None:
            self.makers[run.instance_id] = run

    def of(self, schedule: Schedule) -> RunFinished | None:
        """The last run of *schedule*; None where the log has lost it, or it is not settled yet."""
        run = self.attempts.get(schedule.instance_id)
        return run if run is not None and run.started_at == schedule.last_run_at else None

    def that_made(self, schedule: Schedule) -> RunFinished | None:
        """The run that made the last snapshot of *schedule*; None where the log has lost it, or it is not over yet."""
        run = self.makers.get(schedule.instance_id)
        return run if run is not None and run.snapshot_id == schedule.last_snapshot_id else None
