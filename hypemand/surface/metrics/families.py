"""The metrics of instances: what each is called, what it means, and where its numbers come from."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

from attrs import frozen
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from hypemand.surface.metrics.sight import Sight
from hypemand.surface.metrics.tallies import Histogram

INSTANCE = "instance_id"
"""Not ``instance``: that is Prometheus' own label, for the address where it scrapes."""
PART_LINES = 100
"""A metric comes in parts of so many lines, more or less: one takes a millisecond, and then others have a turn."""
T = TypeVar("T")


def parts(items: Sequence[T], lines_each: int = 1) -> Iterator[Sequence[T]]:
    """*items* in parts, of which each makes so many lines; one empty part where there are none."""
    size = max(1, PART_LINES // lines_each)
    return (items[start : start + size] for start in range(0, max(1, len(items)), size))


class Family(Protocol):
    """A metric of which each instance has samples of its own."""

    @property
    def lines(self) -> int:
        """How many lines an instance takes, more or less."""

    def of(self, part: Sequence[Sight]) -> Metric:
        """The metric with the samples of those in *part*."""


@frozen
class Gauge:
    """One number for each instance; None: no sample."""

    name: str
    help: str
    value: Callable[[Sight], float | None]
    lines: int = 1

    def of(self, part: Sequence[Sight]) -> Metric:
        """See `Family`."""
        metric = GaugeMetricFamily(self.name, self.help, labels=[INSTANCE])
        for sight in part:
            value = self.value(sight)
            if value is not None:
                metric.add_metric([sight.schedule.instance_id], value)
        return metric


@frozen
class Counter:
    """Numbers that only rise, for each instance, by the values of *labels*."""

    name: str
    help: str
    values: Callable[[Sight], Iterable[tuple[Sequence[str], float]]]
    labels: Sequence[str] = ()
    lines: int = 4

    def of(self, part: Sequence[Sight]) -> Metric:
        """See `Family`."""
        metric = CounterMetricFamily(self.name, self.help, labels=[INSTANCE, *self.labels])
        for sight in part:
            for labels, value in self.values(sight):
                metric.add_metric([sight.schedule.instance_id, *labels], value)
        return metric


@frozen
class Distribution:
    """A histogram for each instance."""

    name: str
    help: str
    histogram: Callable[[Sight], Histogram]
    lines: int = 12

    def of(self, part: Sequence[Sight]) -> Metric:
        """See `Family`."""
        metric = HistogramMetricFamily(self.name, self.help, labels=[INSTANCE])
        for sight in part:
            histogram = self.histogram(sight)
            metric.add_metric([sight.schedule.instance_id], histogram.buckets(), histogram.sum)
        return metric


@frozen
class Info:
    """What else is to be known of an instance, as labels of a 1."""

    name: str
    help: str
    lines: int = 1

    def of(self, part: Sequence[Sight]) -> Metric:
        """See `Family`."""
        metric = GaugeMetricFamily(self.name, self.help, labels=[INSTANCE, "backend", "managed_by"])
        for sight in part:
            schedule = sight.schedule
            metric.add_metric([schedule.instance_id, schedule.backend or "", schedule.managed_by], 1)
        return metric


FAMILIES: tuple[Family, ...] = (
    Info("hypemand_schedule_info", "Backend of the schedule, and where it is edited; always 1."),
    Gauge(
        "hypemand_schedule_enabled",
        "Whether the schedule runs (1) or is switched off (0).",
        lambda s: s.schedule.settings.enabled,
    ),
    Gauge(
        "hypemand_schedule_interval_seconds",
        "Time from one run of the schedule to the next.",
        lambda s: s.schedule.interval.total_seconds(),
    ),
    Gauge(
        "hypemand_schedule_age_seconds",
        "Time since the schedule was made.",
        lambda s: s.since(s.schedule.created_at),
    ),
    Gauge(
        "hypemand_next_run_seconds",
        "Time until the next run; negative while one that is due has not begun. Missing where the schedule is off.",
        lambda s: (s.schedule.next_run_at - s.now).total_seconds() if s.schedule.settings.enabled else None,
    ),
    Gauge(
        "hypemand_last_run_timestamp_seconds",
        "When the last run began, skipped ones aside.",
        lambda s: s.schedule.last_run_at.timestamp() if s.schedule.last_run_at else None,
    ),
    Gauge(
        "hypemand_last_run_failed",
        "Whether the last run failed, was interrupted or is not settled (1), or succeeded (0).",
        lambda s: s.last_failed,
    ),
    Gauge(
        "hypemand_last_run_lateness_seconds",
        "How long after its due time the last run began.",
        lambda s: max(0.0, s.last_run.late_s) if s.last_run else None,
    ),
    Gauge(
        "hypemand_last_run_freeze_seconds",
        "How long the guest stood still in the last run. Missing where it did not.",
        lambda s: s.last_run.freeze_s if s.last_run else None,
    ),
    Gauge(
        "hypemand_freeze_budget_seconds",
        "How long the guest may stand still: max_freeze.",
        lambda s: s.max_freeze_s,
    ),
    Gauge(
        "hypemand_last_good_snapshot_timestamp_seconds",
        "When the last good snapshot was made. Missing where there is none yet.",
        lambda s: s.last_good_at.timestamp() if s.last_good_at else None,
    ),
    Gauge(
        "hypemand_last_good_snapshot_age_seconds",
        "Time since the last good snapshot was made. Missing where there is none yet.",
        lambda s: s.since(s.last_good_at),
    ),
    Gauge(
        "hypemand_snapshot_stale_after_seconds",
        "How old the last good snapshot may become: two intervals and the schedule's jitter.",
        lambda s: s.stale_after_s,
    ),
    Gauge(
        "hypemand_snapshots_kept",
        "Scheduled snapshots that there are. Missing where the backend could not tell.",
        lambda s: None if s.snapshots is None else len(s.snapshots),
    ),
    Gauge(
        "hypemand_snapshots_kept_bytes",
        "Size of the scheduled snapshots that there are. Missing where the backend could not tell.",
        lambda s: None if s.snapshots is None else sum(snapshot.size_bytes for snapshot in s.snapshots),
    ),
    Counter(
        "hypemand_runs_total",
        "Runs that are over, by how they ended and why they began.",
        lambda s: ((key, number) for key, number in s.tally.runs.items()),
        ("outcome", "trigger"),
    ),
    Counter(
        "hypemand_missed_slots_total",
        "Due times that were passed over, as hypemand was down or could not begin.",
        lambda s: [((), s.tally.missed)],
    ),
    Counter(
        "hypemand_snapshots_pruned_total",
        "Snapshots that were deleted as the retention no longer kept them.",
        lambda s: [((), s.tally.pruned)],
    ),
    Distribution(
        "hypemand_run_lateness_seconds",
        "How long after its due time a scheduled run began.",
        lambda s: s.tally.lateness,
    ),
    Distribution(
        "hypemand_freeze_seconds",
        "How long a guest stood still in a run.",
        lambda s: s.tally.freeze,
    ),
    Distribution(
        "hypemand_capture_seconds",
        "How long it took to make a snapshot, from the freeze until it was whole or given up.",
        lambda s: s.tally.capture,
    ),
)


def of_instances(sights: Sequence[Sight]) -> Iterator[Metric]:
    """What there is for each instance with a schedule: metric by metric, each in parts that follow each other."""
    for family in FAMILIES:
        for part in parts(sights, family.lines):
            yield family.of(part)
