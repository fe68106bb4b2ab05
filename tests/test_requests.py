"""What clients may ask: schedules made, changed and deleted by the API's rules, whatever else goes on."""

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from attrs import evolve
from structlog.typing import EventDict
from trio.testing import MockClock

from hypemand.backends.base import BackendUnavailable
from hypemand.config import RetentionEntry, ScheduleEntry
from hypemand.core.cadence import jitter
from hypemand.core.model import InstanceId, ManagedBy, Retention
from hypemand.engine.changes import SetSchedule
from hypemand.engine.refusals import ConflictError, NotFoundError, UnavailableError
from hypemand.engine.requests import Requests
from hypemand.state.codec import decode_schedule
from tests.disks import FaultyDisk, LateDisk
from tests.fakes import FakeBackend, FakeClock
from tests.world import World, entry, world

HOUR = timedelta(hours=1)
WEB = InstanceId("web-1")
KEEP_3 = RetentionEntry(max_count=3)


@asynccontextmanager
async def asked(
    tmp_path: Path, *entries: ScheduleEntry, machines: tuple[str, ...] = ("web-1",), **options: Any
) -> AsyncIterator[tuple[World, Requests]]:
    async with world(tmp_path, *entries, **options) as made:
        if "backends" not in options:
            made.backend.add(*(set(machines) - made.backend.machines.keys()))
        await made.engine.scheduler.serving.wait()
        yield made, Requests(made.engine)


def wanted(interval: timedelta = HOUR, retention: RetentionEntry = KEEP_3, **more: Any) -> SetSchedule:
    return SetSchedule(interval=interval, retention=retention, **more)


def on_disk(made: World) -> Any:
    return decode_schedule((made.state_dir / "schedules" / "web-1.json").read_bytes(), WEB)


