"""The metrics, in virtual time: what they say of runs and schedules, and for whom they say nothing."""

from datetime import timedelta
from pathlib import Path

import httpx
import trio
from attrs import evolve
from starlette.applications import Starlette

from hypemand.backends.base import BackendUnavailable, CaptureFailed
from hypemand.config import RetentionEntry
from hypemand.core.model import InstanceId, InstanceState
from hypemand.engine.changes import SetSchedule
from hypemand.engine.requests import Requests
from tests.fakes import FakeBackend, FakeClock
from tests.metered import HOUR, SOON, metered, now_and_then
from tests.prometheus import OPENMETRICS, Page, scrape
from tests.virtual_time import VirtualClock
from tests.world import entry


async def test_runs_are_counted_by_how_they_ended_and_why_they_began(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
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


async def test_lateness_freeze_and_capture_are_counted_in_buckets(tmp_path: Path, virtual_clock: VirtualClock) -> None:
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


async def test_clock_set_back_before_a_run_makes_no_sum_fall(tmp_path: Path, virtual_clock: VirtualClock) -> None:
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


async def test_clock_set_back_makes_no_age_negative(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    async with metered(tmp_path, now_and_then()) as (made, metrics):
        await trio.sleep(SOON)
        made.clock.jump(timedelta(hours=-2))
        page = await scrape(metrics)
    assert page.value("hypemand_last_good_snapshot_age_seconds", "web-1") == 0
    assert page.value("hypemand_schedule_age_seconds", "web-1") == 0


async def test_a_success_with_something_to_tell_is_no_failure(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    async with metered(tmp_path, now_and_then()) as (made, metrics):
        made.backend.fail("list_snapshots", "web-1", BackendUnavailable("no answer"))
        await trio.sleep(SOON)
        assert made.schedule("web-1").last_error is not None
        page = await scrape(metrics)
    assert page.value("hypemand_last_run_failed", "web-1") == 0


async def test_an_instance_that_goes_away_takes_all_its_series_along(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
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
    tmp_path: Path, virtual_clock: VirtualClock
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
    tmp_path: Path, virtual_clock: VirtualClock
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


async def test_slots_that_a_downtime_passed_over_are_counted_once(tmp_path: Path, virtual_clock: VirtualClock) -> None:
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


async def test_after_a_restart_gauges_are_right_at_once(tmp_path: Path, virtual_clock: VirtualClock) -> None:
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
    tmp_path: Path, virtual_clock: VirtualClock
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


async def test_before_the_first_run_nothing_is_said_of_it(tmp_path: Path, virtual_clock: VirtualClock) -> None:
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
    tmp_path: Path, virtual_clock: VirtualClock
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
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    async with metered(tmp_path, now_and_then(max_count=1)) as (made, metrics):
        await trio.sleep(SOON)
        made.backend.fail("delete_snapshot", "*")
        await trio.sleep(3600)
        page = await scrape(metrics)
    assert page.value("hypemand_runs_under_way") == 1
    assert page.value("hypemand_last_good_snapshot_age_seconds", "web-1") == SOON


async def test_clock_jumps_are_counted_and_pruning_by_age_is_seen_to_wait(
    tmp_path: Path, virtual_clock: VirtualClock
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


async def test_a_run_that_is_due_and_can_not_begin_is_overdue(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    async with metered(tmp_path, now_and_then()) as (made, metrics):
        made.backend.fail("state", "web-1", BackendUnavailable("no answer"))
        await trio.sleep(200)
        page = await scrape(metrics)
    assert page.value("hypemand_next_run_seconds", "web-1") == -200


async def test_schedules_are_counted_by_who_manages_them(tmp_path: Path, virtual_clock: VirtualClock) -> None:
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


async def test_a_guest_that_was_not_frozen_has_no_freeze(tmp_path: Path, virtual_clock: VirtualClock) -> None:
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
    tmp_path: Path, virtual_clock: VirtualClock
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


async def test_both_formats_say_the_same(tmp_path: Path, virtual_clock: VirtualClock) -> None:
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


async def test_who_asks_for_a_format_that_is_none_gets_the_usual_one(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    async with metered(tmp_path) as (_, metrics):
        for accept in (f"{OPENMETRICS.partition(';')[0]}; version=zz", "text/plain; version=;q=", ";=,;"):
            text, content_type = await metrics.page(accept)
            assert content_type.startswith("text/plain; version=0.0.4")
            assert b"hypemand_build_info" in text
