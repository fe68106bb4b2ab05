"""What a soak sees, and what it makes of it."""

import json
from pathlib import Path
from typing import Any

from attrs import evolve

from benchmarks.soak_report import Sample, Trend, document, summary, trend
from benchmarks.soak_watch import Tail

SAMPLE = Sample(
    at_s=5.0,
    rss_mb=50.0,
    guard_rss_mb=None,
    descriptors=14,
    threads=4,
    cpu_percent=7.0,
    runs=25,
    wrong=0,
    runs_per_s=5.0,
    late_p50_ms=4.0,
    late_p99_ms=12.0,
    late_max_ms=13.0,
)
MACHINE = {"cpus": 2, "kernel": "6.1", "filesystem": "ext4", "load_before": 0.0}


def told(*samples: Sample, warm_up_s: float = 0.0) -> dict[str, Any]:
    return document(samples, warm_up_s=warm_up_s, schedules=300, machine=MACHINE, wrong=[])


def test_a_trend_is_that_of_the_first_and_the_last_fifth() -> None:
    assert trend([1.0, 2.0, 9.0, 9.0, 9.0, 9.0, 9.0, 50.0, 5.0, 6.0]) == Trend(1.5, 5.5, 50.0)
    assert trend([1.0] * 4) is None


def test_what_grows_shows_and_the_warm_up_does_not_count() -> None:
    samples = [evolve(SAMPLE, at_s=10.0 * number, rss_mb=50.0 + number) for number in range(20)]
    samples[0] = evolve(samples[0], rss_mb=1000.0)
    trends = told(*samples, warm_up_s=95.0)["trends"]
    assert trends["rss_mb"] == {"first": 60.5, "last": 68.5, "most": 69.0}
    assert trends["guard_rss_mb"] is None


def test_runs_that_went_wrong_are_counted_and_told() -> None:
    samples = [evolve(SAMPLE, at_s=60.0), evolve(SAMPLE, at_s=120.0, wrong=3)]
    first, *_ = summary(told(*samples))
    assert first == "300 schedules each minute for 2.0 min: 50 runs, 3 of them failed or skipped"
    assert "3 WENT WRONG" in samples[1].text()
    assert "WRONG" not in samples[0].text()


def test_a_soak_in_which_nothing_ended_is_told_as_well() -> None:
    nothing = evolve(SAMPLE, runs=0, late_p50_ms=None, late_p99_ms=None, late_max_ms=None)
    assert "p99 late -" in nothing.text()
    assert json.loads(json.dumps(told(*[nothing] * 5)))["trends"]["late_p99_ms"] is None


def line(run: str, event: str = "finished") -> bytes:
    return json.dumps({"event": event, "run_id": run}).encode() + b"\n"


def test_each_finished_run_is_seen_once_over_rotations_and_torn_ends(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    tail = Tail(path)

    def new() -> list[str]:
        return [document["run_id"] for document in tail.new()]

    assert new() == []
    path.write_bytes(line("a", "started") + line("a") + line("b")[:9])
    assert new() == ["a"]
    with path.open("ab") as file:
        file.write(line("b")[9:])
    assert new() == ["b"]
    with path.open("ab") as file:
        file.write(line("c"))
    path.rename(tmp_path / "runs.jsonl.1")
    path.write_bytes(line("d", "started") + line("d"))
    assert new() == ["c", "d"]
    assert new() == []
    tail.close()
