"""The metrics of hypemand as a whole."""

from collections import Counter
from collections.abc import Iterator

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from hypemand import __version__
from hypemand.core.model import ManagedBy
from hypemand.engine.engine import Engine
from hypemand.engine.guarding import Guarding


def of_all(engine: Engine) -> Iterator[Metric]:
    """What there is to tell of *engine*, without asking anybody."""
    build = GaugeMetricFamily("hypemand_build_info", "Version of hypemand; always 1.", labels=["version"])
    build.add_metric([__version__], 1)
    yield build
    yield _schedules(engine)
    for name, text, number in (
        ("runs_under_way", "Runs that have begun and are not over.", len(engine.scheduler.running)),
        ("pruning_by_age_waits", "Schedules that don't prune by age now, as the clock is doubted.", _waiting(engine)),
        ("state_files_unreadable", "State files that can't be read, and are left alone.", len(engine.store.unreadable)),
        ("state_files_set_aside", "Schedules whose files were invalid and set aside.", len(engine.store.set_aside)),
        ("schedules_unsaved", "Schedules in force that are not in their files yet.", len(engine.store.unsaved)),
        ("config_problems", "What the config wants and can't be had as things are.", len(engine.problems)),
    ):
        yield GaugeMetricFamily(f"hypemand_{name}", text, number)
    jumps = "Jumps of the wall clock by more than 30 s."
    yield CounterMetricFamily("hypemand_clock_jumps_total", jumps, engine.watch.jumps)
    yield from _guard(engine)


def _schedules(engine: Engine) -> Metric:
    counts = Counter((s.managed_by, s.settings.enabled) for s in engine.store.schedules.values())
    metric = GaugeMetricFamily("hypemand_schedules", "Schedules.", labels=["managed_by", "enabled"])
    for managed_by in ManagedBy:
        for enabled in (True, False):
            metric.add_metric([managed_by, str(enabled).lower()], counts[managed_by, enabled])
    return metric


def _waiting(engine: Engine) -> int:
    """How many schedules don't prune by age; the clock is asked once for each interval."""
    by_age = Counter(s.interval for s in engine.store.schedules.values() if s.retention.max_age)
    return sum(number for interval, number in by_age.items() if engine.watch.why_age_waits(interval) is not None)


def _guard(engine: Engine) -> Iterator[Metric]:
    """Whether guests are guarded; without samples where the engine can't tell."""
    wanted = GaugeMetricFamily("hypemand_guard_wanted", "Whether there is to be a guard (runs.guard).", labels=[])
    alive = GaugeMetricFamily("hypemand_guard_alive", "Whether there is a guard that answers.", labels=[])
    guarding = engine.recovery.leases
    if isinstance(guarding, Guarding):
        wanted.add_metric([], guarding.wanted)
        alive.add_metric([], guarding.pid is not None)
    yield wanted
    yield alive
