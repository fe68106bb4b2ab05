"""What clients ask for while the engine is at the same schedule: their answer holds, and nobody's snapshots suffer."""

import errno
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple

import pytest
import trio
import trio.testing
from attrs import evolve
from trio.testing import MockClock

from hypemand.backends.base import InstanceNotFound
from hypemand.config import RetentionEntry, ScheduleEntry
from hypemand.core.model import InstanceId, ManagedBy, Snapshot
from hypemand.engine.changes import SetSchedule
from hypemand.engine.refusals import UnavailableError
from hypemand.engine.requests import MOST_WAITING, Requests
from tests.disks import FaultyDisk, InlineDisk, LateDisk
from tests.fakes import FakeBackend, FakeClock
from tests.world import World, entry, world

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
HOUR = timedelta(hours=1)
WEB = InstanceId("web-1")


class SlowToReadRetired(InlineDisk):
    """While it has a *gate*, what was read of retired schedules is told once that is open."""

    gate: trio.Event | None = None

    async def call(self, work: Callable[[*Ts], T], *args: *Ts) -> T:
        result = await super().call(work, *args)
        if self.gate is not None and work.__name__ == "read" and any("retired" in str(arg) for arg in args):
            await self.gate.wait()
        return result


class GatedBackend(FakeBackend):
    """Answers the call *late* only once its gate is open."""

    late = ""
    waiting = False
    gate: trio.Event

    async def list_snapshots(self, instance: InstanceId) -> tuple[Snapshot, ...]:
        await self._wait("list")
        return await super().list_snapshots(instance)

    async def delete_snapshot(self, snapshot: Snapshot) -> None:
        await self._wait("delete")
        await super().delete_snapshot(snapshot)

    def be_late(self, call: str) -> None:
        self.late, self.gate = call, trio.Event()

    async def _wait(self, call: str) -> None:
        if self.late == call:
            self.waiting = True
            await self.gate.wait()


@asynccontextmanager
async def asked(tmp_path: Path, *entries: ScheduleEntry, **options: Any) -> AsyncIterator[tuple[World, Requests]]:
    clock = FakeClock()
    fake = GatedBackend(clock)
    fake.add("web-1")
    async with world(tmp_path, *entries, backends=[fake], clock=clock, **options) as made:
        await made.engine.scheduler.serving.wait()
        yield made, Requests(made.engine)


def wanted(interval: timedelta = HOUR, **retention: Any) -> SetSchedule:
    return SetSchedule(interval=interval, retention=RetentionEntry(**retention))


async def until_late(backend: GatedBackend, call: str) -> None:
    """Have the instance gone for so long that its schedule is about to end, and wait until that hangs in *call*."""
    backend.fail("state", "web-1", InstanceNotFound("no instance web-1"))
    await trio.sleep(24.5 * 3600)
    backend.be_late(call)
    while not backend.waiting:
        await trio.sleep(1)


