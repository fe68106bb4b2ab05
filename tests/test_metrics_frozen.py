"""Guests that stand still and runs that are open, as the metrics tell them."""

from datetime import timedelta
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from hypemand.backends.base import BackendUnavailable, CaptureFailed
from hypemand.core.model import Freezer
from tests.fakes import FakeBackend, FakeClock
from tests.metered import metered, now_and_then
from tests.prometheus import scrape


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
