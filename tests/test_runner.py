"""One run, with everything that can go wrong: the guest runs at the end, and the record says what happened."""

from datetime import timedelta
from pathlib import Path

import pytest
import trio
from attrs import evolve

from hypemand.backends.base import BackendUnavailable, CaptureFailed, InstanceNotFound
from hypemand.core.model import Freezer, InstanceId, InstanceState, Snapshot, SnapshotKind
from hypemand.state.codec import decode_schedule, encode_line
from hypemand.state.files import Disk
from hypemand.state.segments import read_log
from tests.disks import FaultyDisk
from tests.fakes import START, FakeBackend, FakeClock
from tests.virtual_time import VirtualClock
from tests.world import World, entry, world

HOUR, MINUTE, DAY = timedelta(hours=1), timedelta(minutes=1), timedelta(days=1)
WEB = InstanceId("web-1")


def runs(w: World) -> bool:
    return w.backend.machines[WEB].state is InstanceState.RUNNING and WEB not in w.backend.frozen


def lines_of(w: World) -> list[str]:
    return [type(line).__name__ for line in read_log(w.state_dir, Disk()).lines]


@pytest.mark.parametrize(
    ("state", "kind", "pauses"),
    [
        (InstanceState.RUNNING, SnapshotKind.STANDBY, 1),
        (InstanceState.STANDBY, SnapshotKind.STANDBY, 0),
        (InstanceState.STOPPED, SnapshotKind.STOPPED, 0),
    ],
)
async def test_the_state_decides_the_kind_and_only_a_running_guest_is_paused(
    tmp_path: Path, virtual_clock: VirtualClock, state: InstanceState, kind: SnapshotKind, pauses: int
) -> None:
    clock = FakeClock()
    fake = FakeBackend(clock)
    fake.add("web-1", state=state)
    async with world(tmp_path, entry("web-1", HOUR, first_run="now"), backends=[fake], clock=clock) as w:
        await trio.sleep(60)
        (run,) = w.history()
        assert (str(run.outcome), run.kind) == ("succeeded", kind)
        assert len(fake.times("pause", "web-1")) == len(fake.times("resume", "web-1")) == pauses
        assert (run.freeze_s is not None) == bool(pauses)
        assert fake.machines[WEB].state is state


@pytest.mark.parametrize(
    "state",
    [s for s in InstanceState if s not in (InstanceState.RUNNING, InstanceState.STANDBY, InstanceState.STOPPED)],
)
async def test_any_other_state_fails_the_run_and_nothing_is_resumed(
    tmp_path: Path, virtual_clock: VirtualClock, state: InstanceState
) -> None:
    clock = FakeClock()
    fake = FakeBackend(clock)
    fake.add("web-1", state=state)
    async with world(tmp_path, entry("web-1", HOUR, first_run="now"), backends=[fake], clock=clock) as w:
        await trio.sleep(60)
        assert w.outcomes() == ["failed"]
        error = w.schedule("web-1").last_error
        assert error is not None
        assert str(state) in error
        assert "Running, Standby or Stopped" in error
        assert fake.machines[WEB].state is state
        assert fake.times("resume", "web-1") == []
        assert lines_of(w) == ["RunFinished"]


