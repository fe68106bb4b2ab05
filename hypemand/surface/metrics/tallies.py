"""What is counted of the runs of each instance, for as long as it has a schedule."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate

from attrs import define, field
from prometheus_client.utils import floatToGoString

from hypemand.core.model import InstanceId, Outcome, RunFinished, Trigger

FREEZE_BUCKETS_S = (0.001, 0.005, 0.02, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0)
CAPTURE_BUCKETS_S = (0.001, 0.01, 0.1, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0)
LATENESS_BUCKETS_S = (0.1, 1.0, 5.0, 30.0, 60.0, 300.0, 900.0, 3600.0)


@define
class Histogram:
    """How many values there were up to each of *bounds*, and their sum."""

    bounds: Sequence[float]
    sum: float = 0.0
    _counts: list[int] = field(init=False)

    @_counts.default
    def _no_counts(self) -> list[int]:
        return [0] * (len(self.bounds) + 1)

    def add(self, value: float) -> None:
        """Take in *value*. What a wrong clock makes negative counts as zero: the sum must never fall."""
        value = max(0.0, value)
        self._counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """The upper bounds as Prometheus writes them, each with how many values there were up to it."""
        names = [*map(floatToGoString, self.bounds), "+Inf"]
        return list(zip(names, accumulate(self._counts), strict=True))


@define
class Tally:
    """What the runs of one instance came to since hypemand started. Outcomes that no run had yet count too: as 0."""

    runs: Counter[tuple[Outcome, Trigger]] = field(
        factory=lambda: Counter({(outcome, Trigger.SCHEDULE): 0 for outcome in Outcome})
    )
    lateness: Histogram = field(factory=lambda: Histogram(LATENESS_BUCKETS_S))
    freeze: Histogram = field(factory=lambda: Histogram(FREEZE_BUCKETS_S))
    capture: Histogram = field(factory=lambda: Histogram(CAPTURE_BUCKETS_S))
    pruned: int = 0
    missed: int = 0

    def add(self, run: RunFinished) -> None:
        """Take in how *run* ended."""
        self.runs[run.outcome, run.trigger] += 1
        self.pruned += len(run.pruned)
        if run.outcome is Outcome.SKIPPED:
            return
        if run.trigger is Trigger.SCHEDULE:
            self.missed += run.missed
            self.lateness.add(run.late_s)
        if run.freeze_s is not None:
            self.freeze.add(run.freeze_s)
        if run.capture_s is not None:
            self.capture.add(run.capture_s)


@define
class Tallies:
    """One tally for each instance that was asked about."""

    _of: dict[InstanceId, Tally] = field(factory=dict)

    def of(self, instance: InstanceId) -> Tally:
        """The tally of *instance*, begun now if there was none."""
        return self._of.setdefault(instance, Tally())

    def keep(self, instances: Iterable[InstanceId]) -> None:
        """Forget all but *instances*."""
        for gone in self._of.keys() - set(instances):
            del self._of[gone]
