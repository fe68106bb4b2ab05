"""When the engine holds a freeze lease: acknowledged before each pause, until the guest is known to run."""

from datetime import timedelta
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from hypemand.backends.base import BackendUnavailable, CaptureFailed, InvalidState
from hypemand.core.model import Freezer, InstanceState
from tests.fakes import FakeBackend, FakeClock, FakeLeases
from tests.world import World, entry, world

HOUR, MINUTE = timedelta(hours=1), timedelta(minutes=1)
NOW_HOURLY = entry("web-1", HOUR, first_run="now")


def run_id(w: World) -> str:
    (run,) = w.history()
    return run.run_id


async def test_a_lease_over_the_budget_is_acknowledged_before_the_pause_and_ends_after_the_resume(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    leases = FakeLeases(acknowledge_s=3)
    async with world(tmp_path, NOW_HOURLY, leases=leases, max_freeze=MINUTE) as w:
        await trio.sleep(3.5)
        assert list(leases.held.values()) == [trio.current_time() - 0.5 + 60]
        await trio.sleep(10)
        (opened, _, first), (closed, _, last) = leases.told
        (paused,), (resumed,) = (w.backend.times(call, "web-1") for call in ("pause", "resume"))
        assert opened <= paused < resumed <= closed
        assert first == last == run_id(w)


async def test_without_a_guard_nothing_is_frozen_and_the_run_is_tried_again(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    leases = FakeLeases(missing=True)
    async with world(tmp_path, NOW_HOURLY, leases=leases) as w:
        await trio.sleep(50)
        assert (w.backend.times("pause", "web-1"), w.history()) == ([], [])
        leases.missing = False
        await trio.sleep(30)
        assert w.outcomes() == ["succeeded"]


async def test_a_guard_that_stays_away_fails_the_run_with_the_reason(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path, entry("web-1", MINUTE, first_run="now"), leases=FakeLeases(missing=True)) as w:
        await trio.sleep(30)
        (run,) = w.history()
        assert (str(run.outcome), run.error) == ("failed", "there is no guard")
        assert w.backend.times("pause", "web-1") == []


async def test_a_guard_that_goes_at_the_last_moment_fails_the_run_before_the_pause(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    fake, leases = FakeBackend(FakeClock(), make_ready_s=5), FakeLeases()
    fake.add("web-1")
    async with world(tmp_path, NOW_HOURLY, backends=[fake], leases=leases) as w:
        await trio.sleep(2)
        leases.missing = True
        await trio.sleep(30)
        (run,) = w.history()
        assert (str(run.outcome), run.error, run.freeze_s) == ("failed", "there is no guard", None)
        assert (fake.times("pause", "web-1"), fake.times("resume", "web-1")) == ([], [])


async def test_a_guest_that_does_not_run_or_that_the_hypervisor_freezes_needs_no_lease(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    fake = FakeBackend(FakeClock())
    fake.add("web-1", state=InstanceState.STOPPED)
    by_itself = FakeBackend(FakeClock(), name="other", freezes=Freezer.HYPERVISOR)
    by_itself.add("db-1")
    entries = (
        entry("web-1", HOUR, first_run="now", backend="fake"),
        entry("db-1", HOUR, first_run="now", backend="other"),
    )
    async with world(tmp_path, *entries, backends=[fake, by_itself], leases=FakeLeases(missing=True)) as w:
        await trio.sleep(30)
        assert w.outcomes() == ["succeeded", "succeeded"]
        assert w.leases.told == []


@pytest.mark.parametrize(
    "error", [CaptureFailed("no"), InvalidState("no"), BackendUnavailable("no"), RuntimeError("no")]
)
@pytest.mark.parametrize("call", ["state", "pause", "capture"])
async def test_the_lease_ends_when_the_run_does_whatever_failed(
    tmp_path: Path, autojump_clock: MockClock, call: str, error: Exception
) -> None:
    async with world(tmp_path, entry("web-1", MINUTE, first_run="now")) as w:
        w.backend.fail(call, "web-1", error, times=1)
        await trio.sleep(55)
        assert [str(run.outcome) for run in w.history()] == ["failed"]
        assert w.leases.held == {}


async def test_a_resume_that_fails_keeps_the_lease_until_it_holds(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path, NOW_HOURLY) as w:
        w.backend.fail("resume", "web-1", BackendUnavailable("busy"))
        await trio.sleep(300)
        assert len(w.leases.held) == 1
        w.backend.heal("resume", "web-1")
        await trio.sleep(1)
        assert w.leases.held == {}
        assert w.backend.frozen == set()


async def test_a_guest_that_is_left_to_the_recovery_keeps_its_lease_until_it_is_settled(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with world(tmp_path, NOW_HOURLY, max_freeze=MINUTE) as w:
        w.backend.fail("resume", "web-1", BackendUnavailable("busy"))
        w.backend.fail("settle", "web-1", BackendUnavailable("busy"))
        await trio.sleep(700)
        (lease,) = w.leases.held
        assert [run.run_id for run in w.engine.runlog.open_runs] == [lease]
        w.backend.faults.clear()
        await trio.sleep(60)
        assert (w.leases.held, w.backend.frozen) == ({}, set())
        assert w.outcomes() == ["interrupted"]


async def test_a_pause_that_may_still_take_hold_keeps_its_lease_until_the_run_is_settled(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with world(tmp_path, NOW_HOURLY) as w:
        w.backend.fail("pause", "web-1")
        w.backend.fail("settle", "web-1", BackendUnavailable("busy"), times=3)
        await trio.sleep(12)
        assert w.backend.times("resume", "web-1") != []
        assert len(w.leases.held) == 1
        await trio.sleep(60)
        assert w.leases.held == {}


async def test_a_stop_in_mid_freeze_ends_the_lease_with_the_thaw(tmp_path: Path, autojump_clock: MockClock) -> None:
    fake = FakeBackend(FakeClock(), capture_s=600)
    fake.add("web-1")
    async with world(tmp_path, NOW_HOURLY, backends=[fake]) as w:
        await trio.sleep(5)
        assert len(w.leases.held) == 1
        w.engine.stop(1)
        await trio.sleep(5)
        assert (w.leases.held, fake.frozen) == ({}, set())
