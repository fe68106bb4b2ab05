"""What clients ask for while the engine is at the same schedule: their answer holds, and nobody's snapshots suffer."""

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
from trio.testing import MockClock

from hypemand.backends.base import InstanceNotFound
from hypemand.config import RetentionEntry, ScheduleEntry
from hypemand.core.model import InstanceId, ManagedBy, Snapshot
from hypemand.engine.requests import NotFoundError, Requests, SetSchedule, UnavailableError
from tests.disks import FaultyDisk, LateDisk
from tests.fakes import FakeBackend, FakeClock
from tests.world import World, entry, world

HOUR = timedelta(hours=1)
WEB = InstanceId("web-1")


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
