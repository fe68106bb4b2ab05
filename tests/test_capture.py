"""From the slot to the published snapshot: who freezes, what the guest need not stand still for, what is warned of."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import trio
from structlog.typing import EventDict
from trio.testing import MockClock

from hypemand.backends.base import BackendUnavailable, CaptureFailed, InvalidState, Room, Status
from hypemand.core.model import Freezer, InstanceId, InstanceState, RunStarted
from hypemand.engine.space import Filesystem
from hypemand.state.files import Disk
from hypemand.state.segments import read_log
from tests.fakes import FakeBackend, FakeClock
from tests.world import World, entry, world

HOUR, MINUTE, DAY = timedelta(hours=1), timedelta(minutes=1), timedelta(days=1)
WEB = InstanceId("web-1")
NOW_HOURLY = entry("web-1", HOUR, first_run="now")


def backend(*guests: str, clock: FakeClock | None = None, **more: Any) -> FakeBackend:
    """One whose captures take a second of freeze, and a minute more while the guest runs."""
    made = FakeBackend(clock or FakeClock(), **{"complete_s": 60.0, **more})
    made.add(*(guests or ("web-1",)))
    return made


def started(w: World) -> list[RunStarted]:
    return read_log(w.state_dir, Disk()).started()


def is_settled(w: World) -> bool:
    """Whether nothing is left of a failed run, and its guest runs."""
    machine = w.backend.machines[WEB]
    left = (machine.saving, machine.unpublished, w.backend.frozen, w.engine.runlog.open_runs)
    return not any(left) and machine.state is InstanceState.RUNNING


async def assert_next_works(w: World, before: list[str]) -> None:
    """The next slot finds everything in order: slots, room, guest."""
    w.backend.faults.clear()
    w.backend.complete_s = 60
    await trio.sleep(3700)
    assert w.outcomes() == [*before, "succeeded"]
    assert w.schedule("web-1").last_error is None
    assert len(w.backend.machines[WEB].snapshots) == 1


# What the guest does not stand still for.


async def test_the_guest_runs_while_its_capture_is_completed(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path, NOW_HOURLY, backends=[fake := backend()]) as w:
        await trio.sleep(30)
        assert (fake.completing, fake.frozen) == (1, set())
        assert fake.machines[WEB].state is InstanceState.RUNNING
        assert (fake.names("web-1"), w.history()) == ([], [])
        await trio.sleep(60)
        (run,) = w.history()
        assert str(run.outcome) == "succeeded"
        assert (run.freeze_s, run.capture_s, run.size_bytes) == (1, 61, fake.whole_bytes)
        assert run.snapshot_name in fake.names("web-1")
        assert [(call, request.run_id) for call, request in fake.requests] == [
            ("make_ready", run.run_id),
            ("pause", run.run_id),
            ("capture", run.run_id),
        ]
        assert fake.requests[0][1] == fake.requests[1][1] == fake.requests[2][1]
        assert fake.requests[0][1].freezes is Freezer.ENGINE


async def test_completing_holds_up_its_own_backend_and_no_other(tmp_path: Path, autojump_clock: MockClock) -> None:
    clock = FakeClock()
    slow = backend("s-1", "s-2", clock=clock, name="slow", complete_s=300.0)
    quick = backend("q-1", clock=clock, name="quick", complete_s=None)
    entries = [entry(name, HOUR, first_run="now", backend="slow") for name in ("s-1", "s-2")]
    entries.append(entry("q-1", MINUTE, backend="quick"))
    async with world(tmp_path, *entries, backends=[slow, quick], clock=clock, concurrency=1) as w:
        await trio.sleep(90)
        assert w.outcomes() == w.outcomes("q-1") == ["succeeded"]
        assert slow.completing == len([1 for _, call, _ in slow.calls if call == "capture"]) == 1
        await trio.sleep(600)
        assert w.outcomes("s-1") == w.outcomes("s-2") == ["succeeded"]
        assert slow.most_completing == 1


async def test_room_that_a_completion_fills_is_not_counted_twice(tmp_path: Path, autojump_clock: MockClock) -> None:
    clock = FakeClock()
    slow = backend("s-1", clock=clock, name="slow", complete_s=900.0)
    quick = backend("q-1", clock=clock, name="quick", complete_s=None)
    entries = [entry("s-1", DAY, first_run="now", backend="slow"), entry("q-1", 10 * MINUTE, backend="quick")]
    async with world(tmp_path, *entries, backends=[slow, quick], clock=clock) as w:
        w.room.free_bytes = 150
        await trio.sleep(700)
        assert (slow.completing, w.outcomes("q-1")) == (1, ["succeeded"])
        await trio.sleep(600)
        assert (w.outcomes("s-1"), w.outcomes("q-1")) == (["succeeded"], ["succeeded", "succeeded"])


async def test_a_publish_that_hangs_holds_neither_slot_nor_room(tmp_path: Path, autojump_clock: MockClock) -> None:
    fake = backend("web-1", "web-2", complete_s=1.0)
    fake.fail("publish", "web-1")
    entries = [entry("web-1", DAY, first_run="now"), entry("web-2", 10 * MINUTE)]
    async with world(tmp_path, *entries, backends=[fake], concurrency=1) as w:
        w.room.free_bytes = 100
        await trio.sleep(900)
        assert (w.outcomes("web-1"), w.outcomes("web-2")) == ([], ["succeeded"])


async def test_a_thaw_that_has_to_be_tried_again_holds_up_no_other_guest(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    fake = backend("web-1", "web-2", complete_s=1.0)
    fake.fail("resume", "web-1", BackendUnavailable("busy"))
    entries = [entry("web-1", DAY, first_run="now"), entry("web-2", MINUTE)]
    async with world(tmp_path, *entries, backends=[fake], concurrency=1) as w:
        await trio.sleep(90)
        assert (w.outcomes("web-1"), w.outcomes("web-2")) == ([], ["succeeded"])
        assert fake.frozen == {WEB}
        fake.heal("resume", "web-1")
        await trio.sleep(10)
        assert w.outcomes("web-1") == ["succeeded"]
        assert fake.frozen == set()


async def test_a_slot_that_comes_due_during_a_completion_is_skipped(tmp_path: Path, autojump_clock: MockClock) -> None:
    fake = backend(complete_s=90.0)
    async with world(tmp_path, entry("web-1", MINUTE, first_run="now"), backends=[fake]) as w:
        await trio.sleep(100)
        assert w.outcomes() == ["skipped", "succeeded"]
        assert "still going" in (w.history()[0].error or "")


# A completion that goes wrong.


async def test_a_completion_that_fails_is_settled_and_the_guest_runs(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path, NOW_HOURLY, backends=[fake := backend()]) as w:
        fake.fail("complete", "web-1", CaptureFailed("the memory could not be saved"))
        await trio.sleep(30)
        (run,) = w.history()
        assert (str(run.outcome), run.error) == ("failed", "the memory could not be saved")
        assert (run.snapshot_id, run.freeze_s, run.capture_s) == (None, 1, 1)
        assert fake.times("publish", "web-1") == []
        assert len(fake.times("settle", "web-1")) == 1
        assert is_settled(w)
        await assert_next_works(w, ["failed"])


async def test_a_bug_in_a_completion_is_settled_and_the_guest_runs(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path, NOW_HOURLY, backends=[fake := backend()]) as w:
        fake.fail("complete", "web-1", ZeroDivisionError("oops"))
        await trio.sleep(30)
        assert w.outcomes() == ["failed"]
        assert "internal error: ZeroDivisionError" in (w.schedule("web-1").last_error or "")
        assert is_settled(w)
        await assert_next_works(w, ["failed"])


async def test_a_completion_that_hangs_ends_with_the_time_of_its_capture(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with world(tmp_path, NOW_HOURLY, backends=[fake := backend()], capture_timeout=5 * MINUTE) as w:
        fake.fail("complete", "web-1")
        await trio.sleep(299)
        assert (fake.completing, w.history()) == (1, [])
        await trio.sleep(10)
        (run,) = w.history()
        assert str(run.outcome) == "failed"
        assert "runs.capture_timeout" in (run.error or "")
        assert "300.0 s" in (run.error or "")
        assert "did not answer" not in (run.error or "")
        assert (run.freeze_s, run.capture_s) == (1, 300)
        assert is_settled(w)
        await assert_next_works(w, ["failed"])


@pytest.mark.parametrize(("complete_s", "outcome"), [(39.0, "succeeded"), (41.0, "failed")])
async def test_what_the_capture_took_is_not_there_for_its_completion(
    tmp_path: Path, autojump_clock: MockClock, complete_s: float, outcome: str
) -> None:
    fake = backend(capture_s=50.0, complete_s=complete_s)
    fake.fail("resume", "web-1", times=1)  # for 10 s, which count too
    limits: dict[str, Any] = {"capture_timeout": timedelta(seconds=100.2), "max_freeze": 5 * MINUTE}
    async with world(tmp_path, NOW_HOURLY, backends=[fake], **limits) as w:
        await trio.sleep(300)
        (run,) = w.history()
        assert str(run.outcome) == outcome
        assert run.capture_s == pytest.approx(99.1 if outcome == "succeeded" else 100.2)
        assert run.freeze_s == pytest.approx(60.1)


async def test_a_capture_that_overran_its_time_with_nothing_left_to_complete_is_whole(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    class NothingLeft(FakeBackend):
        async def complete(self, captured: Any) -> Any:
            return captured

    fake = NothingLeft(FakeClock(), capture_s=50.0)
    fake.add("web-1")
    fake.fail("resume", "web-1", times=1)
    async with world(tmp_path, NOW_HOURLY, backends=[fake], capture_timeout=MINUTE) as w:
        await trio.sleep(300)
        (run,) = w.history()
        assert str(run.outcome) == "succeeded"
        assert run.capture_s == pytest.approx(60.1)


async def test_a_stop_lets_a_completion_finish_within_its_grace(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path, NOW_HOURLY, backends=[backend()]) as w:
        await trio.sleep(55)
        w.engine.stop(10)
        await trio.sleep(30)
        assert w.outcomes() == ["succeeded"]


async def test_a_stop_in_mid_completion_ends_as_interrupted_and_is_settled(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with world(tmp_path, NOW_HOURLY, backends=[fake := backend()]) as w:
        await trio.sleep(20)
        w.engine.stop(10)
        await trio.sleep(9)
        assert fake.completing == 1
        await trio.sleep(2)
        (run,) = w.history()
        assert str(run.outcome) == "interrupted"
        assert "stopped" in (w.schedule("web-1").last_error or "")
        assert (run.snapshot_id, run.freeze_s, run.capture_s) == (None, 1, 30)
        assert is_settled(w)


@pytest.mark.parametrize("end", ["fails", "is stopped", "takes too long"])
async def test_a_pause_by_an_operator_during_a_completion_is_not_undone(
    tmp_path: Path, autojump_clock: MockClock, end: str
) -> None:
    fake = backend(complete_s=600.0, marks=False)
    async with world(tmp_path, NOW_HOURLY, backends=[fake], capture_timeout=2 * MINUTE) as w:
        if end == "fails":
            fake.fail("publish", "web-1", BackendUnavailable("disk full"))
            fake.complete_s = 60.0
        await trio.sleep(30)
        assert fake.completing == 1
        fake.machines[WEB].state = InstanceState.PAUSED
        if end == "is stopped":
            w.engine.stop(10)
        await trio.sleep(180)
        assert w.outcomes() == ["interrupted" if end == "is stopped" else "failed"]
        assert len(fake.times("settle", "web-1")) == 1
        assert len(fake.times("resume", "web-1")) == 1, "after its own freeze, before the operator's"
        assert fake.machines[WEB].state is InstanceState.PAUSED


async def test_what_cannot_be_settled_in_time_is_handed_over_with_all_that_is_known(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with world(tmp_path, NOW_HOURLY, backends=[fake := backend(warnings=("slower",))]) as w:
        fake.fail("complete", "web-1", CaptureFailed("no memory"))
        fake.fail("settle", "web-1", times=2)
        await trio.sleep(15)
        assert (w.history(), len(w.engine.runlog.open_runs)) == ([], 1)
        await trio.sleep(30)
        (run,) = w.history()
        assert (str(run.outcome), run.freeze_s, run.warnings) == ("interrupted", 1, ("slower",))
        assert "no memory" in (run.error or "")
        assert is_settled(w)
        assert w.engine.recovery.left_open == {}


# Who freezes.


async def test_a_guest_that_the_hypervisor_freezes_this_time_is_never_paused(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    fake = backend(prepared_as=Freezer.HYPERVISOR, capture_s=7.0, complete_s=None, abortable=True)
    async with world(tmp_path, NOW_HOURLY, backends=[fake], max_freeze=timedelta(seconds=5)) as w:
        await trio.sleep(60)
        (run,) = w.history()
        assert (str(run.outcome), run.freeze_s) == ("succeeded", 7)
        assert fake.times("pause", "web-1") == fake.times("resume", "web-1") == []
        assert [line.freezes for line in started(w)] == [Freezer.HYPERVISOR]
        assert b'"freezes":"hypervisor"' in (tmp_path / "runs.jsonl").read_bytes()
        assert [(call, request.freezes) for call, request in fake.requests] == [("capture", Freezer.HYPERVISOR)]


async def test_a_guest_that_the_engine_freezes_this_time_is_paused(tmp_path: Path, autojump_clock: MockClock) -> None:
    fake = backend(freezes=Freezer.HYPERVISOR, prepared_as=Freezer.ENGINE)
    async with world(tmp_path, NOW_HOURLY, backends=[fake]) as w:
        await trio.sleep(90)
        assert w.outcomes() == ["succeeded"]
        assert len(fake.times("pause", "web-1")) == len(fake.times("resume", "web-1")) == 1
        assert [line.freezes for line in started(w)] == [Freezer.ENGINE]


@pytest.mark.parametrize("state", [InstanceState.STANDBY, InstanceState.STOPPED])
@pytest.mark.parametrize("named", Freezer)
async def test_a_guest_that_does_not_run_is_frozen_by_nobody_whatever_the_backend_says(
    tmp_path: Path, autojump_clock: MockClock, state: InstanceState, named: Freezer
) -> None:
    fake = backend(prepared_as=named)
    fake.machines[WEB].state = state
    async with world(tmp_path, NOW_HOURLY, backends=[fake]) as w:
        await trio.sleep(90)
        assert [(str(run.outcome), run.freeze_s) for run in w.history()] == [("succeeded", None)]
        assert [line.freezes for line in started(w)] == [None]
        assert [(call, request.freezes) for call, request in fake.requests] == [("capture", None)]


@pytest.mark.parametrize(
    ("measured", "freeze_s"),
    [
        ({}, 1),
        ({"measured_s": 0.25}, 0.25),
        ({"measured_late_s": 0.5}, 0.5),
        ({"measured_s": 0.25, "measured_late_s": 0.5}, 0.5),
    ],
)
async def test_a_freeze_that_the_hypervisor_measured_is_the_one_that_counts(
    tmp_path: Path, autojump_clock: MockClock, measured: dict[str, Any], freeze_s: float
) -> None:
    async with world(tmp_path, NOW_HOURLY, backends=[backend(**measured)]) as w:
        await trio.sleep(90)
        assert [(str(run.outcome), run.freeze_s) for run in w.history()] == [("succeeded", freeze_s)]


async def test_a_measured_freeze_is_told_of_a_capture_that_failed_later(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with world(tmp_path, NOW_HOURLY, backends=[fake := backend(measured_s=0.25)]) as w:
        fake.fail("complete", "web-1", CaptureFailed("x"))
        await trio.sleep(90)
        assert [(str(run.outcome), run.freeze_s) for run in w.history()] == [("failed", 0.25)]


async def test_a_pause_that_was_refused_is_not_undone_and_is_no_freeze(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with world(tmp_path, NOW_HOURLY, backends=[fake := backend()]) as w:
        fake.fail("pause", "web-1", CaptureFailed("no room for the memory"))
        await trio.sleep(90)
        (run,) = w.history()
        assert (str(run.outcome), run.error, run.freeze_s) == ("failed", "no room for the memory", None)
        assert fake.times("resume", "web-1") == []
        assert len(fake.times("settle", "web-1")) == 1
        assert is_settled(w)
        await assert_next_works(w, ["failed"])


@pytest.mark.parametrize("marks", [True, False])
async def test_an_operator_who_pauses_at_the_last_moment_is_not_overruled_where_that_can_be_told(
    tmp_path: Path, autojump_clock: MockClock, *, marks: bool
) -> None:
    class PausedMeanwhile(FakeBackend):
        async def state(self, instance: InstanceId) -> Status:
            status = await super().state(instance)
            if started(w):
                self.machines[instance].state = InstanceState.PAUSED
            return status

    fake = PausedMeanwhile(FakeClock(), marks=marks)
    fake.add("web-1")
    async with world(tmp_path, entry("web-1", MINUTE), backends=[fake]) as w:
        await trio.sleep(90)
        assert w.outcomes() == ["failed" if marks else "succeeded"]
        assert (fake.machines[WEB].state is InstanceState.PAUSED) is marks
        assert bool(fake.times("resume", "web-1")) is not marks
        assert ("somebody else" in (w.history()[0].error or "")) is marks


async def test_an_instance_that_stopped_at_the_last_moment_is_left_alone(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with world(tmp_path, NOW_HOURLY, backends=[fake := backend()]) as w:
        fake.fail("pause", "web-1", InvalidState("neither running nor paused"), times=1)
        await trio.sleep(90)
        assert w.outcomes() == ["failed"]
        assert fake.times("resume", "web-1") == []


# What is warned of.


def warned(heard: list[EventDict]) -> list[EventDict]:
    return [line for line in heard if line["event"] == "capture with a warning"]


async def test_warnings_are_logged_once_and_recorded_and_are_no_error(
    tmp_path: Path, autojump_clock: MockClock, heard_log: list[EventDict]
) -> None:
    fake = backend(warnings=("frozen for its memory", "twice", "twice"), captured_warnings=("twice", "no agent"))
    fake.completed_warnings = ("no agent", "and late")
    async with world(tmp_path, NOW_HOURLY, backends=[fake]) as w:
        await trio.sleep(90)
        (run,) = w.history()
        assert (str(run.outcome), run.error) == ("succeeded", None)
        assert run.warnings == ("frozen for its memory", "twice", "no agent", "and late")
        assert w.schedule("web-1").last_error is None
        assert [line["warning"] for line in warned(heard_log)] == [*run.warnings]
        for line in warned(heard_log):
            assert (line["log_level"], line["instance_id"], line["run_id"]) == ("warning", WEB, run.run_id)
        (taken,) = [line for line in heard_log if line["event"] == "snapshot taken"]
        assert taken["log_level"] == "info"
        fake.warnings = fake.captured_warnings = fake.completed_warnings = ()
        await trio.sleep(3600)
        assert w.history()[-1].warnings == ()


async def test_a_run_that_fails_keeps_its_warnings_apart_from_its_error(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    fake = backend(warnings=("before",), captured_warnings=("after",))
    fake.fail("complete", "web-1", CaptureFailed("no memory"))
    async with world(tmp_path, NOW_HOURLY, backends=[fake]) as w:
        await trio.sleep(90)
        (run,) = w.history()
        assert (run.error, run.warnings) == ("no memory", ("before", "after"))
        assert w.schedule("web-1").last_error == "no memory"


async def test_a_preparation_that_is_repeated_doubles_no_warning_and_keeps_none_that_is_over(
    tmp_path: Path, autojump_clock: MockClock, heard_log: list[EventDict]
) -> None:
    fake = backend(warnings=("over soon", "stays"))
    async with world(tmp_path, entry("web-1", DAY, first_run="now"), backends=[fake]) as w:
        w.room.hangs = 2
        await trio.sleep(15)
        fake.warnings = ("stays", "came later")
        await trio.sleep(600)
        assert len(fake.times("prepare", "web-1")) == 3
        (run,) = w.history()
        assert (str(run.outcome), run.warnings) == ("succeeded", ("stays", "came later"))
        assert [line["warning"] for line in warned(heard_log)] == ["over soon", "stays", "came later"]


# What is made ready before the freeze.


async def test_the_freeze_budget_begins_when_all_is_ready(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path, NOW_HOURLY, backends=[fake := backend(make_ready_s=300)], max_freeze=HOUR / 60) as w:
        await trio.sleep(299)
        assert fake.frozen == set()
        await trio.sleep(300)
        (run,) = w.history()
        assert (str(run.outcome), run.freeze_s) == ("succeeded", 1)


@pytest.mark.parametrize("error", [CaptureFailed("no room"), BackendUnavailable("cut"), RuntimeError("a bug")])
async def test_what_cannot_be_made_ready_freezes_nobody_and_is_settled(
    tmp_path: Path, autojump_clock: MockClock, error: Exception
) -> None:
    fake = backend()
    fake.fail("make_ready", "web-1", error)
    async with world(tmp_path, NOW_HOURLY, backends=[fake]) as w:
        await trio.sleep(60)
        (run,) = w.history()
        assert (str(run.outcome), run.freeze_s) == ("failed", None)
        assert str(error) in (run.error or "")
        assert (fake.times("pause", "web-1"), fake.times("resume", "web-1")) == ([], [])
        assert len(fake.times("settle", "web-1")) == 1
        await assert_next_works(w, ["failed"])


async def test_making_ready_that_hangs_ends_with_the_time_of_its_capture(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    fake = backend()
    fake.fail("make_ready", "web-1")
    async with world(tmp_path, NOW_HOURLY, backends=[fake], capture_timeout=HOUR / 2) as w:
        await trio.sleep(1900)
        (run,) = w.history()
        assert "could not be made ready within runs.capture_timeout (1800 s)" in (run.error or "")
        assert fake.times("pause", "web-1") == []
        await assert_next_works(w, ["failed"])


# Room.


async def test_every_filesystem_must_have_room_before_any_freeze(tmp_path: Path, autojump_clock: MockClock) -> None:
    memory, disk, more = Path("/memory"), Path("/images/a"), Path("/images/b")
    fake = backend(rooms=(Room(memory, 500), Room(disk, 40), Room(more, 60)))
    async with world(tmp_path, NOW_HOURLY, backends=[fake], min_free=10) as w:
        images = Filesystem(2, 109)
        w.room.others = {memory: Filesystem(3, 10**6), disk: images, more: images}
        await trio.sleep(60)
        (run,) = w.history()
        assert str(run.outcome) == "failed"
        assert "too little room at /images/a and /images/b: 109 B free, the capture needs 100 B" in (run.error or "")
        assert (fake.requests, started(w)) == ([], [])
        images = Filesystem(2, 110)
        w.room.others = {memory: Filesystem(3, 510), disk: images, more: images}
        await assert_next_works(w, ["failed"])


async def test_a_backend_that_knows_of_no_room_is_not_checked(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path, NOW_HOURLY, backends=[backend(rooms=())], min_free=10**9) as w:
        w.room.free_bytes = 0
        await trio.sleep(90)
        assert w.outcomes() == ["succeeded"]
