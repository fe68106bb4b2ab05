"""What can go wrong with a guest in the middle of its run: the real daemon, real QEMUs, real faults.

After each the guest runs if it ran before, nothing partial is listed, the
next slot works, and no other schedule was late by more than a second.
"""

import os
import re
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trio

from hypemand.backends import qmp
from tests.qemu_backend import operator_job
from tests.qemu_guest import Guest, require_qemu, running_guest
from tests.qemu_site import Site, make_full, resize, running_site, small_filesystem, tags_of, wired

pytestmark = pytest.mark.qemu

both_modes = pytest.mark.parametrize("mode", ["internal", "background"])
SLOW, FAST = 1 << 20, 1 << 40


@pytest.fixture
def sockets() -> Iterator[Path]:
    """A short path: that of a unix socket has 107 bytes at most."""
    require_qemu()
    with tempfile.TemporaryDirectory(prefix="hypemand-") as short:
        yield Path(short)


@asynccontextmanager
async def guest_at_site(
    tmp_path: Path, sockets: Path, mode: str, **guest_settings: Any
) -> AsyncIterator[tuple[Guest, Site]]:
    """A guest whose saves take a while, and the daemon."""
    settings = {"memory_mb": 256, "filled": True, "sockets_in": sockets, **guest_settings}
    async with (
        running_guest(tmp_path, **settings) as guest,
        running_site(tmp_path, guest.socket_template, mode=mode) as site,
    ):
        yield guest, site


@asynccontextmanager
async def in_mid_save(site: Site, guest: Guest, mode: str) -> AsyncIterator[int]:
    """A run of web-1 in the middle of its save; gives the log's mark from before it."""
    async with qmp.connect(guest.test_socket) as monitor:
        mark = await site.run_due()
        with trio.fail_after(30):
            await monitor.wait_event("STOP")
            if mode == "background":
                while (await monitor.execute("query-migrate")).get("status") != "active":
                    await trio.sleep(0.001)
                await monitor.execute("migrate-set-parameters", max_bandwidth=SLOW)
    yield mark


async def let_finish(guest: Guest, mode: str) -> None:
    if mode == "background":
        await guest.qmp("migrate-set-parameters", max_bandwidth=FAST)


@both_modes
async def test_a_qemu_that_is_killed_in_mid_save(tmp_path: Path, sockets: Path, mode: str) -> None:
    async with guest_at_site(tmp_path, sockets, mode) as (guest, site):
        async with in_mid_save(site, guest, mode) as mark:
            await guest.kill()
            await site.assert_others_are_on_time()
        failed = await site.daemon.wait_for("run failed", since=mark, instance_id="web-1")
        assert "ended" in failed["error"]
        async with running_guest(tmp_path, memory_mb=256, sockets_in=sockets) as again:
            await site.assert_next_slot_works(again)
            assert again.serial().count("BOOT") == 1


@both_modes
async def test_a_connection_that_is_cut_in_mid_save(tmp_path: Path, sockets: Path, mode: str) -> None:
    async with running_guest(tmp_path, memory_mb=256, filled=True, sockets_in=sockets) as guest, wired(guest) as wire:
        template = guest.socket_template.with_name(wire.path.name)
        async with running_site(tmp_path, template, mode=mode) as site:
            async with in_mid_save(site, guest, mode) as mark:
                wire.cut()
                await site.assert_others_are_on_time()
                await let_finish(guest, mode)
            # In the background nobody is connected most of the time, and QEMU goes on by itself in any mode.
            await site.settled()
            (run,) = site.lab.history()
            assert run["snapshot_id"] is not None
            was_cut = "was cut" in (run["error"] or "")
            assert was_cut or mode == "background"
            assert run["outcome"] == ("failed" if was_cut else "succeeded")
            assert mark < site.daemon.mark()
            await site.assert_next_slot_works(guest)
            assert guest.serial().count("BOOT") == 1


async def full_in_mid_save(site: Site, guest: Guest, disks: Path) -> int:
    """Have a run whose disk becomes full while it saves; return the mark of the log from which on it is told.

    On a busy machine a save may be over before the disk is full: then another one is begun.
    """
    with trio.fail_after(120):
        while True:
            async with qmp.connect(guest.test_socket) as monitor:
                mark = await site.run_due()
                await monitor.wait_event("STOP")
                make_full(disks)
            with trio.move_on_after(2):
                await site.daemon.wait_for("snapshot taken", since=mark, instance_id=guest.instance_id)
                resize(disks, "900m")
                await site.settled()
                continue
            return mark


