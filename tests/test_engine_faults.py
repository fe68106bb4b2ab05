"""Faults at the seams of the engine: each would leave a guest frozen, lose a run or stop the engine."""

import errno
import os
from datetime import timedelta
from pathlib import Path

import pytest
import trio
from attrs import evolve

from hypemand.backends.base import BackendUnavailable, InstanceNotFound, InvalidState
from hypemand.core.model import InstanceId, InstanceState
from hypemand.state.files import Disk
from hypemand.state.segments import read_log
from tests.disks import InlineDisk, UnsyncedDisk
from tests.fakes import START, FakeBackend, FakeClock
from tests.virtual_time import VirtualClock
from tests.world import entry, world

HOUR, MINUTE, DAY = timedelta(hours=1), timedelta(minutes=1), timedelta(days=1)
WEB = InstanceId("web-1")


@pytest.mark.parametrize("answer", [ConnectionResetError("cut"), BackendUnavailable("busy")])
async def test_a_thaw_goes_on_when_the_state_cannot_be_asked(
    tmp_path: Path, virtual_clock: VirtualClock, answer: Exception
) -> None:
    async with world(tmp_path, entry("web-1", HOUR, first_run="now")) as w:
        w.backend.capture_s = 5
        await trio.sleep(2)
        w.backend.fail("resume", "web-1", InvalidState("not now"), times=1)
        w.backend.fail("state", "web-1", answer, times=1)
        await trio.sleep(60)
        assert w.backend.machines[WEB].state is InstanceState.RUNNING
        assert w.backend.frozen == set()


