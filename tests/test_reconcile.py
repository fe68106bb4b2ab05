"""The config's schedules in the store: made, changed, retired, put back; what the API made is left alone."""

import errno
import os
from datetime import timedelta, tzinfo
from pathlib import Path

import pytest
import trio
from attrs import define, evolve
from trio.testing import MockClock

from hypemand.backends.base import BackendUnavailable
from hypemand.core.cadence import jitter
from hypemand.core.model import InstanceId, InstanceState, ManagedBy
from hypemand.engine.reconcile import AT_A_TIME
from hypemand.state.codec import encode_schedule
from tests.disks import FaultyDisk
from tests.fakes import START, FakeBackend, FakeClock
from tests.world import entry, world

HOUR, MINUTE, DAY = timedelta(hours=1), timedelta(minutes=1), timedelta(days=1)


async def test_nothing_is_written_when_nothing_changed(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path, entry("web-1", HOUR)) as w:
        before = (tmp_path / "schedules/web-1.json").stat()
        await trio.sleep(60)
        await w.apply(entry("web-1", HOUR))
        after = (tmp_path / "schedules/web-1.json").stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
        assert w.schedule("web-1").updated_at == START


@pytest.mark.parametrize(
    "more",
    [{"max_count": 3}, {"max_age": DAY}, {"metadata": {"a": "b"}}, {"name_prefix": "x"}, {"max_freeze": MINUTE}],
)
async def test_a_change_of_anything_but_the_interval_keeps_the_next_run(
    tmp_path: Path, autojump_clock: MockClock, more: dict[str, object]
) -> None:
    async with world(tmp_path, entry("web-1", HOUR)) as w:
        before = w.schedule("web-1")
        await trio.sleep(60)
        await w.apply(entry("web-1", HOUR, **more))
        after = w.schedule("web-1")
        assert after != before
        assert (after.next_run_at, after.created_at) == (before.next_run_at, before.created_at)
        assert after.updated_at == START + MINUTE


async def test_a_new_interval_begins_a_new_cadence(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path, entry("web-1", HOUR)) as w:
        await trio.sleep(60)
        await w.apply(entry("web-1", DAY))
        assert w.schedule("web-1").next_run_at == START + MINUTE + DAY + jitter("web-1", DAY)


