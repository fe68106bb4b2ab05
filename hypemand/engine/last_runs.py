"""The last runs of each instance, from the run log: what an operator asks for first."""

from collections.abc import Iterable

from attrs import define, field

from hypemand.core.model import InstanceId, Outcome, RunFinished
from hypemand.state.codec import Line


@define
class LastRuns:
    """What the runs told of so far came to, by instance.

    Attributes:
        latest: The last run, a skipped one included.
        attempts: The last one that was not skipped.
        good: The last one that left a snapshot.
    """

    latest: dict[InstanceId, RunFinished] = field(factory=dict)
    attempts: dict[InstanceId, RunFinished] = field(factory=dict)
    good: dict[InstanceId, RunFinished] = field(factory=dict)

    def learn(self, lines: Iterable[Line]) -> None:
        """Take in *lines* of the run log, oldest first."""
        for line in lines:
            if isinstance(line, RunFinished):
                self.finished(line)

    def finished(self, run: RunFinished) -> None:
        """Take in how *run* ended."""
        self.latest[run.instance_id] = run
        if run.outcome is not Outcome.SKIPPED:
            self.attempts[run.instance_id] = run
        if run.snapshot_id is not None:
            self.good[run.instance_id] = run
