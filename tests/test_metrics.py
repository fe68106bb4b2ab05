"""The metrics, in virtual time: what they say of runs, freezes and snapshots, and for whom they say nothing."""

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from attrs import evolve
from starlette.applications import Starlette
from trio.testing import MockClock

from hypemand.backends.base import BackendUnavailable, CaptureFailed
from hypemand.config import RetentionEntry, ScheduleEntry
from hypemand.core.model import Freezer, InstanceId, InstanceState
from hypemand.engine.requests import Requests, SetSchedule
from hypemand.surface.metrics import Metrics
from tests.fakes import FakeBackend, FakeClock
from tests.prometheus import OPENMETRICS, Page, scrape
from tests.world import World, entry, world

HOUR = timedelta(hours=1)
SOON = 7.0
"""Until what begins at once is over."""


@asynccontextmanager
async def metered(tmp_path: Path, *entries: ScheduleEntry, **more: Any) -> AsyncIterator[tuple[World, Metrics]]:
    """A world with metrics, as the daemon has them."""
    async with world(tmp_path, *entries, serve=False, **more) as made:
        metrics = Metrics(made.engine)
        with made.engine.events.heard_by(metrics.heard):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(made.engine.serve)
                nursery.start_soon(metrics.keep_counting)
                yield made, metrics
                nursery.cancel_scope.cancel()


def now_and_then(instance: str = "web-1", **more: Any) -> ScheduleEntry:
    """An entry whose first run is at once, and the next in an hour."""
    return entry(instance, HOUR, first_run="now", **more)


async def test_runs_are_counted_by_how_they_ended_and_why_they_began(tmp_path: Path, autojump_clock: MockClock) -> None:
    long = timedelta(hours=3)
    async with metered(tmp_path, now_and_then(), capture_timeout=long, max_freeze=long) as (made, metrics):
        await trio.sleep(SOON)
        assert await made.engine.scheduler.begin_now(made.schedule("web-1")).ended() is not None
        made.backend.fail("capture", "web-1", CaptureFailed("no space"), times=1)
        await trio.sleep(3600)
        made.backend.capture_s = 2 * 3600.0
        await trio.sleep(2 * 3600)
        page = await scrape(metrics)
    assert page.value("hypemand_runs_total", "web-1", outcome="succeeded", trigger="schedule") == 1
    assert page.value("hypemand_runs_total", "web-1", outcome="succeeded", trigger="manual") == 1
    assert page.value("hypemand_runs_total", "web-1", outcome="failed", trigger="schedule") == 1
    assert page.value("hypemand_runs_total", "web-1", outcome="skipped", trigger="schedule") == 1
    assert page.value("hypemand_runs_total", "web-1", outcome="interrupted", trigger="schedule") == 0
    assert page.value("hypemand_runs_under_way") == 1
    assert page.value("hypemand_last_run_failed", "web-1") == 1
    assert page.value("hypemand_last_run_lateness_seconds", "web-1") == 0


