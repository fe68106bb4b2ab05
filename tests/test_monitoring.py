"""What docs/monitoring.md promises: the table of metrics, and alerts that fire when they should and not else."""

import re
from datetime import timedelta
from pathlib import Path

import pytest
import trio
from attrs import evolve

from hypemand.backends.base import BackendUnavailable, CaptureFailed
from hypemand.surface.metrics.page import Metrics
from tests.fakes import FakeBackend, FakeClock
from tests.prometheus import Firing, Page, Recording, blocks, documented, find_promtool, promtool, rules, scrape
from tests.virtual_time import VirtualClock
from tests.world import entry, world

MINUTE = timedelta(minutes=1)


async def recorded(metrics: Metrics, recording: Recording, minutes: int) -> list[Page]:
    """A page a minute."""
    pages = []
    for _ in range(minutes):
        await trio.sleep(60)
        pages.append(await scrape(metrics))
        recording.take(pages[-1])
    return pages


async def test_every_metric_is_documented_and_every_documented_one_is_there(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    async with world(tmp_path, entry("web-1", MINUTE)) as made:
        metrics = Metrics(made.engine)
        with made.engine.events.heard_by(metrics.heard):
            await trio.sleep(100)
            page = await scrape(metrics)
    assert {name: family.type for name, family in page.families.items()} == {
        name: kind for name, (kind, _) in documented().items()
    }
    for name, family in page.families.items():
        for sample in family.samples:
            labels = set(sample.labels) - ({"le"} if family.type == "histogram" else set())
            assert labels == documented()[name][1], name
    assert sum(not family.samples for family in page.families.values()) <= 2, "nothing but what a guard tells"


async def test_promtool_finds_nothing_wrong_with_a_page(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    async with world(tmp_path, entry("web-1", MINUTE)) as made:
        metrics = Metrics(made.engine)
        with made.engine.events.heard_by(metrics.heard):
            await trio.sleep(100)
            text, _ = await metrics.page()
    assert len(Page.plain(text).samples) > 50
    assert promtool("check", "metrics", stdin=text) is None


async def test_rules_and_scrape_config_of_the_docs_are_valid_and_name_what_there_is(tmp_path: Path) -> None:
    expressions = re.findall(r"expr: (.*?)\n\s+(?:for|labels):", rules(), re.DOTALL)
    assert len(expressions) == rules().count("- alert:") > 10
    assert set(re.findall(r"\bhypemand_\w+", " ".join(expressions))) <= documented().keys()
    (tmp_path / "rules.yml").write_text(rules())
    assert promtool("check", "rules", tmp_path / "rules.yml") is None
    scrape_config, drop = blocks()[:2]
    (tmp_path / "prometheus.yml").write_text(scrape_config + drop)
    assert promtool("check", "config", "--syntax-only", tmp_path / "prometheus.yml") is None


async def test_promtool_that_is_required_and_missing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("HYPEMAND_REQUIRE_PROMTOOL", raising=False)
    assert find_promtool() is None
    monkeypatch.setenv("HYPEMAND_REQUIRE_PROMTOOL", "1")
    with pytest.raises(pytest.fail.Exception, match="promtool not found"):
        find_promtool()


async def test_alerts_fire_for_runs_that_fail_freeze_for_long_or_begin_late(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    """Instances that go wrong each in its own way, most from their second run on, an hour after the first."""
    hour, budget = timedelta(hours=1), timedelta(seconds=30)
    entries = [entry(name, hour, first_run="now", max_freeze=budget) for name in ("well", "failing", "stuck", "late")]
    entries = [evolve(one, backend="fake") for one in entries]
    entries.append(entry("silent", 4 * hour, first_run="now", backend="fake"))
    entries.append(entry("slow", hour, first_run="now", max_freeze=budget, backend="slow"))
    clock, recording = FakeClock(), Recording()
    backend, slow = FakeBackend(clock), FakeBackend(clock, "slow")
    backend.add("well", "failing", "stuck", "late", "silent")
    slow.add("slow")
    no_answer = BackendUnavailable("no answer")
    backend.fail("state", "silent", no_answer)
    async with world(tmp_path, *entries, clock=clock, backends=[backend, slow]) as made:
        metrics = Metrics(made.engine)
        with made.engine.events.heard_by(metrics.heard):
            early = await recorded(metrics, recording, 30)
            backend.fail("capture", "failing", CaptureFailed("no space"))
            backend.fail("resume", "stuck", no_answer)
            backend.fail("settle", "stuck", no_answer)
            backend.fail("state", "late", no_answer, times=2)
            slow.capture_s = 25.0
            late = await recorded(metrics, recording, 60)
            backend.faults.clear()
            slow.capture_s = 1.0
            healed = await recorded(metrics, recording, 60)
    assert min(page.value("hypemand_next_run_seconds", "silent") or 0 for page in early) < -300
    assert late[-1].value("hypemand_last_run_failed", "failing") == 1
    assert (late[-1].value("hypemand_last_run_lateness_seconds", "late") or 0) > 60
    assert max(page.value("hypemand_frozen_seconds", "stuck") or 0 for page in late) > 31
    assert late[-1].value("hypemand_open_runs", "stuck") == 1
    assert (late[-1].value("hypemand_last_run_freeze_seconds", "slow") or 0) > 24
    assert not any(healed[-1].value("hypemand_last_run_failed", one.instance) for one in entries[:-2])
    failed = [("HypemandRunFailed", "silent"), ("HypemandRunFailed", "failing")]
    slow_ones = [("HypemandFreezeNearBudget", "slow"), ("HypemandGuestFrozen", "stuck")]
    at_last = [("HypemandRunFailed", "stuck"), ("HypemandRunNotSettled", "stuck"), ("HypemandRunLate", "late")]
    all_of_them = [*failed, *slow_ones, *at_last]
    overdue = [("HypemandRunOverdue", "silent")]
    firing: Firing = {4: [], 20: overdue, 62: [*failed, *slow_ones], 88: all_of_them, 149: failed[:1]}
    assert recording.why_not(tmp_path, firing) is None


async def test_alerts_fire_for_instances_without_a_snapshot_of_late_and_for_a_clock_that_jumped(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    quarter, recording = timedelta(minutes=15), Recording()
    names = ("well", "old", "never")
    entries = [entry(name, quarter, first_run="now") for name in names] + [entry("off", quarter, enabled=False)]
    async with world(tmp_path, *entries, before_start=lambda made: _never(made.backend)) as made:
        metrics = Metrics(made.engine)
        with made.engine.events.heard_by(metrics.heard):
            await recorded(metrics, recording, 5)
            made.backend.fail("capture", "old", CaptureFailed("no space"))
            pages = await recorded(metrics, recording, 38)
            made.backend.faults.clear()
            pages += await recorded(metrics, recording, 12)
            made.clock.jump(timedelta(minutes=5))
            pages += await recorded(metrics, recording, 10)
    ages = [page.value("hypemand_last_good_snapshot_age_seconds", "old") or 0 for page in pages]
    limit = pages[0].value("hypemand_snapshot_stale_after_seconds", "old") or 0
    assert max(ages) > limit > 1800 > ages[-1]
    assert pages[-1].value("hypemand_clock_jumps_total") == 1
    failed = [("HypemandRunFailed", name) for name in ("old", "never")]
    too_old = [("HypemandSnapshotTooOld", name) for name in ("old", "never")]
    firing: Firing = {4: failed[1:], 29: failed, 42: [*failed, *too_old], 53: [], 60: [("HypemandClockJumped", None)]}
    assert recording.why_not(tmp_path, firing) is None


def _never(backend: FakeBackend) -> None:
    backend.fail("capture", "never", CaptureFailed("no space"))


async def test_alerts_fire_for_a_daemon_that_is_down_or_in_trouble(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    async with world(tmp_path, entry("web-1", timedelta(hours=1))) as made:
        page = await scrape(Metrics(made.engine))
    recording = Recording()
    for minute in range(50):
        alive, unsaved = not 20 <= minute < 30, 30 <= minute < 40
        trouble = {"hypemand_guard_wanted": 1.0, "hypemand_guard_alive": alive, "hypemand_schedules_unsaved": unsaved}
        recording.take(None if 10 <= minute < 20 else page, **trouble)
    assert page.value("hypemand_schedules_unsaved") == page.value("hypemand_state_files_unreadable") == 0
    down, guard, state = [(f"Hypemand{name}", None) for name in ("Down", "GuardGone", "StateTrouble")]
    firing: Firing = {9: [], 12: [], 16: [down], 21: [], 24: [guard], 32: [], 36: [state], 49: []}
    assert recording.why_not(tmp_path, firing) is None


async def test_alerts_fire_when_pruning_waits_for_more_than_a_day(tmp_path: Path) -> None:
    recording = Recording(every=10)
    for hour in range(30):
        for _ in range(6):
            recording.take(None, up=1.0, hypemand_pruning_by_age_waits=hour < 28)
    assert recording.minutes == 30 * 60
    firing: Firing = {24 * 60: [], 26 * 60: [("HypemandPruningWaits", None)], 29 * 60: []}
    assert recording.why_not(tmp_path, firing) is None


async def test_promtool_tells_of_an_alert_that_should_not_fire(tmp_path: Path) -> None:
    recording = Recording()
    for _ in range(10):
        recording.take(None)
    said = recording.why_not(tmp_path, {9: []})
    assert (said is not None and "HypemandDown" in said) == (find_promtool() is not None)
