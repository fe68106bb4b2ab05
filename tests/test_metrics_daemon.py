"""The metrics of a real daemon, as they come out of its doors."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import httpx
import trio

from hypemand.surface.http.sockets import short_path
from tests.processes import PATIENCE_S, SLOW, Lab, running_daemon
from tests.prometheus import OPENMETRICS, Page, documented, promtool


async def get(client: httpx.AsyncClient, accept: str = "") -> httpx.Response:
    answer = await client.get("/metrics", headers={"accept": accept})
    assert answer.status_code == 200, answer.text
    return answer


@asynccontextmanager
async def over_socket(lab: Lab) -> AsyncIterator[httpx.AsyncClient]:
    with short_path(lab.state / "api.sock") as path:
        transport = httpx.AsyncHTTPTransport(uds=path)
        async with httpx.AsyncClient(transport=transport, base_url="http://hypemand", timeout=PATIENCE_S) as client:
            yield client


async def page_where(client: httpx.AsyncClient, holds: Callable[[Page], bool], what: str) -> Page:
    """The first page of which *holds* is true."""
    with trio.move_on_after(PATIENCE_S):
        while not holds(page := Page.plain((await get(client)).content)):
            await trio.sleep(0.05)
        return page
    raise AssertionError(f"never: {what}")


def is_counted(page: Page) -> bool:
    return bool(page.value("hypemand_snapshots_kept", "web-1"))


async def test_a_daemon_tells_of_its_runs_before_and_after_a_restart(tmp_path: Path) -> None:
    lab = Lab(tmp_path).write()
    async with running_daemon(lab.config) as daemon:
        await lab.recorded()
        async with over_socket(lab) as client:
            page = await page_where(client, is_counted, "the snapshot is counted")
            plain, openmetrics = await get(client), await get(client, OPENMETRICS)
        await daemon.stop()
    run = lab.history()[0]
    assert page.value("hypemand_runs_total", "web-1", outcome="succeeded", trigger="schedule") == 1
    assert page.value("hypemand_snapshots_kept_bytes", "web-1") == run["size_bytes"]
    assert page.value("hypemand_last_run_freeze_seconds", "web-1") == run["freeze_s"]
    assert page.value("hypemand_guard_wanted") == page.value("hypemand_guard_alive") == 1
    assert (page.value("process_resident_memory_bytes") or 0) > 10**6
    assert plain.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert Page.openmetrics(openmetrics.content).families.keys() == page.families.keys() == documented().keys()
    assert all(family.samples for family in page.families.values())
    assert promtool("check", "metrics", stdin=plain.content) is None
    async with running_daemon(lab.config) as daemon:
        await daemon.wait_for("next run")
        async with over_socket(lab) as client:
            after = await page_where(client, lambda _: True, "it answers")
        await daemon.stop()
    made_at = datetime.fromisoformat(run["started_at"]).astimezone(UTC).timestamp()
    assert after.value("hypemand_last_good_snapshot_timestamp_seconds", "web-1") == made_at
    assert after.value("hypemand_runs_total", "web-1", outcome="succeeded", trigger="schedule") == 0


async def test_a_guest_that_stands_still_is_seen_from_outside(tmp_path: Path) -> None:
    lab = Lab(tmp_path).write(backend=SLOW)
    async with running_daemon(lab.config) as daemon:
        await lab.in_mid_capture()
        async with over_socket(lab) as client:
            page = await page_where(client, lambda page: bool(page.value("hypemand_frozen_seconds", "web-1")), "frozen")
        assert daemon.alive
    assert page.value("hypemand_runs_under_way") == 1
    assert page.value("hypemand_freeze_budget_seconds", "web-1") == 120