async def test_a_guest_in_a_state_in_between_is_not_taken_for_thawed(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    async with world(tmp_path, entry("web-1", HOUR, first_run="now")) as w:
        w.backend.capture_s = 5
        await trio.sleep(2)
        w.backend.machines[WEB].state = InstanceState.UNKNOWN
        await trio.sleep(20)
        assert WEB in w.backend.frozen
        w.backend.machines[WEB].state = InstanceState.PAUSED
        await trio.sleep(20)
        assert w.backend.machines[WEB].state is InstanceState.RUNNING


async def test_a_thaw_is_tried_again_within_a_second(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    async with world(tmp_path, entry("web-1", HOUR, first_run="now")) as w:
        w.backend.fail("resume", "web-1", BackendUnavailable("busy"))
        await trio.sleep(33)
        w.backend.heal("resume", "web-1")
        await trio.sleep(1)
        assert w.backend.frozen == set()


async def test_schedules_taken_out_while_they_come_due_leave_the_engine_alone(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    class Slow(UnsyncedDisk):
        async def call(self, work, *args):  # type: ignore[no-untyped-def,override]  # noqa: ANN001, ANN002, ANN202
            await trio.sleep(0.5)
            return await super().call(work, *args)

    entries = [entry(f"vm-{n}", MINUTE) for n in range(30)]
    async with world(tmp_path, *entries, disk=Slow()) as w:
        await trio.sleep(50)
        await w.apply(entries[0])
        await trio.sleep(300)
        assert w.outcomes("vm-0")[-1] == "succeeded"
        assert set(w.engine.store.schedules) == {"vm-0"}


async def test_a_jump_not_noticed_yet_already_stops_pruning_by_age(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    async with world(tmp_path, entry("web-1", HOUR, first_run="now", max_age=168 * HOUR)) as w:
        await trio.sleep(4 * 3600 + 60)
        w.backend.capture_s = 4
        await trio.sleep(3600 - 60 + 1)
        w.clock.jump(365 * DAY)
        await trio.sleep(60)
        assert len(w.backend.names("web-1")) >= 6


async def test_a_clock_set_back_during_a_run_stalls_no_schedule(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    async with world(tmp_path, entry("web-1", HOUR, first_run="now")) as w:
        await trio.sleep(1800)
        w.clock.jump(365 * DAY)
        w.backend.capture_s = 60
        await trio.sleep(30)
        w.clock.jump(-365 * DAY)
        before = len(w.backend.times("capture", "web-1"))
        await trio.sleep(6 * 3600)
        assert len(w.backend.times("capture", "web-1")) - before >= 5
        assert w.schedule("web-1").next_run_at - w.clock.now() <= HOUR + 6 * MINUTE


async def test_a_clock_set_back_during_a_retry_stalls_no_schedule(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    async with world(tmp_path, entry("web-1", HOUR, first_run="now")) as w:
        await trio.sleep(1800)
        w.backend.fail("state", "web-1", BackendUnavailable("busy"))
        w.clock.jump(365 * DAY)
        await trio.sleep(30)
        w.clock.jump(-365 * DAY)
        w.backend.heal("state", "web-1")
        await trio.sleep(6 * 3600)
        assert w.outcomes().count("succeeded") >= 6


async def test_what_was_said_of_an_instance_elsewhere_does_not_count(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    clock = FakeClock()
    fake = FakeBackend(clock)
    fake.add("web-1", "other")
    kept = entry("other", DAY)
    hourly = entry("web-1", HOUR, first_run="now", max_age=4 * HOUR)
    async with world(tmp_path, hourly, kept, backends=[fake], clock=clock) as w:
        await trio.sleep(2 * 3600 + 60)
        held = fake.machines[WEB].snapshots
        fake.fail("state", "web-1", InstanceNotFound("no instance web-1"))
        await trio.sleep(3600)
        await w.apply(kept)
        await trio.sleep(2 * 24 * 3600)
        await w.apply(hourly, kept)
        await trio.sleep(2 * 3600)
        assert len(held) == 3


@pytest.mark.parametrize("call", ["list_snapshots", "delete_snapshot"])
async def test_a_bug_while_pruning_a_gone_instance_stops_nobody(
    tmp_path: Path, virtual_clock: VirtualClock, call: str
) -> None:
    entries = [entry("web-1", HOUR, first_run="now", max_age=HOUR), entry("other", HOUR, first_run="now")]
    async with world(tmp_path, *entries) as w:
        await trio.sleep(2 * 3600)
        w.backend.fail("state", "web-1", InstanceNotFound("no instance web-1"))
        await trio.sleep(23 * 3600)
        w.backend.fail(call, "web-1" if call == "list_snapshots" else "*", ZeroDivisionError("oops"))
        await trio.sleep(5 * 3600)
        assert "internal error" in (w.schedule("web-1").last_error or "")
        assert w.outcomes("other")[-1] == "succeeded"


async def test_a_backend_with_bugs_everywhere_stops_no_other(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    clock = FakeClock()
    bad, good = FakeBackend(clock, name="bad"), FakeBackend(clock, name="good")
    bad.add("b-1")
    good.add("g-1")
    for call in ("open", "instances", "state", "list_snapshots", "settle"):
        bad.fail(call, "*", ZeroDivisionError("oops"))
    entries = [entry("b-1", MINUTE, backend="bad"), entry("g-*", MINUTE, backend="good")]
    async with world(tmp_path, *entries, backends=[bad, good], clock=clock) as w:
        await trio.sleep(200)
        assert w.outcomes("g-1") == ["succeeded"] * len(w.outcomes("g-1"))
        assert len(w.outcomes("g-1")) >= 2
        await w.engine.apply_config(evolve(w.config, backends={"good": w.config.backends["good"]}))
        await trio.sleep(60)
        assert w.outcomes("g-1")[-1] == "succeeded"


async def test_a_backend_that_could_not_be_opened_is_opened_later(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    clock = FakeClock()
    fake = FakeBackend(clock)
    fake.add("web-1")
    fake.fail("open", "*", BackendUnavailable("not mounted"), times=1)
    async with world(tmp_path, entry("web-1", HOUR), backends=[fake], clock=clock):
        await trio.sleep(60)
        assert [of for _, call, of in fake.calls if call == "open"] == ["first_use=True"] * 2


async def test_a_backend_that_hangs_at_its_opening_delays_the_start_by_seconds(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    clock = FakeClock()
    hung, well = FakeBackend(clock, name="hung"), FakeBackend(clock, name="well")
    hung.add("h-1")
    well.add("w-1")
    for call in ("open", "instances", "state"):
        hung.fail(call, "*")
    entries = [entry(f"{name[0]}-1", HOUR, first_run="now", backend=name) for name in ("hung", "well")]
    async with world(tmp_path, *entries, backends=[hung, well], clock=clock) as w:
        await trio.sleep(5)
        assert w.outcomes("w-1") == ["succeeded"]
        assert well.times("capture", "w-1")[0] <= 16


async def test_a_backend_captured_through_in_this_process_is_not_opened_as_new(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    async with world(tmp_path, entry("web-1", HOUR, first_run="now")) as w:
        await trio.sleep(60)
        changed = {"fake": evolve(w.config.backends["fake"], concurrency=3)}
        await w.engine.apply_config(evolve(w.config, backends=changed))
        await trio.sleep(10)
        assert [of for _, call, of in w.backend.calls if call == "open"] == ["first_use=True", "first_use=False"]


async def test_a_hung_publish_holds_up_no_other_guest(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    clock = FakeClock()
    fake = FakeBackend(clock)
    fake.add("web-1", "web-2")
    fake.fail("publish", "web-1")
    entries = [entry(name, HOUR, first_run="now") for name in ("web-1", "web-2")]
    async with world(tmp_path, *entries, backends=[fake], clock=clock, concurrency=1) as w:
        await trio.sleep(600)
        assert w.outcomes("web-2") == ["succeeded"]
        await trio.sleep(3600)
        assert "publish" in (w.history("web-1")[-1].error or "")
        assert fake.machines[WEB].state is InstanceState.RUNNING


async def test_a_filesystem_that_hangs_gives_its_slots_back(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    async with world(tmp_path, entry("web-1", HOUR), concurrency=1) as w:

        async def hang(path: Path) -> None:
            await trio.sleep_forever()

        w.engine.runner._means.space._measure = hang  # type: ignore[assignment]
        await trio.sleep(2 * 3600)
        assert w.outcomes() == ["failed"]
        assert "free space" in (w.history()[0].error or "")


async def test_after_a_crash_and_a_downtime_there_is_one_run_and_then_the_grid(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    async with world(tmp_path, entry("web-1", DAY, first_run="now")) as w:
        await trio.sleep(60)
        schedule = w.schedule("web-1")
        # The power went between the finished line and the schedule's file.
        await w.engine.store.put(evolve(schedule, next_run_at=START, last_run_at=None, last_snapshot_id=None))
        kept = w.backend
    kept.clock = clock = FakeClock(start=START + 3 * DAY + HOUR)
    async with world(tmp_path, entry("web-1", DAY, first_run="now"), backends=[kept], clock=clock) as w:
        await trio.sleep(60)
        assert [(run.due_at, run.missed) for run in w.history()] == [(START, 0), (START + DAY, 2)]
        assert w.schedule("web-1").next_run_at == START + 4 * DAY


async def test_what_was_pruned_before_a_stop_is_recorded(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    async with world(tmp_path, entry("web-1", HOUR, first_run="now")) as w:
        await trio.sleep(4 * 3600 + 60)
        await w.apply(entry("web-1", HOUR, first_run="now", max_count=1))
        third = w.backend.names("web-1")[2]
        w.backend.fail("delete_snapshot", third)
        await trio.sleep(3600)
        w.engine.stop(0)
        await trio.sleep(60)
        run = w.history()[-1]
        assert len(run.pruned) == 2
        assert str(run.outcome) == "succeeded"


async def test_a_schedule_taken_out_in_mid_run_keeps_all_snapshots_and_its_record(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    other = entry("other", DAY)
    async with world(tmp_path, entry("web-1", HOUR, first_run="now", max_count=1), other) as w:
        await trio.sleep(60)
        w.backend.capture_s = 100
        await trio.sleep(3600)
        await w.apply(other)
        await trio.sleep(200)
        assert len(w.backend.names("web-1")) == 2
        w.backend.capture_s = 1
        await w.apply(entry("web-1", HOUR, first_run="now", max_count=1), other)
        assert w.schedule("web-1").last_snapshot_id == w.history("web-1")[-1].snapshot_id


async def test_a_schedule_taken_out_or_disabled_during_a_retry_is_not_captured(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    entries = [entry("web-1", DAY, first_run="now"), entry("other", DAY, first_run="now"), entry("third", DAY)]
    async with world(tmp_path, *entries) as w:
        w.backend.fail("state", "*", BackendUnavailable("busy"))
        await trio.sleep(30)
        await w.apply(evolve(entries[0], enabled=False), entries[2])
        w.backend.heal("state", "*")
        await trio.sleep(3600)
        assert w.outcomes("web-1") == w.outcomes("other") == ["skipped"]
        assert "taken out or disabled" in (w.history("web-1")[0].error or "")


async def test_a_file_that_cannot_be_read_is_not_made_anew(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    async with world(tmp_path, entry("web-1", HOUR, first_run="now")) as w:
        await trio.sleep(60)
        before = w.schedule("web-1")
        kept = w.backend

    class Unreadable(InlineDisk):
        bad = True

        def read(self, path: Path | str):  # type: ignore[no-untyped-def]  # noqa: ANN202
            if self.bad and Path(path).name == "web-1.json":
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            return super().read(path)

    kept.clock = clock = FakeClock(start=START + 2 * MINUTE)
    disk = Unreadable()
    async with world(tmp_path, entry("web-1", HOUR, first_run="now"), backends=[kept], clock=clock, disk=disk) as w:
        await trio.sleep(100)
        assert len(w.history()) == 1
        assert "can't be read" in w.engine.problems[0]
        disk.bad = False
        await trio.sleep(60)
        assert w.schedule("web-1") == before
        await trio.sleep(3600)
        assert [run.due_at for run in w.history()] == [START, START + HOUR]


async def test_an_operators_pause_between_claim_and_freeze_is_not_undone(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    class PausedMeanwhile(UnsyncedDisk):
        def write(self, descriptor: int, data: bytes) -> None:
            super().write(descriptor, data)
            if b'"event":"started"' in data:
                w.backend.machines[WEB].state = InstanceState.PAUSED

    async with world(tmp_path, entry("web-1", MINUTE), disk=PausedMeanwhile()) as w:
        await trio.sleep(70)
        assert w.backend.machines[WEB].state is InstanceState.PAUSED
        assert w.backend.times("resume", "web-1") == []
        assert w.outcomes() == ["failed"]
        assert "Paused now" in (w.schedule("web-1").last_error or "")


async def test_a_run_left_open_after_its_thaw_undoes_no_later_pause(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    async with world(tmp_path, entry("web-1", HOUR, first_run="now")) as w:
        w.backend.fail("capture", "web-1", BackendUnavailable("cut"), times=1)
        w.backend.fail("settle", "web-1", BackendUnavailable("busy"))
        w.backend.marks = False
        await trio.sleep(60)
        assert w.history() == []
        w.backend.machines[WEB].state = InstanceState.PAUSED
        w.backend.heal("settle", "web-1")
        await trio.sleep(60)
        assert w.outcomes() == ["interrupted"]
        assert w.backend.machines[WEB].state is InstanceState.PAUSED


async def test_a_pause_that_takes_hold_late_is_undone(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    async with world(tmp_path, entry("web-1", HOUR, first_run="now")) as w:
        w.backend.fail("pause", "web-1", times=1)
        w.backend.fail("settle", "web-1", BackendUnavailable("busy"), times=3)
        w.backend.marks = False
        await trio.sleep(11)
        machine = w.backend.machines[WEB]
        machine.state = InstanceState.PAUSED
        await trio.sleep(10)
        assert machine.state is InstanceState.RUNNING
        assert w.engine.runlog.open_runs == ()


async def test_a_guest_that_cannot_be_resumed_for_long_is_left_to_the_recovery(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    async with world(tmp_path, entry("web-1", HOUR, first_run="now")) as w:
        w.backend.fail("resume", "web-1", BackendUnavailable("no such socket"))
        w.backend.fail("settle", "web-1", BackendUnavailable("no such socket"))
        await trio.sleep(1800)
        assert w.engine.runner.active == {}
        assert len(w.engine.runlog.open_runs) == 1
        assert "no such socket" in (w.schedule("web-1").last_error or "")
        w.backend.heal("settle", "web-1")
        await trio.sleep(5)
        assert w.backend.machines[WEB].state is InstanceState.RUNNING
        assert w.outcomes() == ["interrupted"]


async def test_a_slot_that_waits_to_be_recorded_is_not_recorded_twice(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    clock = FakeClock()
    slow = FakeBackend(clock, capture_s=90)
    slow.add("web-1")
    hourly = entry("web-1", MINUTE, first_run="now")
    async with world(tmp_path, hourly, backends=[slow], clock=clock) as w:
        await trio.sleep(61)
        await w.apply(evolve(hourly, name_prefix="other"))
        await trio.sleep(40)
        due = [run.due_at for run in w.history()]
        assert len(due) == len(set(due)) == 2


async def test_a_line_that_cannot_be_written_fails_its_own_run_alone(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    clock = FakeClock()
    odd, well = FakeBackend(clock, name="odd", settings={"socket": object()}), FakeBackend(clock, name="well")
    odd.add("o-1")
    well.add("w-1")
    entries = [entry(f"{name[0]}-1", HOUR, first_run="now", backend=name) for name in ("odd", "well")]
    async with world(tmp_path, *entries, backends=[odd, well], clock=clock) as w:
        await trio.sleep(60)
        assert w.outcomes("o-1") == ["failed"]
        assert w.outcomes("w-1") == ["succeeded"]
        assert odd.times("pause", "o-1") == []


async def test_a_crash_of_the_engine_is_not_kept_waiting_by_a_guest_that_does_not_thaw(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    def broken(on_jump: object) -> None:
        raise IndexError("a bug")

    async def crash() -> None:
        async with world(tmp_path, entry("web-1", HOUR, first_run="now")) as w:
            w.backend.fail("resume", "web-1", BackendUnavailable("busy"))
            await trio.sleep(60)
            w.engine.watch.check = broken  # type: ignore[method-assign]
            await trio.sleep(3600)

    with pytest.raises(BaseExceptionGroup) as caught:
        await crash()
    assert caught.group_contains(IndexError)
    assert trio.current_time() < 120
    assert len(read_log(tmp_path, Disk()).open_runs()) == 1