async def test_lateness_freeze_and_capture_are_counted_in_buckets(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with metered(tmp_path, now_and_then()) as (made, metrics):
        made.backend.capture_s = 3.0
        made.backend.fail("state", "web-1", BackendUnavailable("no answer"), times=1)  # the first try, and 60 s later
        await trio.sleep(70)
        page = await scrape(metrics)
    for name, value, below, above in (
        ("hypemand_run_lateness_seconds", 60.0, "30.0", "300.0"),
        ("hypemand_freeze_seconds", 3.0, "1.0", "5.0"),
        ("hypemand_capture_seconds", 3.0, "1.0", "5.0"),
    ):
        assert page.value(f"{name}_sum", "web-1") == value
        assert page.value(f"{name}_count", "web-1") == 1
        assert page.value(f"{name}_bucket", "web-1", le=below) == 0
        assert page.value(f"{name}_bucket", "web-1", le=above) == 1
        assert page.value(f"{name}_bucket", "web-1", le="+Inf") == 1
    assert page.value("hypemand_last_run_lateness_seconds", "web-1") == 60.0
    assert page.value("hypemand_last_run_freeze_seconds", "web-1") == 3.0


async def test_clock_set_back_before_a_run_makes_no_sum_fall(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with metered(tmp_path, now_and_then()) as (made, metrics):
        await trio.sleep(SOON)
        before = await scrape(metrics)
        finished = made.history()[0]
        await made.engine.recorder.finished(evolve(finished, run_id="r9", late_s=-100.0, freeze_s=-1.0))
        after = await scrape(metrics)
    for name in ("hypemand_run_lateness_seconds", "hypemand_freeze_seconds"):
        assert after.value(f"{name}_count", "web-1") == 2
        assert (after.value(f"{name}_sum", "web-1") or 0) >= (before.value(f"{name}_sum", "web-1") or 0)
    assert after.value("hypemand_last_run_lateness_seconds", "web-1") == 0


async def test_clock_set_back_makes_no_age_negative(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with metered(tmp_path, now_and_then()) as (made, metrics):
        await trio.sleep(SOON)
        made.clock.jump(timedelta(hours=-2))
        page = await scrape(metrics)
    assert page.value("hypemand_last_good_snapshot_age_seconds", "web-1") == 0
    assert page.value("hypemand_schedule_age_seconds", "web-1") == 0


async def test_a_success_with_something_to_tell_is_no_failure(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with metered(tmp_path, now_and_then()) as (made, metrics):
        made.backend.fail("list_snapshots", "web-1", BackendUnavailable("no answer"))
        await trio.sleep(SOON)
        assert made.schedule("web-1").last_error is not None
        page = await scrape(metrics)
    assert page.value("hypemand_last_run_failed", "web-1") == 0


async def test_an_instance_that_goes_away_takes_all_its_series_along(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with metered(tmp_path, now_and_then(), now_and_then("web-2")) as (made, metrics):
        await trio.sleep(SOON)
        before = await scrape(metrics)
        await made.apply(now_and_then("web-2"))
        without = await scrape(metrics)
        await made.apply(now_and_then(), now_and_then("web-2"))
        again = await scrape(metrics)
    assert before.of("web-1") == before.of("web-2") == again.of("web-2")
    assert len(before.of("web-1")) > 25
    assert without.of("web-1") == set()
    assert without.value("hypemand_runs_total", "web-2", outcome="succeeded", trigger="schedule") == 1
    assert again.value("hypemand_runs_total", "web-1", outcome="succeeded", trigger="schedule") == 0
    assert again.value("hypemand_freeze_seconds_count", "web-1") == 0
    assert again.value("hypemand_last_good_snapshot_timestamp_seconds", "web-1") is not None


async def test_a_run_that_outlives_its_schedule_brings_no_series_back(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with metered(tmp_path, now_and_then(), now_and_then("web-2")) as (made, metrics):
        made.backend.capture_s = 20.0
        await trio.sleep(10)
        await made.apply(now_and_then("web-2"))
        during = await scrape(metrics)
        await trio.sleep(30)
        after = await scrape(metrics)
        assert made.outcomes("web-1") == ["succeeded"]
    assert during.of("web-1") == {"hypemand_frozen_seconds", "hypemand_open_runs"}
    assert during.value("hypemand_frozen_seconds", "web-1") == 10
    assert after.of("web-1") == set()


async def test_a_run_that_ends_without_a_schedule_is_not_counted_for_the_next_one(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with metered(tmp_path, now_and_then()) as (made, metrics):
        made.backend.capture_s = 20.0
        await trio.sleep(10)
        await made.apply()
        await trio.sleep(30)
        await made.apply(now_and_then())
        page = await scrape(metrics)
        assert made.outcomes("web-1") == ["succeeded"]
    assert page.value("hypemand_runs_total", "web-1", outcome="succeeded", trigger="schedule") == 0


async def test_slots_that_a_downtime_passed_over_are_counted_once(tmp_path: Path, autojump_clock: MockClock) -> None:
    clock, backend = FakeClock(), None
    async with metered(tmp_path, now_and_then(), clock=clock) as (made, metrics):
        backend = made.backend
        await trio.sleep(SOON)
        before = await scrape(metrics)
    await trio.sleep(5 * 3600)
    async with metered(tmp_path, now_and_then(), clock=clock, backends=[backend], first_id=100) as (made, metrics):
        await trio.sleep(SOON)
        after = await scrape(metrics)
        missed = made.history()[-1].missed
    assert before.value("hypemand_missed_slots_total", "web-1") == 0
    assert after.value("hypemand_missed_slots_total", "web-1") == missed == 4
    assert after.value("hypemand_last_run_lateness_seconds", "web-1") == 4 * 3600 + SOON


async def test_after_a_restart_gauges_are_right_at_once(tmp_path: Path, autojump_clock: MockClock) -> None:
    clock, backend = FakeClock(), None
    async with metered(tmp_path, now_and_then(), clock=clock) as (made, metrics):
        backend = made.backend
        backend.capture_s = 3.0
        await trio.sleep(SOON)
        good_at = made.history()[0].started_at
        backend.fail("capture", "web-1", CaptureFailed("no space"))
        await trio.sleep(3600)
        assert made.outcomes() == ["succeeded", "failed"]
        before = await scrape(metrics)
    async with metered(tmp_path, now_and_then(), clock=clock, backends=[backend], first_id=100) as (made, metrics):
        after = await scrape(metrics)
    assert after.value("hypemand_last_good_snapshot_timestamp_seconds", "web-1") == good_at.timestamp()
    assert after.value("hypemand_last_good_snapshot_age_seconds", "web-1") == 3600 + SOON
    assert after.value("hypemand_last_run_failed", "web-1") == 1
    for name in (
        "last_run_timestamp_seconds",
        "last_run_freeze_seconds",
        "last_run_lateness_seconds",
        "next_run_seconds",
    ):
        assert after.value(f"hypemand_{name}", "web-1") == before.value(f"hypemand_{name}", "web-1") is not None
    assert after.value("hypemand_runs_total", "web-1", outcome="failed", trigger="schedule") == 0


async def test_where_the_run_log_is_lost_schedule_and_backend_tell_of_the_last_good_snapshot(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    clock, backend = FakeClock(), None
    async with metered(tmp_path, now_and_then(), now_and_then("web-2"), clock=clock) as (made, _):
        backend = made.backend
        await trio.sleep(SOON)
        good_at = made.history("web-1")[0].started_at
        backend.fail("capture", "web-1", CaptureFailed("no space"))
        await trio.sleep(3600)
        again_at = made.history("web-2")[1].started_at
    (tmp_path / "runs.jsonl").unlink()
    entries = now_and_then(), now_and_then("web-2")
    async with metered(tmp_path, *entries, clock=clock, backends=[backend], first_id=100) as (made, metrics):
        at_once = await scrape(metrics)
        await trio.sleep(1)
        asked = await scrape(metrics)
    assert at_once.value("hypemand_last_good_snapshot_timestamp_seconds", "web-1") is None
    assert at_once.value("hypemand_last_good_snapshot_timestamp_seconds", "web-2") == again_at.timestamp()
    assert asked.value("hypemand_last_good_snapshot_timestamp_seconds", "web-1") == good_at.timestamp()
    assert asked.value("hypemand_last_run_failed", "web-1") == 1
    assert asked.value("hypemand_last_run_failed", "web-2") == 0


async def test_before_the_first_run_nothing_is_said_of_it(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with metered(tmp_path, entry("web-1", HOUR), entry("off", HOUR, enabled=False)) as (_, metrics):
        await trio.sleep(SOON)
        page = await scrape(metrics)
    told = page.of("web-1")
    assert not {name for name in told if "last_" in name}
    assert page.value("hypemand_snapshots_kept", "web-1") == 0
    assert page.value("hypemand_schedule_age_seconds", "web-1") == SOON
    assert page.value("hypemand_schedules", managed_by="config", enabled="false") == 1
    assert page.value("hypemand_schedule_enabled", "off") == 0
    assert told - page.of("off") == {"hypemand_next_run_seconds"}


async def test_last_good_snapshot_stays_while_a_failure_follows_and_while_the_next_run_prunes(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with metered(tmp_path, now_and_then(max_count=1)) as (made, metrics):
        await trio.sleep(SOON)
        made.backend.fail("list_snapshots", "web-1")  # the next run hangs in its pruning, until it gives up
        await trio.sleep(3600 - SOON + 5)
        assert made.engine.scheduler.running
        pruning = await scrape(metrics)
        await trio.sleep(60)
        made.backend.heal("list_snapshots", "web-1")
        made.backend.fail("capture", "web-1", CaptureFailed("no space"))
        await trio.sleep(3600)
        assert made.outcomes() == ["succeeded", "succeeded", "failed"]
        failed = await scrape(metrics)
    assert (pruning.value("hypemand_last_good_snapshot_age_seconds", "web-1") or -1) >= 0
    second = made.history()[1].started_at.timestamp()
    assert failed.value("hypemand_last_good_snapshot_timestamp_seconds", "web-1") == second


async def test_a_snapshot_counts_as_good_while_its_run_still_deletes_others(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with metered(tmp_path, now_and_then(max_count=1)) as (made, metrics):
        await trio.sleep(SOON)
        made.backend.fail("delete_snapshot", "*")
        await trio.sleep(3600)
        page = await scrape(metrics)
    assert page.value("hypemand_runs_under_way") == 1
    assert page.value("hypemand_last_good_snapshot_age_seconds", "web-1") == SOON


async def test_snapshots_kept_follow_the_runs(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with metered(tmp_path, now_and_then(max_count=2)) as (_, metrics):
        kept = []
        for _ in range(4):
            await trio.sleep(3600)
            page = await scrape(metrics)
            kept.append(
                (page.value("hypemand_snapshots_kept", "web-1"), page.value("hypemand_snapshots_kept_bytes", "web-1"))
            )
    assert kept == [(1, 100), (2, 200), (2, 200), (2, 200)]
    assert page.value("hypemand_snapshots_pruned_total", "web-1") == 2


async def test_snapshots_deleted_by_hand_are_noticed_within_an_hour_or_two(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with metered(tmp_path, entry("web-1", timedelta(days=1), first_run="now")) as (made, metrics):
        await trio.sleep(SOON)
        assert (await scrape(metrics)).value("hypemand_snapshots_kept", "web-1") == 1
        made.backend.machines[InstanceId("web-1")].snapshots.clear()
        await trio.sleep(2 * 3600)
        assert (await scrape(metrics)).value("hypemand_snapshots_kept", "web-1") == 0


async def test_a_hung_hypervisor_holds_no_scrape_up_and_its_snapshots_are_unknown(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    clock = FakeClock()
    hung, well = FakeBackend(clock, "hung"), FakeBackend(clock, "well")
    hung.add("web-1", "web-2")
    well.add("db-1")
    hung.fail("list_snapshots", "*")
    entries = [entry(name, HOUR, backend="hung") for name in ("web-1", "web-2")] + [entry("db-1", HOUR, backend="well")]
    async with metered(tmp_path, *entries, clock=clock, backends=[hung, well]) as (_, metrics):
        await trio.sleep(1)
        before = trio.current_time()
        page = await scrape(metrics)
        assert trio.current_time() == before
        hung.heal("list_snapshots", "*")
        await trio.sleep(120)
        healed = await scrape(metrics)
    assert page.value("hypemand_snapshots_kept", "web-1") is None
    assert page.value("hypemand_snapshots_kept_bytes", "web-2") is None
    assert page.value("hypemand_snapshots_kept", "db-1") == 0
    assert page.value("hypemand_next_run_seconds", "web-1") is not None
    assert healed.value("hypemand_snapshots_kept", "web-1") == healed.value("hypemand_snapshots_kept", "web-2") == 0


async def test_what_a_backend_can_no_longer_tell_is_missing_again(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with metered(tmp_path, entry("web-1", timedelta(days=1), first_run="now")) as (made, metrics):
        await trio.sleep(SOON)
        made.backend.fail("list_snapshots", "web-1", BackendUnavailable("not mounted"))
        await trio.sleep(2 * 3600)
        assert (await scrape(metrics)).value("hypemand_snapshots_kept", "web-1") is None


async def test_snapshots_of_an_instance_that_comes_back_are_asked_for_anew(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with metered(tmp_path, now_and_then()) as (made, metrics):
        await trio.sleep(SOON)
        await made.apply()
        made.backend.machines[InstanceId("web-1")].snapshots.clear()
        await trio.sleep(120)
        await made.apply(now_and_then())
        at_once = await scrape(metrics)
        await trio.sleep(120)
        asked = await scrape(metrics)
    assert at_once.value("hypemand_snapshots_kept", "web-1") is None
    assert asked.value("hypemand_snapshots_kept", "web-1") == 0


async def test_no_hypervisor_is_asked_during_a_run_nor_twice_at_once(tmp_path: Path, autojump_clock: MockClock) -> None:
    names = [f"web-{number}" for number in range(8)]
    clock = FakeClock()
    busy, hung = FakeBackend(clock, "busy"), FakeBackend(clock, "hung")
    busy.add("db-1")
    hung.add(*names)
    hung.fail("list_snapshots", "*")
    entries = [entry(name, timedelta(days=1), backend="hung") for name in names]
    entries.append(entry("db-1", HOUR, first_run="now", backend="busy"))
    async with metered(tmp_path, *entries, clock=clock, backends=[busy, hung]):
        await trio.sleep(SOON)
        busy.capture_s = 100.0
        await trio.sleep(3600 + 200)
    assert not [at for at in busy.times("list_snapshots", "db-1") if 3600 <= at < 3700]
    asked = [at for at, call, _ in hung.calls if call == "list_snapshots"]
    assert len(asked) > 100
    assert min(after - before for before, after in itertools.pairwise(asked)) >= 10


async def test_a_bug_in_a_backend_stops_no_counting(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with metered(tmp_path, entry("web-1", HOUR), entry("web-2", HOUR)) as (made, metrics):
        made.backend.fail("list_snapshots", "web-1", RuntimeError("a bug"), times=1)
        await trio.sleep(1)
        first = await scrape(metrics)
        await trio.sleep(100)
        second = await scrape(metrics)
    assert first.value("hypemand_snapshots_kept", "web-1") is None
    assert first.value("hypemand_snapshots_kept", "web-2") == 0
    assert second.value("hypemand_snapshots_kept", "web-1") == 0


async def test_an_answer_that_comes_after_a_run_has_told_better_is_dropped(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with metered(tmp_path, entry("web-1", HOUR)) as (made, metrics):
        made.backend.fail("list_snapshots", "web-1", times=1)  # the question at the start gets no answer for 10 s
        await trio.sleep(1)
        assert await made.engine.scheduler.begin_now(made.schedule("web-1")).ended() is not None
        await trio.sleep(20)
        assert (await scrape(metrics)).value("hypemand_snapshots_kept", "web-1") == 1


async def test_a_guest_that_stands_still_is_seen_while_it_does(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with metered(tmp_path, now_and_then(max_freeze=timedelta(minutes=1))) as (made, metrics):
        made.backend.capture_s = 30.0
        await trio.sleep(20)
        during = await scrape(metrics)
        await trio.sleep(20)
        after = await scrape(metrics)
    assert during.value("hypemand_frozen_seconds", "web-1") == 20
    assert during.value("hypemand_freeze_budget_seconds", "web-1") == 60
    assert during.value("hypemand_open_runs", "web-1") == 0
    assert after.value("hypemand_frozen_seconds", "web-1") == 0


async def test_a_guest_that_runs_while_its_memory_is_saved_is_not_frozen(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with metered(tmp_path, now_and_then()) as (made, metrics):
        made.backend.complete_s = 30.0
        await trio.sleep(20)
        page = await scrape(metrics)
    assert page.value("hypemand_runs_under_way") == 1
    assert page.value("hypemand_frozen_seconds", "web-1") == 0


async def test_an_open_run_whose_guest_was_resumed_freezes_nobody(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with metered(tmp_path, now_and_then()) as (made, metrics):
        made.backend.fail("capture", "web-1", CaptureFailed("no space"))
        made.backend.fail("settle", "web-1", BackendUnavailable("no answer"))
        await trio.sleep(20)
        page = await scrape(metrics)
    assert page.value("hypemand_open_runs", "web-1") == 1
    assert page.value("hypemand_frozen_seconds", "web-1") == 0


async def test_a_guest_that_can_not_be_resumed_counts_as_frozen_until_its_run_is_settled(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with metered(tmp_path, now_and_then(max_freeze=timedelta(minutes=1))) as (made, metrics):
        for call in ("resume", "settle"):
            made.backend.fail(call, "web-1", BackendUnavailable("no answer"))
        await trio.sleep(300)
        tried = await scrape(metrics)
        await trio.sleep(600)
        left = await scrape(metrics)
        for call in ("resume", "settle"):
            made.backend.heal(call, "web-1")
        await trio.sleep(60)
        settled = await scrape(metrics)
    assert tried.value("hypemand_frozen_seconds", "web-1") == 300
    assert tried.value("hypemand_open_runs", "web-1") == 0
    assert left.value("hypemand_frozen_seconds", "web-1") == 900
    assert left.value("hypemand_open_runs", "web-1") == 1
    assert left.value("hypemand_last_run_failed", "web-1") == 1
    assert settled.value("hypemand_frozen_seconds", "web-1") == settled.value("hypemand_open_runs", "web-1") == 0
    assert settled.value("hypemand_runs_total", "web-1", outcome="interrupted", trigger="schedule") == 1
    assert settled.value("hypemand_last_run_failed", "web-1") == 1


@pytest.mark.parametrize("freezes", Freezer)
async def test_a_run_that_a_crash_left_open_is_seen_after_the_restart(
    tmp_path: Path, autojump_clock: MockClock, freezes: Freezer
) -> None:
    clock = FakeClock()
    backend = FakeBackend(clock, freezes=freezes, capture_s=30.0)
    backend.add("web-1")
    async with metered(tmp_path, now_and_then(), clock=clock, backends=[backend]):
        await trio.sleep(5)
        log = (tmp_path / "runs.jsonl").read_bytes()
    (tmp_path / "runs.jsonl").write_bytes(log)  # as if it had been killed there
    backend.fail("settle", "web-1", BackendUnavailable("no answer"))
    async with metered(tmp_path, now_and_then(), clock=clock, backends=[backend], first_id=100) as (made, metrics):
        page = await scrape(metrics)
        stood_s = (clock.now() - made.engine.runlog.open_runs[0].started_at).total_seconds()
    assert stood_s >= 5
    assert page.value("hypemand_open_runs", "web-1") == 1
    assert page.value("hypemand_frozen_seconds", "web-1") == (stood_s if freezes is Freezer.ENGINE else 0)


async def test_clock_jumps_are_counted_and_pruning_by_age_is_seen_to_wait(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    entries = entry("web-1", HOUR, max_age=timedelta(days=1)), entry("web-2", HOUR, max_count=3)
    async with metered(tmp_path, *entries) as (made, metrics):
        await trio.sleep(SOON)
        before = await scrape(metrics)
        made.clock.jump(timedelta(minutes=-10))
        await trio.sleep(SOON)
        after = await scrape(metrics)
        await trio.sleep(2 * 3600)
        over = await scrape(metrics)
    assert before.value("hypemand_clock_jumps_total") == 0
    assert before.value("hypemand_pruning_by_age_waits") == 0
    assert after.value("hypemand_clock_jumps_total") == 1
    assert after.value("hypemand_pruning_by_age_waits") == 1
    assert over.value("hypemand_clock_jumps_total") == 1
    assert over.value("hypemand_pruning_by_age_waits") == 0


async def test_a_run_that_is_due_and_can_not_begin_is_overdue(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with metered(tmp_path, now_and_then()) as (made, metrics):
        made.backend.fail("state", "web-1", BackendUnavailable("no answer"))
        await trio.sleep(200)
        page = await scrape(metrics)
    assert page.value("hypemand_next_run_seconds", "web-1") == -200


async def test_schedules_are_counted_by_who_manages_them(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with metered(tmp_path, entry("web-1", HOUR), entry("web-2", HOUR, enabled=False)) as (made, metrics):
        made.backend.add("api-1")
        wanted = SetSchedule(interval=HOUR, retention=RetentionEntry(max_count=1))
        await Requests(made.engine).put(InstanceId("api-1"), wanted, "tests")
        page = await scrape(metrics)
        await Requests(made.engine).delete(InstanceId("api-1"), "tests")
        without = await scrape(metrics)
    counts = {
        (managed_by, enabled): page.value("hypemand_schedules", managed_by=managed_by, enabled=enabled)
        for managed_by in ("config", "api")
        for enabled in ("true", "false")
    }
    assert counts == {("config", "true"): 1, ("config", "false"): 1, ("api", "true"): 1, ("api", "false"): 0}
    assert page.value("hypemand_schedule_info", "api-1", backend="fake", managed_by="api") == 1
    assert without.of("api-1") == set()


async def test_a_guest_that_was_not_frozen_has_no_freeze(tmp_path: Path, autojump_clock: MockClock) -> None:
    clock = FakeClock()
    backend = FakeBackend(clock)
    backend.add("web-1", state=InstanceState.STOPPED)
    async with metered(tmp_path, now_and_then(), clock=clock, backends=[backend]) as (_, metrics):
        await trio.sleep(SOON)
        page = await scrape(metrics)
    assert page.value("hypemand_last_run_failed", "web-1") == 0
    assert page.value("hypemand_last_run_freeze_seconds", "web-1") is None
    assert page.value("hypemand_freeze_seconds_count", "web-1") == 0
    assert page.value("hypemand_capture_seconds_count", "web-1") == 1


async def test_others_have_a_turn_all_the_time_while_a_long_page_is_made(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    turns, over = 0, False

    async def take_turns() -> None:
        nonlocal turns
        while not over:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with metered(tmp_path, *(entry(f"web-{number}", HOUR) for number in range(200))) as (_, metrics):
        await trio.sleep(SOON)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(take_turns)
            text, _ = await metrics.page()
            over = True
    lines = text.count(b"\n")
    assert lines > 200 * 50
    assert turns > lines / 120
    assert len(Page.plain(text).families) == len((await scrape_of_none(tmp_path / "none")).families)


async def scrape_of_none(directory: Path) -> Page:
    directory.mkdir()
    async with metered(directory) as (_, metrics):
        return await scrape(metrics)


async def test_both_formats_say_the_same(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with metered(tmp_path, now_and_then(), now_and_then('we"b\\2'.replace('"', "").replace("\\", ""))) as (
        _,
        metrics,
    ):
        await trio.sleep(SOON)
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(Starlette(routes=[metrics.route()])), base_url="http://hypemand"
        ) as client:
            plain = await client.get("/metrics")
            openmetrics = await client.get("/metrics", headers={"accept": f"{OPENMETRICS},text/plain;q=0.5"})
            posted = await client.post("/metrics")
    assert plain.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    first, second = Page.plain(plain.content), Page.openmetrics(openmetrics.content)
    assert first.families.keys() == second.families.keys()
    hypemands = {series: value for series, value in first.samples.items() if series[0].startswith("hypemand_")}
    assert hypemands == {series: second.samples[series] for series in hypemands}
    assert len(hypemands) > 100
    assert openmetrics.content.endswith(b"# EOF\n")
    assert openmetrics.content.count(b"# EOF") == 1
    assert posted.status_code == 405
