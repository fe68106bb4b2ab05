"""Guests that stand still at this moment for a run, and runs that nobody is at."""

from collections import Counter
from collections.abc import Iterator

from attrs import define, field
from prometheus_client.metrics_core import GaugeMetricFamily, Metric

from hypemand.core.model import Freezer, InstanceId, RunStarted
from hypemand.engine.engine import Engine
from hypemand.engine.events import Event, RunEnded, RunStepped, Step
from hypemand.surface.metrics.families import INSTANCE, parts

_FROZEN = "How long the guest has stood still by now, or may have where its run is not settled; 0: it is not frozen."
_OPEN = "Runs that were cut short and are not settled yet."


@define(eq=False)
class Standing:
    """Since when guests stand still, as their runs tell it; by run, on the boot-time clock."""

    _engine: Engine
    _since: dict[str, tuple[InstanceId, float]] = field(factory=dict)

    def heard(self, event: Event) -> None:
        """Take in *event*."""
        if isinstance(event, RunStepped) and event.step is Step.PAUSED:
            self._since[event.run_id] = (event.instance_id, self._engine.clock.boot_s())
        elif isinstance(event, RunStepped) and event.step is Step.RESUMED:
            self._since.pop(event.run_id, None)
        elif isinstance(event, RunEnded):
            self._since.pop(event.run.run_id, None)

    def metrics(self) -> Iterator[Metric]:
        """What there is of each instance with a schedule, and of those whose runs outlived theirs."""
        frozen, unsettled = self._frozen(), Counter(run.instance_id for run in self._unsettled())
        instances = sorted({*self._engine.store.schedules, *frozen, *unsettled})
        for part in parts(instances):
            still = GaugeMetricFamily("hypemand_frozen_seconds", _FROZEN, labels=[INSTANCE])
            for instance in part:
                still.add_metric([instance], frozen.get(instance, 0.0))
            yield still
        for part in parts(instances):
            left = GaugeMetricFamily("hypemand_open_runs", _OPEN, labels=[INSTANCE])
            for instance in part:
                left.add_metric([instance], unsettled[instance])
            yield left

    def _unsettled(self) -> list[RunStarted]:
        at_work = {progress.run_id for progress in self._engine.runner.active.values()}
        return [run for run in self._engine.runlog.open_runs if run.run_id not in at_work]

    def _frozen(self) -> dict[InstanceId, float]:
        clock, recovery = self._engine.clock, self._engine.recovery
        frozen = {
            run.instance_id: max(0.0, (clock.now() - run.started_at).total_seconds())
            for run in self._unsettled()
            if run.freezes is Freezer.ENGINE and recovery.is_ours(run)
        }
        return frozen | {instance: clock.boot_s() - since for instance, since in self._since.values()}