async def test_another_time_of_day_begins_a_new_cadence_and_its_removal_does_not(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with world(tmp_path, entry("web-1", DAY, first_run="02:00")) as w:
        assert w.schedule("web-1").next_run_at == START + HOUR
        await w.apply(entry("web-1", DAY, first_run="03:00"))
        assert w.schedule("web-1").next_run_at == START + 2 * HOUR
        await w.apply(entry("web-1", DAY))
        assert w.schedule("web-1").next_run_at == START + 2 * HOUR


async def test_a_retired_schedule_put_back_resumes_its_cadence_and_history(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with world(tmp_path, entry("web-1", HOUR, first_run="now"), entry("web-2", HOUR)) as w:
        await trio.sleep(60)
        before = w.schedule("web-1")
        await w.apply(entry("web-2", HOUR))
        assert not (tmp_path / "schedules/web-1.json").exists()
        assert (tmp_path / "schedules/retired/web-1.json").exists()
        assert len(w.backend.names("web-1")) == 1, "its snapshots stay"
        await trio.sleep(5 * 3600)
        await w.apply(entry("web-1", HOUR, first_run="now"), entry("web-2", HOUR))
        after = w.schedule("web-1")
        assert (after.created_at, after.last_snapshot_id) == (before.created_at, before.last_snapshot_id)
        assert after.next_run_at == START + 6 * HOUR
        assert not (tmp_path / "schedules/retired/web-1.json").exists()
        assert len(w.history("web-1")) == 1


async def test_a_pattern_takes_in_what_matches_and_what_appears_later(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    clock = FakeClock()
    fake = FakeBackend(clock)
    fake.add("web-1", "web-2", "db-1")
    async with world(tmp_path, entry("web-*", HOUR), backends=[fake], clock=clock) as w:
        assert set(w.engine.store.schedules) == {"web-1", "web-2"}
        fake.add("web-3")
        await trio.sleep(60)
        assert set(w.engine.store.schedules) == {"web-1", "web-2", "web-3"}
        del fake.machines[InstanceId("web-1")]
        await trio.sleep(60)
        assert "web-1" in w.engine.store.schedules, "discovery only adds"


async def test_an_exact_name_wins_over_a_pattern_and_the_first_pattern_over_later_ones(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    clock = FakeClock()
    fake = FakeBackend(clock)
    fake.add("web-1", "web-2", "other")
    entries = [entry("web-*", HOUR), entry("*", DAY), entry("web-2", 2 * HOUR)]
    async with world(tmp_path, *entries, backends=[fake], clock=clock) as w:
        assert {i: s.interval for i, s in w.engine.store.schedules.items()} == {
            "web-1": HOUR,
            "web-2": 2 * HOUR,
            "other": DAY,
        }


async def test_an_instance_that_two_backends_know_is_an_error_that_names_both(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    clock = FakeClock()
    left, right = FakeBackend(clock, name="left"), FakeBackend(clock, name="right")
    left.add("web-1", "web-2")
    right.add("web-1")
    async with world(tmp_path, entry("*", HOUR, backend="left"), backends=[left, right], clock=clock) as w:
        assert set(w.engine.store.schedules) == {"web-2"}
        (problem,) = w.engine.problems
        assert "'web-1'" in problem
        assert "left, right" in problem


async def test_a_hung_backend_delays_discovery_and_start_by_its_time_limit_alone(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    clock = FakeClock()
    left, right = FakeBackend(clock, name="left"), FakeBackend(clock, name="right")
    left.add("a-1")
    right.add("b-1")
    right.fail("instances", "")
    entries = [entry("a-*", HOUR, backend="left", first_run="now"), entry("b-*", HOUR, backend="right")]
    async with world(tmp_path, *entries, backends=[left, right], clock=clock) as w:
        assert trio.current_time() <= 15
        await trio.sleep(12)
        assert w.outcomes() == ["succeeded"]
        right.heal("instances", "")
        await trio.sleep(60)
        assert set(w.engine.store.schedules) == {"a-1", "b-1"}


async def test_a_schedule_of_the_api_is_left_alone_and_the_claim_is_told(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with world(tmp_path, entry("web-1", HOUR)) as w:
        of_api = evolve(w.schedule("web-1"), managed_by=ManagedBy.API, interval=DAY)
        await w.engine.store.put(of_api)
        await w.apply(entry("web-1", HOUR))
        assert w.schedule("web-1") == of_api
        await trio.sleep(1)
        assert "made over the API" in w.engine.problems[0]
        await w.apply()
        assert w.schedule("web-1") == of_api


async def test_a_file_set_aside_is_made_anew_with_what_the_log_still_knows(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with world(tmp_path, entry("web-1", HOUR, first_run="now")) as w:
        await trio.sleep(60)
        last = w.schedule("web-1").last_snapshot_id
        kept = w.backend
    torn = tmp_path / "schedules/web-1.json"
    torn.write_bytes(torn.read_bytes()[:100])
    kept.clock = clock = FakeClock(start=START + 2 * MINUTE)
    async with world(tmp_path, entry("web-1", HOUR, first_run="now"), backends=[kept], clock=clock) as w:
        await trio.sleep(60)
        schedule = w.schedule("web-1")
        assert schedule.last_snapshot_id == last
        assert schedule.next_run_at == START + HOUR
        assert len(w.history()) == 1
        assert len(list((tmp_path / "quarantine").glob("*.note"))) == 1


async def test_a_file_edited_by_hand_is_taken_up_by_a_reload(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path, entry("web-1", HOUR)) as w:
        path = tmp_path / "schedules/web-1.json"
        path.write_bytes(encode_schedule(evolve(w.schedule("web-1"), next_run_at=START + MINUTE)))
        await w.engine.reread()
        await trio.sleep(90)
        assert w.outcomes() == ["succeeded"]


async def test_a_backend_taken_out_in_mid_run_serves_until_the_run_has_ended(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with world(tmp_path, entry("web-1", HOUR, first_run="now")) as w:
        w.backend.capture_s = 100
        await trio.sleep(10)
        await w.engine.apply_config(evolve(w.config, backends={}, schedules=()))
        assert not w.backend.closed
        await trio.sleep(200)
        assert w.backend.closed
        assert w.outcomes() == ["succeeded"]
        assert w.backend.machines[InstanceId("web-1")].state is InstanceState.RUNNING


async def test_a_backend_used_before_is_not_opened_as_new(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path, entry("web-1", HOUR, first_run="now")) as w:
        assert ("open", "first_use=True") in {(call, of) for _, call, of in w.backend.calls}
        await trio.sleep(60)
        kept = w.backend
    kept.calls.clear()
    kept.clock = clock = FakeClock(start=START + 2 * MINUTE)
    async with world(tmp_path, entry("web-1", HOUR, first_run="now"), backends=[kept], clock=clock):
        assert ("open", "first_use=False") in {(call, of) for _, call, of in kept.calls}


async def test_a_backend_that_cannot_be_opened_or_asked_keeps_its_schedules(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with world(tmp_path, entry("web-*", HOUR), entry("db-1", HOUR)) as w:
        w.backend.add("web-1")
        await trio.sleep(60)
        kept = w.backend
    kept.fail("open", "first_use=True", BackendUnavailable("not mounted"))
    kept.unavailable = True
    kept.clock = clock = FakeClock(start=START + 2 * MINUTE)
    async with world(tmp_path, entry("web-*", HOUR), entry("db-1", HOUR), backends=[kept], clock=clock) as w:
        await trio.sleep(60)
        assert set(w.engine.store.schedules) == {"web-1", "db-1"}


# Many at once.

MANY = 300


async def test_new_schedules_are_written_together(tmp_path: Path, autojump_clock: MockClock) -> None:
    disk = FaultyDisk()
    names = [f"vm-{number}" for number in range(MANY)]
    async with world(tmp_path, *(entry(name, DAY) for name in names), disk=disk) as w:
        assert {*w.engine.store.schedules} == {*names}
        assert {path.stem for path in (tmp_path / "schedules").glob("*.json")} == {*names}
    assert disk.calls["sync_directory"] < MANY / 10
    assert disk.calls["read"] < MANY / 10, "that none of them was retired is seen at one look"


async def test_of_many_that_are_put_back_each_has_its_history(tmp_path: Path, autojump_clock: MockClock) -> None:
    names = [f"vm-{number}" for number in range(MANY)]
    async with world(tmp_path, *(entry(name, DAY) for name in names)) as w:
        before = {name: w.schedule(name).created_at for name in names}
        await w.apply()
        assert w.engine.store.schedules == {}
        await trio.sleep(3600)
        await w.apply(*(entry(name, DAY) for name in [*names, "new"]))
        assert {name: w.schedule(name).created_at for name in names} == before
        assert w.schedule("new").created_at == START + HOUR
        assert list((tmp_path / "schedules/retired").iterdir()) == []


async def test_where_the_retired_ones_cannot_be_listed_each_is_looked_for(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path, entry("web-1", HOUR)) as w:
        before = w.schedule("web-1")
        await w.apply()
        await trio.sleep(3600)
        with monkeypatch.context() as patched:
            patched.setattr("hypemand.state.store.os.listdir", refuse)
            await w.apply(entry("web-1", HOUR))
        assert w.schedule("web-1").created_at == before.created_at


def refuse(path: Path) -> list[str]:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


async def test_while_many_are_looked_through_that_stay_as_they_are_others_have_their_turns(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    count = 10 * AT_A_TIME
    schedules = [entry(f"vm-{number}", DAY) for number in range(count)]
    clock = CountingClock()
    async with world(tmp_path, *schedules, clock=clock) as w, trio.open_nursery() as nursery:
        turns, before = Turns(), clock.zones
        nursery.start_soon(turns.count)
        await w.apply(*schedules)
        assert turns.taken >= count / AT_A_TIME
        assert clock.zones - before <= 2, "the zone is a file, and read for all of them at once"
        nursery.cancel_scope.cancel()


class Turns:
    """Counts how often others are let go on."""

    taken = 0

    async def count(self) -> None:
        while True:
            self.taken += 1
            await trio.lowlevel.checkpoint()


@define
class CountingClock(FakeClock):
    zones: int = 0

    def zone(self) -> tzinfo:
        self.zones += 1
        return FakeClock.zone(self)
