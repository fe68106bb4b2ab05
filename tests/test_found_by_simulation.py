"""What the simulation found in the engine, each as a small case of its own."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import orjson
import pytest
import trio
from attrs import define

from hypemand.backends.base import BackendUnavailable, InstanceNotFound
from hypemand.core.doubt import Reading
from hypemand.core.model import InstanceId, Snapshot
from hypemand.engine.clock import ClockWatch
from hypemand.state.runlog import RunLog
from hypemand.state.segments import OLD_SEGMENTS, read_log
from tests.disks import FaultyDisk
from tests.fakes import START, FakeBackend, FakeClock
from tests.test_runlog import finished, started
from tests.virtual_time import VirtualClock
from tests.world import BOOT_ID, World, entry, world

HOUR, MINUTE = timedelta(hours=1), timedelta(minutes=1)
WEB = InstanceId("web-1")
TEN_YEARS = timedelta(days=3652)
FILE = "web-1.json"


async def test_a_jump_that_another_process_saw_is_still_doubted(virtual_clock: VirtualClock) -> None:
    clock = FakeClock()
    await trio.sleep(100)
    before = Reading(clock.now(), BOOT_ID, clock.boot_s())
    clock.jump(TEN_YEARS)
    await trio.sleep(100)
    after = Reading(clock.now(), BOOT_ID, clock.boot_s())
    await trio.sleep(1)
    watch = ClockWatch(clock)
    watch.check_start([before, after], BOOT_ID)
    assert watch.why_age_waits(HOUR) is not None
    trusting = ClockWatch(clock)
    trusting.check_start([after], BOOT_ID)
    assert trusting.why_age_waits(HOUR) is None


async def test_a_restart_after_a_jump_prunes_nothing_by_age(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    clock = FakeClock()
    fake = FakeBackend(clock)
    fake.add("web-1")
    kept = entry("web-1", HOUR, first_run="now", max_age=2 * HOUR)
    async with world(tmp_path, kept, backends=[fake], clock=clock):
        await trio.sleep(60)
        clock.jump(TEN_YEARS)
        await trio.sleep(2 * 3600)
    assert len(fake.names("web-1")) > 1
    oldest = fake.names("web-1")[0]
    async with world(tmp_path, kept, backends=[fake], clock=clock, first_id=100) as w:
        await trio.sleep(3700)
        assert w.history()[-1].outcome == "succeeded"
        assert oldest in fake.names("web-1")


@pytest.mark.parametrize("recorded", ["a run of the same boot", "a settled run", "nothing"])
async def test_a_jump_before_or_over_a_reboot_is_still_doubted_at_the_second_start_after_it(
    tmp_path: Path, virtual_clock: VirtualClock, recorded: str
) -> None:
    clock = FakeClock()
    fake = FakeBackend(clock)
    fake.add("web-1")
    kept = entry("web-1", 2 * MINUTE, first_run="now", max_age=30 * MINUTE)
    async with world(tmp_path, kept, backends=[fake], clock=clock, boot_id="first"):
        await trio.sleep(500)
        fake.capture_s = 60
        await trio.sleep(120)  # the last run is left open
    fake.capture_s = 1
    oldest = fake.names("web-1")[0]
    clock.jump(HOUR)
    if recorded == "a run of the same boot":
        async with world(tmp_path, kept, backends=[fake], clock=clock, boot_id="first", first_id=100):
            await trio.sleep(10)
    clock.reboot()
    if recorded == "a settled run":  # which says what time it is, and not on which clock
        async with world(tmp_path, kept, backends=[fake], clock=clock, boot_id="second", first_id=200, serve=False):
            await trio.sleep(1)
    async with world(tmp_path, kept, backends=[fake], clock=clock, boot_id="second", first_id=300) as w:
        await trio.sleep(10)
    async with world(tmp_path, kept, backends=[fake], clock=clock, boot_id="second", first_id=400) as w:
        await trio.sleep(300)
        assert w.outcomes()[-2:] == ["succeeded"] * 2
        assert oldest in fake.names("web-1")
        await trio.sleep(3600)
        assert len(fake.names("web-1")) <= 16, "it is trusted in the end"


@define(eq=False)
class SlowToDelete(FakeBackend):
    """Takes ten minutes less a bit for each deletion."""

    async def delete_snapshot(self, snapshot: Snapshot) -> None:
        await trio.sleep(500)
        await super().delete_snapshot(snapshot)


async def test_what_somebody_wants_to_keep_during_a_slow_deletion_is_kept(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    clock = FakeClock()
    fake = SlowToDelete(clock)
    fake.add("web-1")
    async with world(tmp_path, entry("web-1", HOUR, first_run="now"), backends=[fake], clock=clock) as w:
        await trio.sleep(4 * 3600 + 60)
        await w.apply(entry("web-1", HOUR, first_run="now", max_count=2))
        await trio.sleep(3600)  # the first of four deletions is under way
        assert len(fake.names("web-1")) == 6
        await w.apply(entry("web-1", HOUR, first_run="now", max_count=20))
        await trio.sleep(3000)
        assert len(fake.names("web-1")) == 5
        assert len(w.history()[-1].pruned) == 1


async def test_a_deletion_that_gets_no_answer_ends_the_pruning_of_its_run(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    async with world(tmp_path, entry("web-1", HOUR, first_run="now")) as w:
        await trio.sleep(4 * 3600 + 60)
        w.backend.fail("delete_snapshot", "*")
        await w.apply(entry("web-1", HOUR, first_run="now", max_count=1))
        await trio.sleep(3600 + 600)
        assert w.outcomes() == ["succeeded"] * 6
        assert "did not answer" in (w.history()[-1].error or "")
        w.backend.heal("delete_snapshot", "*")
        await trio.sleep(3600)
        assert len(w.backend.names("web-1")) == 1


async def test_a_backend_that_is_slow_to_open_keeps_no_guest_frozen(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    clock = FakeClock()
    fake = FakeBackend(clock, capture_s=10)
    fake.add("web-1")
    web = entry("web-1", HOUR, first_run="now")
    async with world(tmp_path, web, backends=[fake], clock=clock) as w:
        fake.fail("resume", "*", BackendUnavailable("busy"))
        await trio.sleep(5)
        assert WEB in fake.frozen
        w.engine.give_up.set()
    fake.heal("resume", "*")
    fake.fail("open", "*")
    fake.fail("open", "first_use=False")
    thawed_at: list[float] = []

    async def look() -> None:
        while WEB in fake.frozen:
            await trio.sleep(0.1)
        thawed_at.append(trio.current_time() - began)

    async with trio.open_nursery() as nursery:
        assert WEB in fake.frozen
        began = trio.current_time()
        nursery.start_soon(look)
        async with world(tmp_path, web, backends=[fake], clock=clock, first_id=100):
            await trio.sleep(1)
        nursery.cancel_scope.cancel()
    assert thawed_at
    assert thawed_at[0] < 1


@asynccontextmanager
async def started_over(
    tmp_path: Path, change: Callable[[bytes, bytes], bytes]
) -> AsyncIterator[tuple[World, FaultyDisk]]:
    """A start after one run, whose schedule file was changed meanwhile, and can't be read before the disk heals.

    Args:
        change: From the file before the run and after it to what it holds now.
    """
    clock = FakeClock()
    fake = FakeBackend(clock)
    fake.add("web-1")
    path = tmp_path / "schedules" / FILE
    kept = entry("web-1", HOUR, first_run="now")
    async with world(tmp_path, kept, backends=[fake], clock=clock):
        before = path.read_bytes()
        await trio.sleep(60)
    path.write_bytes(change(before, path.read_bytes()))
    disk = FaultyDisk()
    disk.fail("read", name=FILE)
    async with world(tmp_path, kept, backends=[fake], clock=clock, disk=disk, first_id=100) as w:
        yield w, disk


def broken(before: bytes, after: bytes) -> bytes:
    return b"{"


async def test_a_file_that_is_read_late_does_not_repeat_a_run_of_the_log(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    # A crash came before the file was written.
    async with started_over(tmp_path, lambda before, after: before) as (w, disk):
        await trio.sleep(1)
        assert WEB not in w.engine.store.schedules
        disk.heal()
        await trio.sleep(100)
        assert w.schedule("web-1").next_run_at == START + HOUR
        assert w.outcomes() == ["succeeded"]


async def test_a_file_that_turns_out_to_be_invalid_late_is_made_anew(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    async with started_over(tmp_path, broken) as (w, disk):
        disk.heal()
        await trio.sleep(3700)
        assert WEB in w.engine.store.schedules
        assert w.outcomes() == ["succeeded"] * 2


async def test_a_file_that_is_read_late_runs_within_one_interval(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    def far_ahead(before: bytes, after: bytes) -> bytes:
        return orjson.dumps(orjson.loads(after) | {"next_run_at": "2036-03-09T02:00:00Z"})

    async with started_over(tmp_path, far_ahead) as (w, disk):
        disk.heal()
        await trio.sleep(3700)
        assert w.outcomes() == ["succeeded"] * 2


async def test_an_instance_that_was_missed_under_a_wrong_clock_is_not_taken_for_long_gone(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    clock = FakeClock()
    fake = FakeBackend(clock)
    fake.add("web-1")
    async with world(tmp_path, entry("web-1", HOUR, first_run="now"), backends=[fake], clock=clock):
        await trio.sleep(60)
    taken = fake.names("web-1")
    path = tmp_path / "schedules" / FILE
    document = orjson.loads(path.read_bytes())
    document["gone_since_at"] = "1970-01-22T02:00:00Z"  # it was missed while the clock stood there
    path.write_bytes(orjson.dumps(document))
    fake.fail("state", "web-1", InstanceNotFound("no instance"))
    kept = entry("web-1", HOUR, first_run="now", max_age=8 * MINUTE)
    async with world(tmp_path, kept, backends=[fake], clock=clock, first_id=100) as w:
        await trio.sleep(20 * 3600)
        assert w.outcomes() == ["succeeded"] + ["failed"] * 20
        assert fake.names("web-1") == taken
        await trio.sleep(30 * 3600)
        assert fake.names("web-1") == []  # by now it is gone for a day


async def test_a_schedule_that_was_made_under_a_clock_ahead_repeats_no_run_after_a_crash(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    clock = FakeClock()
    fake = FakeBackend(clock)
    fake.add("web-1")
    path = tmp_path / "schedules" / FILE
    clock.jump(timedelta(days=1))
    async with world(tmp_path, entry("web-1", HOUR), backends=[fake], clock=clock):
        await trio.sleep(60)
        clock.jump(timedelta(days=-1))
        await trio.sleep(60)
        before = path.read_bytes()
        while not fake.names("web-1"):
            await trio.sleep(60)
    path.write_bytes(before)  # a crash came before the file was written
    async with world(tmp_path, entry("web-1", HOUR), backends=[fake], clock=clock, first_id=100) as w:
        await trio.sleep(60)
        assert w.outcomes() == ["succeeded"]


async def test_a_run_whose_hypervisor_hangs_holds_up_no_other_that_is_to_be_settled(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    clock = FakeClock()
    fake = FakeBackend(clock, capture_s=10)
    fake.add("web-1", "web-2")
    both = [entry(name, HOUR, first_run="now") for name in ("web-1", "web-2")]
    async with world(tmp_path, *both, backends=[fake], clock=clock) as w:
        fake.fail("resume", "*", BackendUnavailable("busy"))
        await trio.sleep(5)
        w.engine.give_up.set()
    assert fake.frozen == {WEB, InstanceId("web-2")}
    fake.heal("resume", "*")
    fake.fail("settle", "web-2")
    fake.fail("settle", "web-1", BackendUnavailable("busy"), times=1)
    async with world(tmp_path, *both, backends=[fake], clock=clock, first_id=100, serve=False):
        await trio.sleep(0)
        assert fake.frozen == {InstanceId("web-2")}


async def test_lines_that_a_killed_process_did_not_sync_are_durable_before_they_count(tmp_path: Path) -> None:
    disk = FaultyDisk()
    log = RunLog(tmp_path, disk)
    await log.open()
    log.close()
    (tmp_path / "runs.jsonl").write_bytes(b'{"event": "unknown"}\n')
    disk.forget()
    again = RunLog(tmp_path, disk)
    await again.open()
    again.close()
    assert ("sync", 21) in disk.order


async def test_an_instance_that_nobody_asked_for_meanwhile_is_not_taken_for_gone_all_the_time(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    clock = FakeClock()
    fake = FakeBackend(clock)
    fake.add("web-1")
    kept = entry("web-1", HOUR, first_run="now", max_age=8 * MINUTE)
    async with world(tmp_path, kept, backends=[fake], clock=clock) as w:
        await trio.sleep(600)
        taken = fake.names("web-1")
        fake.fail("state", "web-1", InstanceNotFound("no instance"))
        await trio.sleep(3 * 3600)
        assert w.schedule("web-1").gone_since_at is not None
        clock.suspend(timedelta(days=7))  # in which it may have been there, and gone again
        await trio.sleep(20 * 3600)
        assert fake.names("web-1") == taken
        await trio.sleep(30 * 3600)
        assert fake.names("web-1") == []


async def test_a_file_that_a_reload_finds_invalid_is_made_anew(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    async with started_over(tmp_path, broken) as (w, disk):
        disk.heal()
        await w.engine.reread()
        await trio.sleep(1)
        assert WEB in w.engine.store.schedules


async def test_a_doubted_clock_does_not_begin_to_count_how_long_an_instance_is_gone(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    clock = FakeClock()
    fake = FakeBackend(clock)
    fake.add("web-1")
    async with world(tmp_path, entry("web-1", HOUR, first_run="now"), backends=[fake], clock=clock) as w:
        await trio.sleep(60)
        clock.jump(timedelta(days=-1))
        fake.fail("state", "web-1", InstanceNotFound("no instance"))
        await trio.sleep(2 * 3600)
        assert "no instance" in (w.history()[-1].error or "")
        assert w.schedule("web-1").gone_since_at is None
        clock.jump(timedelta(days=1))
        await trio.sleep(26 * 3600)
        assert w.schedule("web-1").gone_since_at is not None


class PowerCut(FaultyDisk):
    """Remembers the names of the files in a directory as they are durable."""

    names: dict[str, int]

    def sync_directory(self, path: Path) -> None:
        super().sync_directory(path)
        self.names = {file.name: file.stat().st_ino for file in path.iterdir()}

    def strike(self, path: Path) -> None:
        """Cut the power: *path* has the names that are durable."""
        contents = {file.stat().st_ino: file.read_bytes() for file in path.iterdir()}
        for file in path.iterdir():
            file.unlink()
        for name, inode in self.names.items():
            (path / name).write_bytes(contents[inode])


async def test_a_rotation_that_failed_does_not_come_back_with_runs_that_are_over(tmp_path: Path) -> None:
    disk = PowerCut()
    log = RunLog(tmp_path, disk, rotate_bytes=600)
    await log.open()
    await log.append(started(1))
    disk.fail("open_append", once=True)
    await log.append(started(2))  # the log is to be rotated, and can't be
    assert disk.calls["rename"] == 3
    disk.fail("replace")
    await log.append(finished(1))
    await log.append(finished(2))
    log.close()
    disk.heal()
    disk.strike(tmp_path)
    again = RunLog(tmp_path, disk, rotate_bytes=600)
    await again.open()
    for number in range(10, 10 + 8 * OLD_SEGMENTS):  # until what was written before is rotated out
        await again.append(finished(number))
        assert read_log(tmp_path, disk).open_runs() == {}
    again.close()
