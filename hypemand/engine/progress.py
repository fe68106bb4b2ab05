"""How far a run has come, and the finished line that comes of it."""

from collections.abc import Iterable
from datetime import datetime

from attrs import define, field

from hypemand.core.model import InstanceId, Outcome, RunFinished, RunStarted, Snapshot, Trigger
from hypemand.engine.events import TellStep, tell_nobody
from hypemand.engine.freeze import FreezeRecord
from hypemand.engine.pruning import PruneResult


@define
class Progress:
    """How far a run has come; what its finished line is made of."""

    run_id: str
    due_at: datetime
    trigger: Trigger
    began_at: datetime
    missed: int
    tell: TellStep = tell_nobody
    pruning: PruneResult = field(factory=PruneResult)
    started: RunStarted | None = None
    freeze: FreezeRecord = field(factory=FreezeRecord)
    snapshot: Snapshot | None = None
    outcome: Outcome = Outcome.SUCCEEDED
    notes: list[str] = field(factory=list)
    warnings: list[str] = field(factory=list)

    def end(self, outcome: Outcome, note: str) -> None:
        """The run ends as *outcome*, because of *note*; once its snapshot is listed it stays a success."""
        if self.snapshot is None:
            self.outcome = outcome
        self.notes.append(note)

    def warn(self, warnings: Iterable[str], *, anew: bool) -> list[str]:
        """Keep *warnings*, each once. *anew*: in place of those of an earlier attempt, which no longer hold.

        Returns:
            Those that were not there before.
        """
        before = self.warnings
        self.warnings = list(dict.fromkeys(warnings if anew else [*before, *warnings]))
        return [warning for warning in self.warnings if warning not in before]

    def finished(self, instance: InstanceId, now: datetime) -> RunFinished:
        """The line for the history."""
        notes = [*self.notes, self.pruning.note(), self.freeze.thaw_note()]
        started_at = self.started.started_at if self.started else self.began_at
        return RunFinished(
            run_id=self.run_id,
            instance_id=instance,
            due_at=self.due_at,
            started_at=started_at,
            finished_at=now,
            outcome=self.outcome,
            trigger=self.trigger,
            kind=self.started.kind if self.started else None,
            snapshot_id=self.snapshot.id if self.snapshot else None,
            snapshot_name=self.snapshot.name if self.snapshot else None,
            size_bytes=self.snapshot.size_bytes if self.snapshot else None,
            freeze_s=_rounded(self.freeze.freeze_s),
            capture_s=_rounded(self.freeze.capture_s),
            late_s=round((started_at - self.due_at).total_seconds(), 6),
            missed=self.missed,
            pruned=tuple(self.pruning.pruned),
            error="; ".join(note for note in notes if note) or None,
            warnings=tuple(self.warnings),
        )


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
