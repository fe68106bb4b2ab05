"""What a soak saw, sample by sample, and what that comes to. Pure."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from attrs import asdict, frozen

from benchmarks.scale.rows import short

_PART = 5
"""What is flat is judged by the first and the last such part of the samples."""


@frozen(kw_only=True)
class Sample:
    """One look, *at_s* seconds after the first moment. Of runs: those that ended since the look before."""

    at_s: float
    rss_mb: float
    guard_rss_mb: float | None
    descriptors: int
    threads: int
    cpu_percent: float
    runs: int
    wrong: int
    runs_per_s: float
    late_p50_ms: float | None
    late_p99_ms: float | None
    late_max_ms: float | None

    def text(self) -> str:
        """In one line."""
        late = "-" if self.late_p99_ms is None else f"{short(self.late_p99_ms)} ms"
        return (
            f"{self.at_s:.0f} s: {self.rss_mb:.1f} MB, {self.descriptors} descriptors, {self.threads} threads,"
            f" {self.cpu_percent:.1f} % of a core, {self.runs_per_s:.1f} runs/s, p99 late {late}"
            + (f", {self.wrong} WENT WRONG" if self.wrong else "")
        )


@frozen
class Trend:
    """The medians of the first and of the last fifth of the samples, and the most of all."""

    first: float
    last: float
    most: float


def trend(values: Sequence[float]) -> Trend | None:
    """That of *values*; None where there are too few to speak of one."""
    part = len(values) // _PART
    if not part:
        return None
    return Trend(median(values[:part]), median(values[-part:]), max(values))


_FIGURES: Mapping[str, tuple[str, Callable[[Sample], float | None]]] = {
    "rss_mb": ("memory of the daemon, MB", lambda s: s.rss_mb),
    "guard_rss_mb": ("memory of the guard, MB", lambda s: s.guard_rss_mb),
    "descriptors": ("descriptors", lambda s: s.descriptors),
    "threads": ("threads", lambda s: s.threads),
    "late_p50_ms": ("late, p50, ms", lambda s: s.late_p50_ms),
    "late_p99_ms": ("late, p99, ms", lambda s: s.late_p99_ms),
    "cpu_percent": ("processor, % of a core", lambda s: s.cpu_percent),
    "runs_per_s": ("runs per second", lambda s: s.runs_per_s),
}


def document(
    samples: Sequence[Sample],
    *,
    warm_up_s: float,
    schedules: int,
    machine: Mapping[str, Any],
    wrong: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Everything as JSON values. Trends are those after *warm_up_s*, where that leaves a look."""
    judged = [sample for sample in samples if sample.at_s >= warm_up_s] or samples
    trends = {}
    for name, (_, get) in _FIGURES.items():
        found = trend([value for sample in judged if (value := get(sample)) is not None])
        trends[name] = None if found is None else asdict(found)
    return {
        "schedules": schedules,
        "machine": dict(machine),
        "seconds": samples[-1].at_s if samples else 0.0,
        "runs": {"ended": sum(sample.runs for sample in samples), "failed": sum(sample.wrong for sample in samples)},
        "went_wrong": list(wrong),
        "trends": trends,
        "samples": [asdict(sample) for sample in samples],
    }


def summary(told: Mapping[str, Any]) -> Iterator[str]:
    """What `document` comes to, for people."""
    machine, runs = told["machine"], told["runs"]
    yield (
        f"{told['schedules']:,} schedules each minute for {told['seconds'] / 60:.1f} min: {runs['ended']:,} runs,"
        f" {runs['failed']:,} of them failed or skipped"
    )
    yield (
        f"{machine['cpus']} CPUs, Linux {machine['kernel']}, {machine['filesystem']},"
        f" load {machine['load_before']:.2f} before"
    )
    yield f"{'':<28}{'first fifth':>14}{'last fifth':>14}{'most':>14}"
    for name, (title, _) in _FIGURES.items():
        found = told["trends"][name]
        if found is not None:
            yield f"{title:<28}" + "".join(f"{short(found[part]):>14}" for part in ("first", "last", "most"))
