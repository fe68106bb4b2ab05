"""The freeze budget: held where a capture can be interrupted, by the record of the guest where it can't."""

from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import evolve
from trio.testing import MockClock

from hypemand.backends.base import BackendUnavailable, Capabilities
from hypemand.core.model import Freezer, InstanceId, InstanceState, Outcome, RunFinished, RunStarted, SnapshotKind
from hypemand.engine.records import FreezeKey, FreezeRecords, LongestFreeze, can_abort, enough_for, why_over_budget
from hypemand.state.codec import encode_line
from hypemand.state.runlog import RunLog
from tests.disks import InlineDisk
from tests.fakes import START, FakeBackend, FakeClock
from tests.test_recovery import started
from tests.test_runlog import finished
from tests.world import entry, world

HOUR, MINUTE = timedelta(hours=1), timedelta(minutes=1)
HALF_A_MINUTE, TWO_MINUTES = timedelta(seconds=30), timedelta(minutes=2)
WEB = InstanceId("web-1")
HOURLY = entry("web-1", HOUR, first_run="now", max_freeze=HALF_A_MINUTE)


def unstoppable(freezes: Freezer = Freezer.ENGINE, *, capture_s: float = 95.2) -> FakeBackend:
    """A hypervisor that freezes its guest for longer than half a minute, and can't be interrupted."""
    fake = FakeBackend(FakeClock(), freezes=freezes, abortable=False, capture_s=capture_s)
    fake.add("web-1")
    return fake


def touched(fake: FakeBackend) -> int:
    """How often the guest was paused or captured."""
    return len(fake.times("pause", "web-1")) + len(fake.times("capture", "web-1"))


@pytest.mark.parametrize("budget_s", [1, 30, 119.5])
async def test_a_capture_that_can_be_interrupted_freezes_no_guest_for_longer_than_its_budget(
    tmp_path: Path, autojump_clock: MockClock, budget_s: float
) -> None:
    budget = timedelta(seconds=budget_s)
    async with world(tmp_path, entry("web-1", HOUR, first_run="now", max_freeze=budget)) as w:
        w.backend.capture_s = 1000
        await trio.sleep(3 * 3600 + 200)
        assert budget_s <= w.backend.longest_frozen <= budget_s + 1
        assert w.backend.machines[WEB].state is InstanceState.RUNNING
        assert w.outcomes() == ["failed"] * 4, "an interrupted capture may be tried again at each slot"
        assert all("freeze budget" in (run.error or "") for run in w.history())
        w.backend.capture_s = 0.5
        await trio.sleep(3600)
        assert w.outcomes()[-1] == "succeeded"


@pytest.mark.parametrize("freezes", list(Freezer))
async def test_a_guest_that_froze_for_longer_than_its_budget_is_not_touched_again(
    tmp_path: Path, autojump_clock: MockClock, freezes: Freezer
) -> None:
    fake = unstoppable(freezes)
    async with world(tmp_path, HOURLY, backends=[fake], clock=fake.clock) as w:
        await trio.sleep(1800)
        assert w.outcomes() == ["succeeded"]
        before = touched(fake)
        fake.capture_s = 1  # what it would take this time is not known beforehand
        await trio.sleep(2 * 3600)
        assert w.outcomes() == ["succeeded", "failed", "failed"]
        assert touched(fake) == before
        assert w.engine.runlog.open_runs == ()
        error = w.schedule("web-1").last_error or ""
        assert "froze for 95.2 s on 2026-03-09, longer than its max_freeze of 30s" in error
        assert "set max_freeze to at least 2m" in error