async def test_a_new_schedule_has_its_first_run_an_interval_and_its_jitter_away(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with asked(tmp_path) as (made, requests):
        await trio.sleep(10)
        now = made.clock.now()
        schedule = await requests.put(WEB, wanted(metadata={"team": "x"}, name_prefix="nightly"), "me")
        assert schedule.next_run_at == now + HOUR + jitter(WEB, HOUR)
        assert (schedule.created_at, schedule.updated_at) == (now, now)
        assert (schedule.backend, schedule.managed_by) == ("fake", ManagedBy.API)
        assert (schedule.metadata, schedule.name_prefix) == ({"team": "x"}, "nightly")
        assert on_disk(made) == schedule == requests.get(WEB)
        await trio.sleep((schedule.next_run_at - now).total_seconds() + 5)
        assert made.outcomes() == ["succeeded"]


async def test_an_update_of_anything_but_the_interval_keeps_the_cadence_and_what_was(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with asked(tmp_path) as (made, requests):
        await requests.put(WEB, wanted(), "me")
        await requests.run_now(WEB)
        await trio.sleep(600)
        before = requests.get(WEB)
        new = wanted(retention=RetentionEntry(max_age=HOUR), metadata={"a": "b"}, name_prefix="x")
        after = await requests.put(WEB, new, "me")
        kept = evolve(before, updated_at=made.clock.now(), retention=Retention(max_age=HOUR))
        assert after == evolve(kept, metadata={"a": "b"}, name_prefix="x")
        assert after.last_snapshot_id is not None
        assert await requests.put(WEB, new, "me") == after


async def test_a_new_interval_begins_a_new_cadence(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with asked(tmp_path) as (made, requests):
        first = await requests.put(WEB, wanted(), "me")
        await trio.sleep(600)
        now = made.clock.now()
        after = await requests.put(WEB, wanted(timedelta(minutes=5)), "me")
        assert after.next_run_at == now + timedelta(minutes=5) + jitter(WEB, timedelta(minutes=5))
        assert after.created_at == first.created_at
        await trio.sleep(660)
        assert made.outcomes() == ["succeeded"] * 2


async def test_what_an_update_leaves_out_is_unset(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with asked(tmp_path) as (_, requests):
        await requests.put(WEB, wanted(metadata={"a": "b"}, name_prefix="x"), "me")
        after = await requests.put(WEB, wanted(retention=RetentionEntry(), name_prefix=""), "me")
        assert (after.metadata, after.name_prefix, after.retention) == ({}, None, Retention())


async def test_what_is_kept_for_ever_is_warned_about(
    tmp_path: Path, heard_log: list[EventDict], autojump_clock: MockClock
) -> None:
    async with asked(tmp_path) as (_, requests):
        await requests.put(WEB, wanted(retention=RetentionEntry(max_count=0)), "me")
        await requests.put(WEB, wanted(), "me")
    warned = [line for line in heard_log if line["log_level"] == "warning"]
    assert [(line["event"], line["instance_id"]) for line in warned] == [
        ("schedule sets no limit: its snapshots are kept for ever", "web-1")
    ]


async def test_a_put_that_changes_nothing_is_no_news(
    tmp_path: Path, heard_log: list[EventDict], autojump_clock: MockClock
) -> None:
    for_ever = wanted(retention=RetentionEntry())
    async with asked(tmp_path) as (made, requests):
        first = await requests.put(WEB, for_ever, "me")
        heard_log.clear()
        await trio.sleep(60)
        again = await requests.put(WEB, for_ever, "me")
        assert again == evolve(first, updated_at=made.clock.now())
        assert [line["log_level"] for line in heard_log] == ["debug"]
        await requests.put(WEB, wanted(2 * HOUR, RetentionEntry()), "me")
        assert [(line["log_level"], line["event"]) for line in heard_log[1:]] == [
            ("info", "schedule changed by a client")
        ]


async def test_keys_of_a_later_version_survive_an_update(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with asked(tmp_path) as (made, requests):
        schedule = await requests.put(WEB, wanted(), "me")
        newer = evolve(schedule, retention=evolve(schedule.retention, extra={"max_bytes": 1}), extra={"color": "red"})
        await made.engine.store.put(newer)
        after = await requests.put(WEB, wanted(retention=RetentionEntry(max_count=9)), "me")
        assert after.retention == Retention(max_count=9, extra={"max_bytes": 1})
        assert on_disk(made).extra == {"color": "red"}


async def test_the_configs_schedules_are_left_to_the_config(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with asked(tmp_path, entry("web-1", HOUR), entry("db-*", HOUR), machines=("web-1",)) as (made, requests):
        before = requests.get(WEB)
        for refused in (lambda: requests.put(WEB, wanted(), "me"), lambda: requests.delete(WEB, "me")):
            with pytest.raises(ConflictError, match="managed by the config file") as conflict:
                await refused()
            assert conflict.value.lasting
        assert requests.get(WEB) == before
        made.backend.add("db-1")  # a moment ago: no schedule was made for it yet
        with pytest.raises(ConflictError, match=r"the pattern 'db-\*'") as conflict:
            await requests.put(InstanceId("db-1"), wanted(), "me")
        assert conflict.value.lasting


async def test_a_schedule_whose_file_cannot_be_read_is_not_replaced(tmp_path: Path, autojump_clock: MockClock) -> None:
    disk = FaultyDisk()
    disk.fail("read", name="web-1.json")
    (tmp_path / "schedules").mkdir()
    (tmp_path / "schedules" / "web-1.json").write_text("{}")
    async with asked(tmp_path, disk=disk) as (_, requests):
        with pytest.raises(ConflictError, match="has a file that can't be read"):
            await requests.put(WEB, wanted(), "me")
        with pytest.raises(ConflictError, match="has a file that can't be read"):
            await requests.delete(WEB, "me")
    assert (tmp_path / "schedules" / "web-1.json").read_text() == "{}"


async def test_an_instance_that_nobody_knows_gets_no_schedule(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with asked(tmp_path) as (_, requests):
        with pytest.raises(NotFoundError, match="no backend knows an instance 'web-9'"):
            await requests.put(InstanceId("web-9"), wanted(), "me")
        with pytest.raises(NotFoundError, match="'web-9' has no snapshot schedule"):
            await requests.delete(InstanceId("web-9"), "me")
        assert (requests.all(), requests._turns) == ([], {})


async def test_an_instance_that_does_not_answer_but_is_known_is_accepted(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with asked(tmp_path) as (made, requests):
        await requests.put(WEB, wanted(), "me")
        made.backend.unavailable = True
        after = await requests.put(WEB, wanted(retention=RetentionEntry(max_count=9)), "me")
        assert after.retention.max_count == 9
        made.backend.unavailable = False
        made.backend.fail("state", "web-1")  # hangs
        began = trio.current_time()
        await requests.put(WEB, wanted(), "me")
        assert trio.current_time() - began == 5


async def test_whether_an_instance_exists_is_not_guessed(tmp_path: Path, autojump_clock: MockClock) -> None:
    clock = FakeClock()
    good, bad = FakeBackend(clock, "good"), FakeBackend(clock, "bad")
    good.add("web-1")
    bad.add("web-9")
    bad.unavailable = True
    async with asked(tmp_path, backends=[good, bad], clock=clock) as (_, requests):
        with pytest.raises(UnavailableError, match="can't be told now: no answer from bad"):
            await requests.put(InstanceId("web-9"), wanted(), "me")
        assert (await requests.put(WEB, wanted(), "me")).backend == "good"


async def test_a_bug_in_one_backend_refuses_nothing_to_the_others(tmp_path: Path, autojump_clock: MockClock) -> None:
    clock = FakeClock()
    good, bad = FakeBackend(clock, "good"), FakeBackend(clock, "bad")
    good.add("web-1")
    bad.fail("state", "web-1", ZeroDivisionError("oops"))
    async with asked(tmp_path, backends=[good, bad], clock=clock) as (_, requests):
        assert (await requests.put(WEB, wanted(), "me")).backend == "good"


async def test_an_instance_of_two_backends_is_refused_and_never_moved_to_the_other(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    clock = FakeClock()
    one, two = FakeBackend(clock, "one"), FakeBackend(clock, "two")
    one.add("web-1")
    async with asked(tmp_path, backends=[one, two], clock=clock) as (_, requests):
        await requests.put(WEB, wanted(), "me")
        two.add("web-1")
        with pytest.raises(ConflictError, match="known to several backends: one, two") as conflict:
            await requests.put(WEB, wanted(), "me")
        assert conflict.value.lasting
        one.unavailable = True
        with pytest.raises(UnavailableError, match="is that of one, which does not answer, and two knows"):
            await requests.put(WEB, wanted(), "me")
        assert requests.get(WEB).backend == "one"


async def test_a_schedule_that_the_config_gave_up_is_taken_over_with_its_history(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with asked(tmp_path, entry("web-1", HOUR, enabled=True, first_run="now")) as (made, requests):
        await trio.sleep(60)
        before = requests.get(WEB)
        await made.apply()
        assert requests.all() == []
        await trio.sleep(3 * 3600)
        after = await requests.put(WEB, wanted(), "me")
        assert (after.created_at, after.last_snapshot_id) == (before.created_at, before.last_snapshot_id)
        assert (after.managed_by, after.settings.first_run) == (ManagedBy.API, None)
        grid = (after.next_run_at - before.next_run_at) / HOUR
        assert grid == int(grid)
        assert made.clock.now() < after.next_run_at <= made.clock.now() + HOUR
        assert list((tmp_path / "schedules" / "retired").iterdir()) == []


async def test_a_deleted_schedule_runs_no_more_and_its_snapshots_stay(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with asked(tmp_path) as (made, requests):
        await requests.put(WEB, wanted(), "me")
        await requests.run_now(WEB)
        await requests.delete(WEB, "me")
        with pytest.raises(NotFoundError):
            requests.get(WEB)
        await trio.sleep(3 * 3600)
        assert made.outcomes() == ["succeeded"]
        assert len(made.backend.machines[WEB].snapshots) == 1
        assert list((tmp_path / "schedules").glob("*.json")) == []


async def test_a_schedule_whose_file_cannot_be_deleted_stays(tmp_path: Path, autojump_clock: MockClock) -> None:
    disk = FaultyDisk()
    async with asked(tmp_path, disk=disk) as (made, requests):
        schedule = await requests.put(WEB, wanted(), "me")
        disk.fail("remove", errno.EIO)
        with pytest.raises(UnavailableError, match="can't be written now"):
            await requests.delete(WEB, "me")
        assert requests.get(WEB) == schedule
        await trio.sleep(2 * 3600)
        assert made.outcomes() == ["succeeded"]
        disk.heal()
        await requests.delete(WEB, "me")
        assert not (tmp_path / "schedules" / "web-1.json").exists()


async def test_on_a_full_disk_a_schedule_is_refused_and_written_when_there_is_room(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    disk = FaultyDisk()
    async with asked(tmp_path, disk=disk) as (made, requests):
        disk.fail("replace", errno.ENOSPC)
        with pytest.raises(UnavailableError, match="can't be written now"):
            await requests.put(WEB, wanted(), "me")
        assert not (tmp_path / "schedules" / "web-1.json").exists()
        disk.heal()
        await trio.sleep(5)
        assert on_disk(made) == requests.get(WEB)
        await trio.sleep(2 * 3600)
        assert made.outcomes() == ["succeeded"]


async def test_a_run_that_ends_while_a_change_waits_loses_nothing(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with asked(tmp_path) as (made, requests), trio.open_nursery() as nursery:
        await requests.put(WEB, wanted(), "me")
        made.backend.capture_s = 2
        nursery.start_soon(requests.run_now, WEB)
        await trio.sleep(1)
        made.backend.fail("state", "web-1")  # the change waits 5 s for an answer, the run ends meanwhile
        after = await requests.put(WEB, wanted(retention=RetentionEntry(max_count=9)), "me")
        (run,) = made.history()
        assert (after.last_snapshot_id, after.last_run_at) == (run.snapshot_id, run.started_at)
        assert after.retention.max_count == 9
        assert on_disk(made) == after


async def test_a_change_during_a_run_survives_its_end(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with asked(tmp_path) as (made, requests), trio.open_nursery() as nursery:
        await requests.put(WEB, wanted(), "me")
        nursery.start_soon(requests.run_now, WEB)
        await trio.sleep(0.5)
        changed = await requests.put(WEB, wanted(timedelta(hours=7), metadata={"a": "b"}), "me")
        await trio.sleep(5)
        (run,) = made.history()
        assert requests.get(WEB) == evolve(changed, last_run_at=run.started_at, last_snapshot_id=run.snapshot_id)


async def test_what_is_asked_of_one_instance_is_done_in_turn_and_holds_up_no_other(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with asked(tmp_path, machines=("web-1", "web-2")) as (made, requests), trio.open_nursery() as nursery:
        await requests.put(WEB, wanted(), "me")
        made.backend.fail("state", "web-1")  # hangs: the change takes 5 s
        nursery.start_soon(requests.put, WEB, wanted(2 * HOUR), "first")
        await trio.testing.wait_all_tasks_blocked()
        began = trio.current_time()
        nursery.start_soon(requests.delete, WEB, "second")
        await requests.put(InstanceId("web-2"), wanted(), "third")
        assert trio.current_time() == began
        assert requests.get(WEB).interval == HOUR
        await trio.sleep(10)
        assert [schedule.instance_id for schedule in requests.all()] == ["web-2"]


async def test_whatever_many_clients_and_the_config_ask_at_once_the_file_is_what_is_in_force(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    refusals: list[Exception] = []
    async with asked(tmp_path) as (made, requests):

        async def change(number: int) -> None:
            await trio.sleep(number % 7)
            try:
                if number % 3:
                    await requests.put(WEB, wanted(timedelta(hours=number)), f"client {number}")
                else:
                    await requests.delete(WEB, f"client {number}")
            except (NotFoundError, ConflictError) as error:
                refusals.append(error)

        for second in range(4):
            made.backend.faults.clear()
            async with trio.open_nursery() as nursery:
                for number in range(1, 30):
                    nursery.start_soon(change, number)
                await trio.sleep(second)
                await made.apply(*[entry("web-1", HOUR)] * (second % 2))
            in_force = made.engine.store.schedules.get(WEB)
            path = tmp_path / "schedules" / "web-1.json"
            assert (on_disk(made) if path.exists() else None) == in_force
            assert not made.engine.store.unsaved
        assert refusals
        assert all(isinstance(error, NotFoundError | ConflictError) for error in refusals)
        assert requests._turns == {}


async def test_a_schedule_that_comes_into_the_config_meanwhile_is_the_configs(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    disk = LateDisk()
    async with asked(tmp_path, entry("web-1", HOUR), disk=disk) as (made, requests), trio.open_nursery() as nursery:
        await made.apply()

        async def put() -> None:
            with pytest.raises(ConflictError, match="managed by the config"):
                await requests.put(WEB, wanted(), "me")

        disk.gate = trio.Event()
        nursery.start_soon(put)  # it reads the retired file
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(made.apply, entry("web-1", 2 * HOUR))
        await trio.testing.wait_all_tasks_blocked()
        disk.gate.set()
        disk.gate = None
        await trio.sleep(60)
        assert (requests.get(WEB).managed_by, requests.get(WEB).interval) == (ManagedBy.CONFIG, 2 * HOUR)


async def test_a_pattern_that_comes_into_the_config_meanwhile_is_seen(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    disk = LateDisk()
    async with asked(tmp_path, entry("web-1", HOUR), disk=disk) as (made, requests), trio.open_nursery() as nursery:
        await made.apply()
        made.backend.fail("instances", "", BackendUnavailable("busy"))  # so that nothing is made of the pattern yet

        async def put() -> None:
            with pytest.raises(ConflictError, match=r"the pattern 'web-\*'"):
                await requests.put(WEB, wanted(), "me")

        disk.gate = trio.Event()
        nursery.start_soon(put)  # it reads the retired file
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(made.apply, entry("web-*", HOUR))
        await trio.testing.wait_all_tasks_blocked()
        disk.gate.set()
        disk.gate = None
        await trio.sleep(60)
        assert requests.all() == []
        made.backend.heal("instances", "")
        await trio.sleep(60)
        assert requests.get(WEB).managed_by is ManagedBy.CONFIG
