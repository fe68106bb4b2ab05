"""The server that tests are made with: what it says is what Hypeman's own client takes, and asks for."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import hypeman
import pytest
import trio
from hypeman import Hypeman
from hypeman.types import Instance, Snapshot, SnapshotSchedule

from tests.hypeman_server.answers import TOKEN
from tests.hypeman_site import WEB, Site, running_server


@asynccontextmanager
async def clients_site(tmp_path: Path) -> AsyncIterator[tuple[Site, Hypeman]]:
    """A server, and the official client, which takes nothing that its models don't know."""
    async with running_server(tmp_path) as site:
        with Hypeman(api_key=TOKEN, base_url=site.url, max_retries=0, _strict_response_validation=True) as client:
            yield site, client


async def called(call: Callable[..., Any], *args: Any, **keys: Any) -> Any:
    return await trio.to_thread.run_sync(lambda: call(*args, **keys))


async def test_instances_are_what_the_official_client_knows(tmp_path: Path) -> None:
    async with clients_site(tmp_path) as (site, client):
        for state in ("Created", "Initializing", "Running", "Paused", "Shutdown", "Stopped", "Standby", "Unknown"):
            site.set_state(state)
            found = await called(client.instances.get, WEB)
            assert isinstance(found, Instance)
            assert (found.id, found.state) == (WEB, state)
        (listed,) = await called(client.instances.list)
        assert isinstance(listed, Instance)
        assert (await called(client.instances.get, site.guest()["name"])).id == WEB
        assert (await called(client.instances.get, WEB[:5])).id == WEB


async def test_snapshots_are_made_listed_restored_and_deleted_by_the_official_client(tmp_path: Path) -> None:
    async with clients_site(tmp_path) as (site, client):
        made = await called(
            client.instances.snapshots.create, WEB, kind="Standby", name="before", tags={"team": "back end"}
        )
        assert isinstance(made, Snapshot)
        assert (made.name, made.kind, made.tags, site.state()) == ("before", "Standby", {"team": "back end"}, "Running")
        assert made.created_at.tzinfo is not None
        assert [one.id for one in await called(client.snapshots.list, source_instance_id=WEB)] == [made.id]
        assert await called(client.snapshots.list, source_instance_id="other") == []
        assert (await called(client.snapshots.get, made.id)).id == made.id
        with pytest.raises(hypeman.ConflictError):
            await called(client.instances.snapshots.restore, made.id, id=WEB)
        site.set_state("Stopped")
        back = await called(client.instances.snapshots.restore, made.id, id=WEB)
        assert (back.state, site.guest()["went_back_to"]) == ("Running", made.id)
        await called(client.snapshots.delete, made.id)
        with pytest.raises(hypeman.NotFoundError):
            await called(client.snapshots.delete, made.id)


async def test_a_guest_goes_to_standby_and_back_by_the_official_client(tmp_path: Path) -> None:
    async with clients_site(tmp_path) as (site, client):
        assert (await called(client.instances.standby, WEB)).state == "Standby"
        made = await called(client.instances.snapshots.create, WEB, kind="Standby")
        assert (made.kind, site.state()) == ("Standby", "Standby")
        assert (await called(client.instances.restore, WEB)).state == "Running"
        with pytest.raises(hypeman.ConflictError):
            await called(client.instances.restore, WEB)


async def test_schedules_are_what_the_official_client_knows(tmp_path: Path) -> None:
    async with clients_site(tmp_path) as (site, client):
        schedule = client.instances.snapshot_schedule
        with pytest.raises(hypeman.NotFoundError):
            await called(schedule.get, WEB)
        made = await called(
            schedule.update, WEB, interval="24h", retention={"max_age": "168h", "max_count": 7}, name_prefix="nightly"
        )
        assert isinstance(made, SnapshotSchedule)
        assert (made.interval, made.retention.max_count, made.name_prefix) == ("24h", 7, "nightly")
        site.add_schedule()
        read = await called(schedule.get, WEB)
        assert (read.metadata, read.last_snapshot_id) == ({"team": "backend"}, "q7z1w7l2af4l8y7q1h7g2m3s")
        assert (read.next_run_at - read.created_at).days > 0
        await called(schedule.delete, WEB)
        assert not site.has_schedule()


@pytest.mark.parametrize(
    ("broken", "error"),
    [
        ({"kind": "Whole"}, hypeman.BadRequestError),
        ({"kind": "Standby", "name": "-nightly"}, hypeman.BadRequestError),
        ({"kind": "Standby", "tags": {f"key-{number}": "x" for number in range(51)}}, hypeman.BadRequestError),
        ({"kind": "Standby", "tags": {"a*b": "x"}}, hypeman.BadRequestError),
        ({"kind": "Stopped"}, hypeman.ConflictError),
        ({"kind": "Standby", "name": "taken"}, hypeman.ConflictError),
    ],
)
async def test_what_hypeman_refuses_is_refused(tmp_path: Path, broken: dict[str, Any], error: type[Exception]) -> None:
    async with clients_site(tmp_path) as (site, client):
        site.add_snapshot("taken", at="2026-03-09T01:00:00Z")
        with pytest.raises(error):
            await called(client.instances.snapshots.create, WEB, **broken)
        assert site.state() == "Running"


async def test_nobody_gets_in_without_the_token(tmp_path: Path) -> None:
    async with clients_site(tmp_path) as (site, _):
        stranger = Hypeman(api_key="another", base_url=site.url, max_retries=0)
        with stranger, pytest.raises(hypeman.AuthenticationError, match="invalid token"):
            await called(stranger.instances.list)


async def test_the_context_of_a_capture_ends_with_its_connection_and_the_guest_is_left_down(tmp_path: Path) -> None:
    async with running_server(tmp_path) as site:
        site.fault(f"POST /instances/{WEB}/snapshots", takes_s=60)
        hasty = Hypeman(api_key=TOKEN, base_url=site.url, max_retries=0, timeout=0.3)
        with hasty, pytest.raises(hypeman.APITimeoutError):
            await called(hasty.instances.snapshots.create, WEB, kind="Standby")
        with Hypeman(api_key=TOKEN, base_url=site.url) as client:
            assert (await called(client.instances.get, WEB)).state == "Standby"
        assert site.snapshots() == []


async def test_a_server_that_is_killed_in_mid_snapshot_leaves_the_guest_in_standby(tmp_path: Path) -> None:
    async with running_server(tmp_path) as site, trio.open_nursery() as nursery:
        site.fault(f"POST /instances/{WEB}/snapshots", takes_s=60)
        client = Hypeman(api_key=TOKEN, base_url=site.url, max_retries=0)

        async def cut_short() -> None:
            with pytest.raises(hypeman.APIConnectionError):
                await called(client.instances.snapshots.create, WEB, kind="Standby")

        nursery.start_soon(cut_short)
        with trio.fail_after(30):
            while site.state() != "Standby":
                await trio.sleep(0.01)
        await site.kill()
        await site.start()
        assert (site.state(), site.snapshots()) == ("Standby", [])
        client.close()