async def test_a_failure_by_the_record_is_not_tried_again_within_its_run(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    fake = unstoppable()
    async with world(tmp_path, HOURLY, backends=[fake], clock=fake.clock) as w:
        await trio.sleep(3600 + 60)
        assert w.outcomes() == ["succeeded", "failed"]
        assert len(fake.times("prepare", "web-1")) == 2
        assert w.history()[-1].freeze_s is None


async def test_with_a_higher_budget_runs_go_on(tmp_path: Path, autojump_clock: MockClock) -> None:
    fake = unstoppable()
    async with world(tmp_path, HOURLY, backends=[fake], clock=fake.clock) as w:
        await trio.sleep(3600 + 60)
        await w.apply(evolve(HOURLY, max_freeze=timedelta(seconds=95)))
        await trio.sleep(3600)
        assert w.outcomes()[-1] == "failed"
        await w.apply(evolve(HOURLY, max_freeze=TWO_MINUTES))
        await trio.sleep(3600 + 200)
        assert w.outcomes()[-1] == "succeeded"
        assert w.schedule("web-1").last_error is None


@pytest.mark.parametrize(
    ("own", "overall", "outcome"),
    [
        (None, HALF_A_MINUTE, "failed"),
        (None, TWO_MINUTES, "succeeded"),
        (TWO_MINUTES, HALF_A_MINUTE, "succeeded"),
        (HALF_A_MINUTE, TWO_MINUTES, "failed"),
    ],
)
async def test_the_budget_of_a_schedule_wins_over_the_overall_one(
    tmp_path: Path, autojump_clock: MockClock, own: timedelta | None, overall: timedelta, outcome: str
) -> None:
    fake = unstoppable()
    hourly = evolve(HOURLY, max_freeze=own)
    async with world(tmp_path, hourly, backends=[fake], clock=fake.clock, max_freeze=overall) as w:
        await trio.sleep(3600 + 200)
        assert w.outcomes() == ["succeeded", outcome]


async def test_the_record_of_one_guest_holds_up_no_other(tmp_path: Path, autojump_clock: MockClock) -> None:
    fake = unstoppable()
    fake.add("web-2")
    other = entry("web-2", HOUR, max_freeze=HALF_A_MINUTE)
    async with world(tmp_path, HOURLY, other, backends=[fake], clock=fake.clock) as w:
        await trio.sleep(200)
        fake.capture_s = 1
        await trio.sleep(2 * 3600)
        assert w.outcomes("web-1") == ["succeeded", "failed", "failed"]
        assert w.outcomes("web-2") == ["succeeded", "succeeded"]


async def test_the_record_survives_a_restart(tmp_path: Path, autojump_clock: MockClock) -> None:
    fake = unstoppable()
    async with world(tmp_path, HOURLY, backends=[fake], clock=fake.clock):
        await trio.sleep(200)
    before = touched(fake)
    async with world(tmp_path, HOURLY, backends=[fake], clock=fake.clock) as w:
        await trio.sleep(3600)
        assert w.outcomes() == ["succeeded", "failed"]
        assert touched(fake) == before


async def test_a_stopped_guest_has_no_budget(tmp_path: Path, autojump_clock: MockClock) -> None:
    fake = unstoppable()
    async with world(tmp_path, HOURLY, backends=[fake], clock=fake.clock) as w:
        await trio.sleep(200)
        fake.machines[WEB].state = InstanceState.STOPPED
        await trio.sleep(2 * 3600)
        assert w.outcomes() == ["succeeded"] * 3


async def test_a_fallback_that_can_not_be_interrupted_is_held_to_the_budget_by_its_own_record(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    fake = FakeBackend(FakeClock(), abortable=True, prepared_as=Freezer.HYPERVISOR, capture_s=95.2)
    fake.add("web-1")
    async with world(tmp_path, HOURLY, backends=[fake], clock=fake.clock) as w:
        await trio.sleep(3600 + 200)
        assert w.outcomes() == ["succeeded", "failed"]
        fake.prepared_as, fake.capture_s = None, 1
        await trio.sleep(3600)
        assert w.outcomes()[-1] == "succeeded", "frozen by the engine it can be interrupted, whatever its record"
        fake.prepared_as = Freezer.HYPERVISOR
        await trio.sleep(3600)
        assert w.outcomes()[-1] == "failed"


async def test_a_freeze_of_another_kind_does_not_count(tmp_path: Path, autojump_clock: MockClock) -> None:
    fake = unstoppable(Freezer.HYPERVISOR)
    async with world(tmp_path, HOURLY, backends=[fake], clock=fake.clock) as w:
        await trio.sleep(200)
        fake.prepared_as, fake.capture_s = Freezer.ENGINE, 1
        await trio.sleep(3600)
        assert w.outcomes() == ["succeeded", "succeeded"]


async def test_a_freeze_on_another_backend_does_not_count(tmp_path: Path, autojump_clock: MockClock) -> None:
    left = unstoppable()
    right = FakeBackend(left.clock, name="right", abortable=False)
    right.add("web-1")
    here, there = evolve(HOURLY, backend="fake"), evolve(HOURLY, backend="right")
    async with world(tmp_path, here, backends=[left, right], clock=left.clock) as w:
        await trio.sleep(200)
        await w.apply(there)
        await trio.sleep(3600)
        assert w.outcomes() == ["succeeded", "succeeded"]
        await w.apply(here)
        await trio.sleep(3600)
        assert w.outcomes()[-1] == "failed"


async def test_the_freeze_of_a_failed_capture_counts(tmp_path: Path, autojump_clock: MockClock) -> None:
    fake = unstoppable(capture_s=10_000)
    async with world(tmp_path, HOURLY, backends=[fake], clock=fake.clock, capture_timeout=timedelta(seconds=40)) as w:
        await trio.sleep(200)
        assert w.history() == [], "the hypervisor is still at it"
        await trio.sleep(3 * 3600)
        assert w.history()[-1].freeze_s is None
        interrupted = next(run for run in w.history() if run.outcome is Outcome.INTERRUPTED)
        assert interrupted.freeze_s == pytest.approx(40, abs=1)
        assert len(fake.times("pause", "web-1")) == 1
        assert "froze for 40.0 s" in (w.schedule("web-1").last_error or "")


@pytest.mark.parametrize(("answers", "frozen_s"), [("Paused", 40), ("nothing", 40), ("Running", None)])
async def test_a_guest_that_its_hypervisor_kept_frozen_past_the_time_limit_is_not_captured_so_again(
    tmp_path: Path, autojump_clock: MockClock, answers: str, frozen_s: float | None
) -> None:
    fake = unstoppable(Freezer.HYPERVISOR, capture_s=10_000)
    limit = timedelta(seconds=40)
    async with world(tmp_path, HOURLY, backends=[fake], clock=fake.clock, capture_timeout=limit) as w:
        await trio.sleep(10)
        if answers == "Paused":
            fake.machines[WEB].state = InstanceState.PAUSED
        elif answers == "nothing":
            fake.fail("state", "web-1")
        await trio.sleep(60)
        fake.machines[WEB].state = InstanceState.RUNNING
        fake.heal("state", "web-1")
        await trio.sleep(4 * 3600)
        interrupted = next(run for run in w.history() if run.outcome is Outcome.INTERRUPTED)
        assert interrupted.freeze_s == (None if frozen_s is None else pytest.approx(frozen_s, abs=1))
        if frozen_s is not None:
            assert len(fake.times("capture", "web-1")) == 1
            assert "froze for 40.0 s" in (w.schedule("web-1").last_error or "")
        else:
            assert len(fake.times("capture", "web-1")) == 2


async def test_how_long_a_guest_waited_for_a_dead_hypemand_locks_its_schedule_out_of_nothing(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    fake = unstoppable(capture_s=1)
    (tmp_path / "runs.jsonl").write_bytes(encode_line(started(fake)))
    fake.machines[WEB].state, fake.machines[WEB].paused_by_us = InstanceState.PAUSED, True
    async with world(tmp_path, HOURLY, backends=[fake], clock=fake.clock) as w:
        await trio.sleep(3600 + 60)
        (found, *runs) = w.history()
        assert found.found_frozen
        assert found.freeze_s == pytest.approx(300, abs=1)
        assert [str(run.outcome) for run in runs] == ["succeeded", "succeeded"]
        key = FreezeKey(WEB, "fake", Freezer.ENGINE)
        assert w.engine.recorder.freezes.longest_found(key) == LongestFreeze(found.freeze_s or 0, found.started_at)
        assert (w.engine.recorder.freezes.longest(key) or LongestFreeze(9, START)).freeze_s == pytest.approx(1)


async def test_a_guest_that_could_not_be_asked_is_retried_and_then_refused(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    fake = unstoppable()
    async with world(tmp_path, HOURLY, backends=[fake], clock=fake.clock) as w:
        await trio.sleep(1800)
        before = touched(fake)
        fake.fail("prepare", "web-1", BackendUnavailable("busy"), times=1)
        await trio.sleep(1800 + 120)
        assert w.outcomes() == ["succeeded", "failed"]
        assert touched(fake) == before


# The records themselves.


def ran(number: int, freeze_s: float | None, **more: Any) -> Iterable[RunStarted | RunFinished]:
    fake = FakeBackend(FakeClock(began=0.0))
    began = evolve(started(fake), run_id=f"run-{number}", started_at=START + number * HOUR)
    of_start = {key: value for key, value in more.items() if key in ("freezes", "backend", "instance_id")}
    of_end = {key: value for key, value in more.items() if key not in of_start}
    return evolve(began, **of_start), evolve(finished(number), freeze_s=freeze_s, **of_end)


KEY = FreezeKey(WEB, "fake", Freezer.ENGINE)


def records(*runs: Iterable[RunStarted | RunFinished]) -> FreezeRecords:
    made = FreezeRecords()
    made.learn([line for run in runs for line in run])
    return made


def test_the_longest_freeze_counts_whatever_came_of_its_run() -> None:
    for outcome in Outcome:
        known = records(ran(1, 2.0), ran(2, 95.2, outcome=outcome), ran(3, 1.0), ran(4, None))
        assert known.longest(KEY) == LongestFreeze(95.2, START + 2 * HOUR)


def test_freezes_of_others_and_of_other_kinds_do_not_count() -> None:
    known = records(
        ran(1, 9.0, freezes=Freezer.HYPERVISOR),
        ran(2, 9.0, freezes=None),
        ran(3, 9.0, backend="other"),
        ran(4, 9.0, instance_id=InstanceId("web-2")),
        ran(5, 9.0, found_frozen=True),
        ran(6, 1.0),
    )
    assert known.longest(KEY) == LongestFreeze(1.0, START + 6 * HOUR)
    assert known.longest_found(KEY) == LongestFreeze(9.0, START + 5 * HOUR)


def test_a_line_whose_start_is_lost_is_passed_over() -> None:
    lost = records([evolve(finished(1), freeze_s=9.0)])
    assert lost.longest(KEY) is None
    assert lost.latest_key(WEB, "fake") is None


def test_the_latest_kind_of_freeze_is_that_of_the_last_run_that_froze_the_guest() -> None:
    known = records(ran(1, 1.0, freezes=Freezer.HYPERVISOR), ran(2, None), ran(3, None, freezes=None))
    assert known.latest_key(WEB, "fake") == KEY
    assert known.latest_key(WEB, "other") is None


async def test_the_record_is_kept_over_a_rotation_of_the_log(tmp_path: Path) -> None:
    log = RunLog(tmp_path, InlineDisk(), rotate_bytes=2000)
    await log.open()
    for number, freeze_s in enumerate([1.0, 95.2, *[1.0] * 6]):
        for line in ran(number, freeze_s):
            await log.append(line)
    log.close()
    assert len(list(tmp_path.glob("runs.jsonl.*"))) > 1
    known = FreezeRecords()
    again = RunLog(tmp_path, InlineDisk())
    known.learn((await again.open()).lines)
    again.close()
    assert known.longest(KEY) == LongestFreeze(95.2, START + HOUR)


def test_only_a_freeze_by_the_engine_ends_at_the_budget() -> None:
    kinds = frozenset(SnapshotKind)
    assert can_abort(Capabilities(Freezer.ENGINE, abortable=True, kinds=kinds), Freezer.ENGINE)
    assert not can_abort(Capabilities(Freezer.ENGINE, abortable=True, kinds=kinds), Freezer.HYPERVISOR)
    assert not can_abort(Capabilities(Freezer.HYPERVISOR, abortable=True, kinds=kinds), Freezer.HYPERVISOR)
    assert not can_abort(Capabilities(Freezer.ENGINE, abortable=False, kinds=kinds), Freezer.ENGINE)


@pytest.mark.parametrize(("freeze_s", "refused"), [(29.9, False), (30.0, False), (30.1, True)])
def test_a_freeze_as_long_as_the_budget_is_within_it(freeze_s: float, refused: bool) -> None:
    assert (why_over_budget(LongestFreeze(freeze_s, START), HALF_A_MINUTE) is not None) is refused
    assert why_over_budget(None, HALF_A_MINUTE) is None


@pytest.mark.parametrize(
    ("freeze_s", "enough"),
    [(0.2, 1), (1.0, 1), (1.2, 2), (59.5, 60), (60.0, 60), (60.1, 120), (95.2, 120), (7201, 7260)],
)
def test_the_budget_that_is_advised_is_enough_for_the_record(freeze_s: float, enough: int) -> None:
    assert enough_for(freeze_s) == timedelta(seconds=enough)
    assert why_over_budget(LongestFreeze(freeze_s, START), enough_for(freeze_s)) is None