async def test_the_started_line_is_durable_before_the_freeze(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    clock = FakeClock()
    fake = FakeBackend(clock)
    fake.add("web-1")
    fake.fail("pause", "web-1")
    async with world(tmp_path, entry("web-1", HOUR, first_run="now"), backends=[fake], clock=clock) as w:
        await trio.sleep(1)
        assert fake.times("pause", "web-1")
        (started,) = read_log(w.state_dir, Disk()).started()
        assert started.instance_id == "web-1"
        assert started.next_run_at == START + HOUR
        assert started.connection == fake.connection
        assert started.freezes is Freezer.ENGINE


async def test_without_a_started_line_nothing_is_frozen(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    disk = FaultyDisk()
    async with world(tmp_path, entry("web-1", MINUTE), disk=disk) as w:
        disk.fail("sync")
        await trio.sleep(70)
        assert w.backend.times("pause", "web-1") == []
        disk.heal()
        await trio.sleep(70)
        assert w.outcomes()[-1] == "succeeded"
        assert "failed" in w.outcomes()


async def test_a_failed_capture_leaves_the_guest_running_and_keeps_the_last_snapshot(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    async with world(tmp_path, entry("web-1", HOUR, first_run="now")) as w:
        await trio.sleep(60)
        kept = w.schedule("web-1").last_snapshot_id
        w.backend.fail("capture", "web-1", CaptureFailed("no space on the moon"))
        await trio.sleep(3600)
        assert w.outcomes() == ["succeeded", "failed"]
        schedule = w.schedule("web-1")
        assert schedule.last_error == "no space on the moon"
        assert schedule.last_snapshot_id == kept
        assert runs(w)
        w.backend.heal("capture", "web-1")
        await trio.sleep(3600)
        assert w.schedule("web-1").last_error is None
        assert w.schedule("web-1").last_snapshot_id != kept


async def test_a_hanging_capture_is_aborted_at_its_freeze_budget(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    async with world(tmp_path, entry("web-1", HOUR, first_run="now", max_freeze=timedelta(seconds=20))) as w:
        w.backend.fail("capture", "web-1")
        await trio.sleep(60)
        (run,) = w.history()
        assert str(run.outcome) == "failed"
        assert run.freeze_s == 20
        assert "freeze budget" in (run.error or "")
        assert runs(w)
        assert w.backend.machines[WEB].unpublished == {}


async def test_a_hanging_pause_counts_as_a_freeze_and_is_undone(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    async with world(tmp_path, entry("web-1", HOUR, first_run="now")) as w:
        w.backend.fail("pause", "web-1", times=1)
        await trio.sleep(60)
        assert w.outcomes() == ["failed"]
        assert runs(w)
        assert w.backend.longest_frozen <= 10


async def test_a_resume_that_fails_twice_is_tried_until_it_holds_and_is_told(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    async with world(tmp_path, entry("web-1", HOUR, first_run="now")) as w:
        w.backend.fail("resume", "web-1", BackendUnavailable("monitor cut"), times=2)
        await trio.sleep(60)
        assert runs(w)
        (run,) = w.history()
        assert str(run.outcome) == "succeeded"
        assert "resume failed 2 times before it held: monitor cut" in (w.schedule("web-1").last_error or "")
        assert w.schedule("web-1").last_snapshot_id == run.snapshot_id


async def test_when_capture_and_resume_both_fail_the_error_names_both(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    async with world(tmp_path, entry("web-1", HOUR, first_run="now")) as w:
        w.backend.fail("capture", "web-1", CaptureFailed("disk on fire"))
        w.backend.fail("resume", "web-1", BackendUnavailable("monitor cut"), times=3)
        await trio.sleep(60)
        assert runs(w)
        error = w.schedule("web-1").last_error or ""
        assert "disk on fire" in error
        assert "monitor cut" in error


async def test_a_bug_in_the_backend_still_resumes_the_guest(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    async with world(tmp_path, entry("web-1", HOUR, first_run="now")) as w:
        w.backend.fail("capture", "web-1", ZeroDivisionError("oops"))
        w.backend.fail("resume", "web-1", KeyError("what"), times=2)
        await trio.sleep(60)
        assert runs(w)
        assert w.outcomes() == ["failed"]
        assert "internal error: ZeroDivisionError: oops" in (w.schedule("web-1").last_error or "")
        w.backend.heal("capture", "web-1")
        await trio.sleep(3600)
        assert w.outcomes() == ["failed", "succeeded"]


async def test_a_guest_that_ends_during_its_freeze_needs_no_resume(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    async with world(tmp_path, entry("web-1", HOUR, first_run="now")) as w:
        w.backend.capture_s = 10
        await trio.sleep(5)
        w.backend.machines[WEB].state = InstanceState.SHUTDOWN
        await trio.sleep(60)
        assert len(w.history()) == 1
        assert len(w.backend.times("resume", "web-1")) == 1


async def test_an_instance_that_goes_away_during_its_freeze_ends_the_run(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    async with world(tmp_path, entry("web-1", HOUR, first_run="now")) as w:
        w.backend.capture_s = 10
        await trio.sleep(5)
        w.backend.fail("capture", "web-1", CaptureFailed("gone"))
        w.backend.fail("resume", "web-1", InstanceNotFound("no instance web-1"))
        await trio.sleep(60)
        assert len(w.history()) == 1


async def test_a_stop_in_mid_capture_thaws_records_and_leaves_nothing_partial(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    async with world(tmp_path, entry("web-1", HOUR, first_run="now")) as w:
        w.backend.capture_s = 1000
        await trio.sleep(5)
        assert WEB in w.backend.frozen
        w.engine.stop(10)
        await trio.sleep(30)
        assert runs(w)
        (run,) = w.history()
        assert str(run.outcome) == "interrupted"
        assert run.freeze_s == 15
        assert "stopped" in (w.schedule("web-1").last_error or "")
        assert w.engine.runlog.open_runs == ()
        assert w.backend.machines[WEB].unpublished == {}


async def test_a_stop_lets_a_capture_finish_within_its_grace(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    async with world(tmp_path, entry("web-1", HOUR, first_run="now")) as w:
        w.backend.capture_s = 8
        await trio.sleep(5)
        w.engine.stop(10)
        await trio.sleep(30)
        assert w.outcomes() == ["succeeded"]


async def test_a_stop_before_the_started_line_leaves_the_slot_due(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    async with world(tmp_path, entry("web-1", HOUR, first_run="now")) as w:
        w.backend.fail("prepare", "web-1")
        await trio.sleep(5)
        w.engine.stop(10)
        await trio.sleep(30)
        assert w.history() == []
        assert w.schedule("web-1").next_run_at == START


async def test_a_guest_that_cannot_be_resumed_is_left_to_the_next_start(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    async with world(tmp_path, entry("web-1", HOUR, first_run="now")) as w:
        fake = w.backend
        fake.fail("resume", "web-1", BackendUnavailable("monitor cut"))
        await trio.sleep(5)
        w.engine.stop(10)
        await trio.sleep(60)
        assert len(w.engine.runlog.open_runs) == 1
        assert WEB in fake.frozen
    fake.heal("resume", "web-1")
    fake.clock = clock = FakeClock(start=START + 10 * MINUTE)
    async with world(tmp_path, entry("web-1", HOUR, first_run="now"), backends=[fake], clock=clock) as w:
        await trio.sleep(5)
        assert runs(w)
        assert w.engine.runlog.open_runs == ()
        (run,) = w.history()
        assert str(run.outcome) == "interrupted"
        assert run.freeze_s == pytest.approx(600, abs=5)
        assert "found frozen" in (w.schedule("web-1").last_error or "")


@pytest.mark.parametrize(("interval", "tries"), [(MINUTE, 1), (HOUR, 3), (DAY, 4), (10 * MINUTE, 2)])
async def test_a_transient_failure_is_tried_again_within_a_quarter_of_the_interval(
    tmp_path: Path, virtual_clock: VirtualClock, interval: timedelta, tries: int
) -> None:
    async with world(tmp_path, entry("web-1", interval, first_run="now")) as w:
        w.backend.fail("state", "web-1", BackendUnavailable("connection refused"))
        await trio.sleep(interval.total_seconds() - 1)
        asked = w.backend.times("state", "web-1")
        assert len(asked) == tries
        assert asked[-1] - asked[0] <= interval.total_seconds() / 4
        assert w.outcomes() == ["failed"]
        assert "connection refused" in (w.schedule("web-1").last_error or "")


async def test_a_retry_that_works_makes_one_run_of_it(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    async with world(tmp_path, entry("web-1", DAY, first_run="now")) as w:
        w.backend.fail("state", "web-1", BackendUnavailable("connection refused"), times=2)
        await trio.sleep(3600)
        (run,) = w.history()
        assert str(run.outcome) == "succeeded"
        assert run.late_s == pytest.approx(360, abs=1)
        assert w.schedule("web-1").next_run_at == START + DAY


async def test_an_operators_pause_during_the_wait_for_a_slot_is_not_undone(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    entries = [entry("a", HOUR, first_run="now"), entry("web-1", HOUR, first_run="now")]
    async with world(tmp_path, *entries, concurrency=1) as w:
        w.backend.capture_s = 30
        await trio.sleep(5)
        waiting = WEB if w.backend.frozen == {"a"} else InstanceId("a")
        w.backend.machines[waiting].state = InstanceState.PAUSED
        await trio.sleep(120)
        assert w.backend.machines[waiting].state is InstanceState.PAUSED
        assert w.backend.times("resume", waiting) == []
        assert "Paused" in (w.schedule(waiting).last_error or "")


async def test_only_who_waited_for_a_slot_is_asked_for_its_state_again_before_the_claim(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    entries = [entry("a", HOUR, first_run="now"), entry("web-1", HOUR, first_run="now")]
    async with world(tmp_path, *entries, concurrency=1) as w:
        w.backend.capture_s = 30
        await trio.sleep(120)
        assert w.outcomes() == ["succeeded", "succeeded"]
        asked = {}
        for instance in ("a", "web-1"):
            (claimed_at,) = w.backend.times("pause", instance)
            asked[claimed_at] = len([at for at in w.backend.times("state", instance) if at <= claimed_at])
        first, second = [asked[at] for at in sorted(asked)]
        assert second == first + 1


async def test_too_little_room_fails_before_any_freeze(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    async with world(tmp_path, entry("web-1", HOUR, first_run="now"), min_free=1000) as w:
        w.room.free_bytes = 1099
        await trio.sleep(60)
        assert w.outcomes() == ["failed"]
        assert "min_free" in (w.schedule("web-1").last_error or "")
        assert w.backend.times("pause", "web-1") == []
        assert lines_of(w) == ["RunFinished"]
        w.room.free_bytes = 1100
        await trio.sleep(3600)
        assert w.outcomes()[-1] == "succeeded"


async def test_captures_under_way_count_against_the_room(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    entries = [entry(name, HOUR, first_run="now") for name in ("a", "b", "c")]
    async with world(tmp_path, *entries, concurrency=8) as w:
        w.room.free_bytes = 250
        await trio.sleep(60)
        assert sorted(w.outcomes()) == ["failed", "succeeded", "succeeded"]


async def test_a_capture_that_cannot_be_aborted_gives_its_slot_back_at_the_budget(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    clock = FakeClock()
    slow = FakeBackend(clock, name="slow", freezes=Freezer.HYPERVISOR, abortable=False, capture_s=600)
    quick = FakeBackend(clock, name="quick")
    slow.add("s")
    quick.add("q")
    entries = [
        entry("s", HOUR, first_run="now", backend="slow"),
        entry("q", HOUR, backend="quick", first_run="now"),
    ]
    budget = timedelta(seconds=30)
    async with world(tmp_path, *entries, backends=[slow, quick], clock=clock, concurrency=1, max_freeze=budget) as w:
        await trio.sleep(700)
        assert w.outcomes() == ["succeeded", "succeeded"]
        assert w.history("q")[0].late_s <= 31
        assert w.history("s")[0].freeze_s == pytest.approx(600)
        assert slow.times("pause", "s") == []


async def test_a_save_that_outlives_its_time_limit_stays_open_until_the_hypervisor_is_done(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    clock = FakeClock()
    slow = FakeBackend(clock, freezes=Freezer.HYPERVISOR, abortable=False, capture_s=400)
    slow.add("web-1")
    limit = timedelta(seconds=100)
    async with world(
        tmp_path, entry("web-1", MINUTE, first_run="now"), backends=[slow], clock=clock, capture_timeout=limit
    ) as w:
        await trio.sleep(130)
        (left_open,) = w.engine.runlog.open_runs
        assert "capture_timeout" in (w.schedule("web-1").last_error or "")
        await trio.sleep(120)
        reasons = [run.error or "" for run in w.history() if str(run.outcome) == "skipped"]
        assert any("not settled yet" in reason for reason in reasons)
        slow.capture_s = 1
        await trio.sleep(300)
        assert left_open.run_id not in {run.run_id for run in w.engine.runlog.open_runs}
        (settled,) = [run for run in w.history() if run.run_id == left_open.run_id]
        assert str(settled.outcome) == "interrupted"
        assert "capture_timeout" in (settled.error or "")
        assert w.outcomes()[-1] == "succeeded"


async def test_pruning_spares_other_peoples_snapshots_and_the_one_just_taken(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    async with world(tmp_path, entry("web-1", HOUR, first_run="now", max_count=2)) as w:
        await trio.sleep(60)
        first = w.backend.machines[WEB].snapshots
        (one,) = first.values()
        first["manual"] = evolve(one, id="manual", name="mine", tags={"team": "backend"})
        first["others"] = evolve(
            one, id="others", name="theirs", tags={**one.tags, "hypeman.schedule_instance_id": "x"}
        )
        future = START.replace(year=2036)
        first["ahead"] = evolve(one, id="ahead", name="ahead", created_at=future)
        await trio.sleep(5 * 3600)
        names = w.backend.names("web-1")
        assert {"mine", "theirs", "ahead"} <= set(names)
        assert len(names) == 5
        assert all(p.reasons for run in w.history() for p in run.pruned)
        assert len([p for run in w.history() for p in run.pruned]) == 4


async def test_one_snapshot_that_cannot_be_deleted_stops_no_other_and_is_tried_again(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    async with world(tmp_path, entry("web-1", HOUR, first_run="now", max_count=3)) as w:
        await trio.sleep(2 * 3600 + 60)
        stuck, second, *_ = w.backend.names("web-1")
        w.backend.fail("delete_snapshot", stuck, BackendUnavailable("busy"))
        await trio.sleep(2 * 3600)
        names = w.backend.names("web-1")
        assert stuck in names
        assert second not in names
        schedule = w.schedule("web-1")
        assert stuck in (schedule.last_error or "")
        assert schedule.last_snapshot_id == w.history()[-1].snapshot_id
        assert w.outcomes() == ["succeeded"] * 5
        w.backend.heal("delete_snapshot", stuck)
        await trio.sleep(3600)
        assert stuck not in w.backend.names("web-1")
        assert w.schedule("web-1").last_error is None


async def test_an_unreachable_hypervisor_prunes_nothing_and_ends_no_schedule(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    clock = FakeClock()
    fake = FakeBackend(clock)
    fake.add("web-1")
    async with world(tmp_path, entry("web-*", HOUR, first_run="now", max_count=1), backends=[fake], clock=clock) as w:
        await trio.sleep(60)
        held = dict(fake.machines[WEB].snapshots)
        fake.unavailable = True
        await trio.sleep(60 * 3600)
        assert fake.machines[WEB].snapshots == held
        assert (w.schedule("web-1").next_run_at - START) % HOUR == timedelta(0)
        fake.unavailable = False
        await trio.sleep(2 * 3600)
        assert w.outcomes()[-1] == "succeeded"


async def test_a_gone_instance_prunes_only_after_24_hours_of_authoritative_answers(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    clock = FakeClock()
    fake = FakeBackend(clock)
    fake.add("web-1", "other")
    async with world(
        tmp_path, entry("web-1", HOUR, first_run="now", max_age=4 * HOUR), backends=[fake], clock=clock
    ) as w:
        await trio.sleep(2 * 3600 + 60)
        held = fake.machines[WEB]
        fake.fail("state", "web-1", InstanceNotFound("no instance web-1"))
        await trio.sleep(23 * 3600)
        assert len(held.snapshots) == 3
        assert w.schedule("web-1").gone_since_at is not None
        await trio.sleep(3 * 3600)
        assert held.snapshots == {}
        assert sum(len(run.pruned) for run in w.history()) == 3
        assert "web-1" in w.engine.store.schedules, "the config still wants it"
        fake.heal("state", "web-1")
        await trio.sleep(3600)
        assert w.schedule("web-1").gone_since_at is None
        assert w.outcomes()[-1] == "succeeded"


async def test_the_run_log_line_of_each_outcome_is_written_once(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    async with world(tmp_path, entry("web-1", HOUR, first_run="now")) as w:
        w.backend.fail("capture", "web-1", CaptureFailed("x"), times=2)
        await trio.sleep(5 * 3600 + 60)
        ids = [run.run_id for run in w.history()]
        assert len(ids) == len(set(ids)) == 6
        assert encode_line(w.history()[0]).endswith(b"}\n")


async def test_an_outcome_that_cannot_be_written_is_written_later(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    disk = FaultyDisk()
    async with world(tmp_path, entry("web-1", HOUR, first_run="now"), disk=disk) as w:
        w.backend.capture_s = 5
        await trio.sleep(2)
        disk.fail("sync")
        await trio.sleep(60)
        assert runs(w)
        assert w.history() == []
        disk.heal()
        await trio.sleep(60)
        assert w.outcomes() == ["succeeded"]
        assert w.engine.store.unsaved == set()


async def test_a_schedule_whose_backend_is_not_in_the_config_fails_its_runs(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    async with world(tmp_path, entry("web-1", HOUR, first_run="now")) as w:
        await trio.sleep(60)
        await w.engine.store.put(evolve(w.schedule("web-1"), backend="lost", next_run_at=w.clock.now()))
        w.engine.scheduler.refresh(WEB)
        await trio.sleep(60)
        assert "backend 'lost' is not in the config" in (w.schedule("web-1").last_error or "")


async def test_max_count_one_keeps_one_as_the_plan_says(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    """The snapshot just taken is the last good one; the one before it no longer is."""
    async with world(tmp_path, entry("web-1", HOUR, first_run="now", max_count=1)) as w:
        await trio.sleep(3 * 3600 + 60)
        assert len(w.backend.names("web-1")) == 1
        assert w.schedule("web-1").last_snapshot_id in w.backend.machines[WEB].snapshots


async def test_what_the_file_names_as_the_last_snapshot_is_pruned_at_no_moment(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    async with world(tmp_path, entry("web-1", HOUR, first_run="now", max_count=1)) as w:
        await trio.sleep(60)
        before = w.backend.names("web-1")[0]
        w.backend.fail("delete_snapshot", before)
        await trio.sleep(3600)
        assert w.backend.times("delete_snapshot", before), "it is being deleted now"
        (file,) = (tmp_path / "schedules").glob("*.json")
        named = decode_schedule(file.read_bytes(), WEB).last_snapshot_id
        assert w.backend.machines[WEB].snapshots[named or ""].name != before


async def test_where_the_file_is_behind_what_it_names_stays_until_it_names_the_new_one(
    tmp_path: Path, virtual_clock: VirtualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FaultyDisk()
    async with world(tmp_path, entry("web-1", HOUR, first_run="now", max_count=2), disk=disk) as w:
        await trio.sleep(60)
        (first,) = w.backend.names("web-1")
        disk.fail("replace")
        await trio.sleep(3600)  # the second run: the file still names the first one's
        publish = type(w.backend).publish

        async def healing(backend: FakeBackend, snapshot: Snapshot) -> None:
            disk.heal()
            await publish(backend, snapshot)

        monkeypatch.setattr(type(w.backend), "publish", healing)
        w.backend.fail("delete_snapshot", first)
        await trio.sleep(3600)
        assert w.backend.times("delete_snapshot", first), "it is being deleted now"
        (file,) = (tmp_path / "schedules").glob("*.json")
        named = decode_schedule(file.read_bytes(), WEB).last_snapshot_id
        assert named is not None
        assert named == max(w.backend.machines[WEB].snapshots.values(), key=lambda s: s.created_at).id


async def test_a_run_that_prunes_others_alone_writes_its_schedule_once(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    disk = FaultyDisk()
    async with world(tmp_path, entry("web-1", HOUR, first_run="now", max_count=2), disk=disk) as w:
        await trio.sleep(2 * 3600 + 60)
        disk.forget()
        await trio.sleep(3600)
        assert (len(w.outcomes()), len(w.backend.names("web-1"))) == (4, 2)
        assert disk.calls["replace"] == 1


async def test_the_last_snapshot_stays_while_its_successor_cannot_be_written_down(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    disk = FaultyDisk()
    async with world(tmp_path, entry("web-1", HOUR, first_run="now", max_count=1), disk=disk) as w:
        await trio.sleep(60)
        (before,) = w.backend.names("web-1")
        disk.fail("replace")
        await trio.sleep(3600)
        assert len(w.outcomes()) == 2
        assert before in w.backend.names("web-1")
        disk.heal()
        await trio.sleep(3600)
        assert len(w.backend.names("web-1")) == 1


async def test_a_failed_run_prunes_nothing(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    async with world(tmp_path, entry("web-1", HOUR, first_run="now", max_count=1, max_age=MINUTE)) as w:
        await trio.sleep(60)
        w.backend.fail("capture", "web-1", CaptureFailed("x"))
        await trio.sleep(5 * 3600)
        assert len(w.backend.names("web-1")) == 1