@both_modes
async def test_a_disk_that_becomes_full_in_mid_save(tmp_path: Path, sockets: Path, mode: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small filesystem")
    disks = tmp_path / "disks"
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(small_filesystem(disks, "900m"))
        guest = await stack.enter_async_context(
            running_guest(disks, memory_mb=256, filled=True, sockets_in=sockets, log_in=tmp_path)
        )
        site = await stack.enter_async_context(running_site(tmp_path, guest.socket_template, mode=mode))
        mark = await full_in_mid_save(site, guest, disks)
        await site.assert_others_are_on_time()
        failed = await site.daemon.wait_for("run failed", since=mark, instance_id="web-1")
        assert re.search("No space|Input/output error|left no room", failed["error"])
        await guest.next_ticks()
        assert (await guest.qmp("query-status"))["status"] == "running"
        resize(disks, "900m")
        await site.assert_next_slot_works(guest)
        assert guest.serial().count("BOOT") == 1


@both_modes
async def test_a_qemu_that_is_frozen_for_ten_seconds_in_mid_save(tmp_path: Path, sockets: Path, mode: str) -> None:
    async with guest_at_site(tmp_path, sockets, mode) as (guest, site):
        async with in_mid_save(site, guest, mode) as mark:
            guest.process.send_signal(signal.SIGSTOP)
            await site.assert_others_are_on_time()
            await trio.sleep(10)
            guest.process.send_signal(signal.SIGCONT)
            await let_finish(guest, mode)
        await site.daemon.wait_for("snapshot taken", since=mark, instance_id="web-1")
        await site.assert_next_slot_works(guest)
        assert guest.serial().count("BOOT") == 1


@both_modes
async def test_a_qemu_that_is_frozen_when_its_run_begins(tmp_path: Path, sockets: Path, mode: str) -> None:
    async with guest_at_site(tmp_path, sockets, mode) as (guest, site):
        guest.process.send_signal(signal.SIGSTOP)
        mark = await site.run_due()
        await site.assert_others_are_on_time()
        failed = await site.daemon.wait_for("run failed", since=mark, instance_id="web-1")
        # A question of the daemon's start may be the one that gets no answer, and holds the monitor.
        assert re.search("no greeting|QEMU does not answer|did not answer within", failed["error"])
        guest.process.send_signal(signal.SIGCONT)
        await site.assert_next_slot_works(guest)


@both_modes
async def test_a_monitor_that_another_client_holds(tmp_path: Path, sockets: Path, mode: str) -> None:
    async with guest_at_site(tmp_path, sockets, mode) as (guest, site):
        async with qmp.connect(guest.socket):
            mark = await site.run_due()
            await site.assert_others_are_on_time()
            failed = await site.daemon.wait_for("run failed", since=mark, instance_id="web-1")
        assert "another client holds it" in failed["error"]
        await site.assert_next_slot_works(guest)


@both_modes
async def test_a_tag_that_exists(tmp_path: Path, sockets: Path, mode: str) -> None:
    async with guest_at_site(tmp_path, sockets, mode, memory_mb=64) as (guest, site):
        now = datetime.now(UTC)
        taken = [f"scheduled-{now + timedelta(seconds=ahead):%Y%m%d-%H%M%S}" for ahead in range(20)]
        for tag in taken:
            await guest.qmp("blockdev-snapshot-internal-sync", device="disk0", name=tag)
        mark = await site.run_due()
        line = await site.daemon.wait_for("snapshot taken", since=mark, instance_id="web-1")
        assert line["snapshot_name"] not in taken
        await site.assert_others_are_on_time()
        assert (await tags_of(guest))["disk0"] == [*taken, line["snapshot_name"]]
        for tag in taken:
            await operator_job(guest, "snapshot-delete", tag, "disk0")
        await site.assert_next_slot_works(guest)


@both_modes
async def test_a_guest_that_reboots_in_mid_run(tmp_path: Path, sockets: Path, mode: str) -> None:
    async with guest_at_site(tmp_path, sockets, mode, reboots=True) as (guest, site):
        async with in_mid_save(site, guest, mode) as mark:
            await guest.qmp("system_reset")
            await site.assert_others_are_on_time()
            await let_finish(guest, mode)
        await site.daemon.wait_for("snapshot taken", since=mark, instance_id="web-1")
        with trio.fail_after(30):
            while guest.serial().count("BOOT") < 2:
                await trio.sleep(0.01)
        await site.assert_next_slot_works(guest)


@both_modes
async def test_twenty_guests_at_once_with_two_slots(tmp_path: Path, sockets: Path, mode: str) -> None:
    names = [f"web-{number}" for number in range(20)]
    guests: list[Guest] = []

    async with AsyncExitStack() as stack:
        for name in names:
            (tmp_path / name).mkdir()
            started = running_guest(
                tmp_path / name,
                instance_id=name,
                tick_ms=300,
                sockets_in=sockets,
                wait=False,
                memory_mb=32,
                filled=True,
            )
            guests.append(await stack.enter_async_context(started))
        for guest in guests:
            await guest.next_ticks(1)
        template = guests[0].socket_template
        site = await stack.enter_async_context(
            running_site(tmp_path, template, mode=mode, instances=names, concurrency=2)
        )
        mark = await site.run_due(*names)
        await site.daemon.wait_for("capture begins", since=mark)
        await site.assert_others_are_on_time()
        for name in names:
            await site.daemon.wait_for("snapshot taken", since=mark, instance_id=name)
        await site.settled()
        assert most_at_once(site, names) == 2
        for guest in guests:
            assert (await guest.qmp("query-status"))["status"] == "running"
        await guests[7].next_ticks(1)
        await site.assert_next_slot_works(guests[7])


def most_at_once(site: Site, names: list[str]) -> int:
    """How many captures were under way at the same time, by the history."""
    changes = []
    # A busy machine may come to a guest's next slot, too.
    for run in (run for name in names for run in site.lab.history(name) if run["capture_s"] is not None):
        began = datetime.fromisoformat(run["started_at"])
        changes += [(began, 1), (began + timedelta(seconds=run["capture_s"]), -1)]
    now = most = 0
    for _, change in sorted(changes):
        now += change
        most = max(most, now)
    return most
