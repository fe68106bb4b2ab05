"""In what order snapshots were made, from the run log: their dates don't tell where a clock was wrong."""

from collections import defaultdict
from collections.abc import Iterable

from attrs import define, field

from hypemand.core.model import InstanceId, RunFinished
from hypemand.state.codec import Line


@define
class MakingOrder:
    """Ids of snapshots by instance, in the order of the runs that made them; without those that were pruned."""

    _made: defaultdict[InstanceId, list[str]] = field(factory=lambda: defaultdict(list))

    def learn(self, lines: Iterable[Line]) -> None:
        """Take in *lines* of the run log, oldest first."""
        for line in lines:
            if isinstance(line, RunFinished):
                self.finished(line)

    def finished(self, run: RunFinished) -> None:
        """Take in what *run* made and pruned."""
        made = self._made[run.instance_id]
        if run.snapshot_id is not None and run.snapshot_id not in made:
            made.append(run.snapshot_id)
        for pruned in run.pruned:
            if pruned.snapshot_id in made:
                made.remove(pruned.snapshot_id)

    def of(self, instance: InstanceId) -> tuple[str, ...]:
        """Those of *instance*, in order."""
        return tuple(self._made.get(instance, ()))