async def test_an_instance_that_is_there_again_while_it_is_pruned_as_gone_keeps_schedule_and_last_snapshot(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with asked(tmp_path) as (made, requests):
        backend = made.backend
        assert isinstance(backend, GatedBackend)
        await requests.put(WEB, wanted(max_age=HOUR), "me")
        for _ in range(2):
            await requests.run_now(WEB)
            await trio.sleep(60)
        await until_late(backend, "delete")
        assert len(backend.machines[WEB].snapshots) == 2
        backend.heal("state", "web-1")
        put = await requests.put(WEB, wanted(max_age=HOUR), "me")
        backend.gate.set()
        await trio.sleep(60)
        assert requests.get(WEB).created_at == put.created_at
        assert [*backend.machines[WEB].snapshots] == [put.last_snapshot_id]


@pytest.mark.parametrize("change", ["put", "delete"])
async def test_what_a_client_changes_while_a_gone_instance_is_looked_at_is_not_undone(
    tmp_path: Path, change: str, autojump_clock: MockClock
) -> None:
    async with asked(tmp_path) as (made, requests):
        backend = made.backend
        assert isinstance(backend, GatedBackend)
        await requests.put(WEB, wanted(max_count=3), "me")
        await requests.run_now(WEB)
        await until_late(backend, "list")
        (snapshot,) = backend.machines[WEB].snapshots.values()
        later = evolve(snapshot, id="later", created_at=made.clock.now() - HOUR)
        backend.machines[WEB].snapshots["later"] = later  # made after the instance is said to have gone
        backend.heal("state", "web-1")
        if change == "put":
            await requests.put(WEB, wanted(2 * HOUR), "me")
        else:
            await requests.delete(WEB, "me")
        backend.gate.set()
        await trio.sleep(60)
        assert [(s.interval, s.gone_since_at) for s in requests.all()] == [(2 * HOUR, None)] * (change == "put")
        assert [path.name for path in (tmp_path / "schedules").glob("*.json")] == ["web-1.json"] * (change == "put")


async def test_an_instance_that_the_config_waits_for_is_the_configs_once_a_client_has_deleted_its_schedule(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with asked(tmp_path) as (made, requests):
        await requests.put(WEB, wanted(), "me")
        await made.apply(entry("web-1", 2 * HOUR))
        await trio.sleep(60)
        assert requests.get(WEB).managed_by is ManagedBy.API
        assert made.engine.problems
        await requests.delete(WEB, "me")
        await trio.sleep(1)
        assert (requests.get(WEB).managed_by, requests.get(WEB).interval) == (ManagedBy.CONFIG, 2 * HOUR)
        assert not made.engine.problems


async def test_once_the_engine_is_closed_an_instance_is_not_said_to_be_unknown(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with asked(tmp_path) as (made, requests):
        before = await requests.put(WEB, wanted(), "me")
        await made.engine.close()
        for instance in ("web-1", "web-2"):
            with pytest.raises(UnavailableError, match="hypemand stops"):
                await requests.put(InstanceId(instance), wanted(2 * HOUR), "me")
        assert requests.get(WEB) == before


async def test_what_is_deleted_does_not_come_back_from_an_earlier_retirement(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    disk = FaultyDisk()
    async with asked(tmp_path, entry("web-1", HOUR, first_run="now"), disk=disk) as (made, requests):
        await trio.sleep(60)
        await made.apply()
        disk.fail("replace", errno.ENOSPC)
        with pytest.raises(UnavailableError):
            await requests.put(WEB, wanted(), "me")
        disk.heal()
        await requests.put(WEB, wanted(), "me")
        await requests.delete(WEB, "me")
        now = made.clock.now()
        anew = await requests.put(WEB, wanted(), "me")
        assert (anew.created_at, anew.last_snapshot_id) == (now, None)


async def test_a_slot_that_comes_up_while_a_deletion_fails_is_not_the_last(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    disk = LateDisk()
    async with asked(tmp_path, disk=disk) as (made, requests), trio.open_nursery() as nursery:
        schedule = await requests.put(WEB, wanted(), "me")
        await trio.sleep((schedule.next_run_at - made.clock.now()).total_seconds() - 1)
        disk.remove = fail_to_remove  # type: ignore[method-assign]

        async def delete() -> None:
            with pytest.raises(UnavailableError):
                await requests.delete(WEB, "me")

        disk.begins = trio.Event()
        nursery.start_soon(delete)
        await trio.sleep(2)
        disk.begins.set()
        disk.begins = None
        await trio.sleep(2 * 3600)
        assert made.outcomes() == ["succeeded"] * 2


async def test_a_run_that_ends_while_its_retired_schedule_is_put_back_is_in_it(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    disk = SlowToReadRetired()
    async with asked(tmp_path, entry("web-1", HOUR), disk=disk) as (made, requests), trio.open_nursery() as nursery:
        run = requests.begin_run(WEB)
        await trio.sleep(0.5)
        await made.apply()
        disk.gate = trio.Event()
        await trio.sleep(5)  # the run is over, and the retired file is being read for it
        nursery.start_soon(requests.put, WEB, wanted(), "me")
        await trio.testing.wait_all_tasks_blocked()
        disk.gate.set()
        ended = await run.ended()
        await trio.sleep(1)
        assert ended is not None
        schedule = requests.get(WEB)
        assert (schedule.last_run_at, schedule.last_snapshot_id) == (ended.started_at, ended.snapshot_id)
        assert not [*(tmp_path / "schedules" / "retired").iterdir()]


async def test_an_update_of_a_schedule_without_a_backend_is_taken_while_the_only_one_does_not_answer(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with asked(tmp_path) as (made, requests):
        before = await requests.put(WEB, wanted(), "me")
        await made.engine.store.put(evolve(before, backend=None))  # as Hypeman writes it
        made.backend.unavailable = True
        assert (await requests.put(WEB, wanted(max_count=9), "me")).retention.max_count == 9


async def test_changes_that_wait_for_a_hung_hypervisor_do_not_pile_up(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    refused: list[UnavailableError] = []
    async with asked(tmp_path) as (made, requests):
        await requests.put(WEB, wanted(), "me")
        made.backend.fail("state", "web-1")

        async def put() -> None:
            try:
                await requests.put(WEB, wanted(2 * HOUR), "me")
            except UnavailableError as error:
                refused.append(error)

        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(put)
        assert len(refused) == 100 - 1 - MOST_WAITING
        assert "too many wait" in str(refused[0])
        assert requests.get(WEB).interval == 2 * HOUR
        assert requests._turns == {}


def fail_to_remove(path: Path) -> None:
    raise OSError(errno.EIO, "input/output error", str(path))
