"""A guest that QEMU stops at a failed write, after a capture or because of one. Real QEMU, failing disks."""

import errno
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from hypemand.backends.base import CaptureFailed, Settled, Status
from hypemand.core.model import Freezer, InstanceState
from tests.qemu_backend import (
    TAG,
    WEB,
    assert_runs,
    captured,
    drafts_in,
    marks_in,
    new_request,
    opened,
    settle,
    tags_on,
)
from tests.qemu_guest import Guest, blockdev, make_disk, running_guest

pytestmark = pytest.mark.qemu

# After a snapshot, the guest's next write to a cluster that the snapshot shares has to copy it first.
FULL = {"cow_write": errno.ENOSPC}
BROKEN = {"cow_write": errno.EIO}
MODES = [pytest.param(Freezer.HYPERVISOR, id="internal"), pytest.param(Freezer.ENGINE, id="background")]


async def state_of(guest: Guest) -> str:
    return str((await guest.qmp("query-status"))["status"])


@asynccontextmanager
async def failing_guest(tmp_path: Path, fails: Mapping[str, int], *, once: bool = True) -> AsyncIterator[Guest]:
    """A guest whose own disk fails after a snapshot; the memory goes to another one, which is sound."""
    before = blockdev("memory", make_disk(tmp_path / "memory.qcow2"))
    async with running_guest(tmp_path, fails=fails, fails_once=once, before=before) as guest:
        yield guest


@pytest.mark.parametrize("freezes", MODES)
async def test_a_snapshot_that_leaves_the_guest_no_room_is_deleted_and_the_guest_goes_on(
    tmp_path: Path, freezes: Freezer
) -> None:
    async with failing_guest(tmp_path, FULL) as guest:
        backend = await opened(guest, tmp_path, mode="background")
        request = new_request(freezes=freezes)
        with pytest.raises(CaptureFailed, match=r"left no room .*web-1\.qcow2.*deleted, and the guest goes on"):
            await captured(backend, request)
        await assert_runs(backend, guest)
        assert await tags_on(guest) == {"disk0": [], "memory": []}
        assert await settle(backend, request) == Settled()
        assert await backend.list_snapshots(WEB) == ()
        assert drafts_in(tmp_path) == []
        assert await marks_in(guest) == []
        await guest.next_ticks(20)


@pytest.mark.parametrize("freezes", MODES)
async def test_a_disk_that_is_too_full_even_to_delete_is_cleared_when_settled_and_the_note_says_what_to_do(
    tmp_path: Path, freezes: Freezer
) -> None:
    async with failing_guest(tmp_path, FULL, once=False) as guest:
        backend = await opened(guest, tmp_path, mode="background")
        request = new_request(freezes=freezes)
        with pytest.raises(CaptureFailed, match=r"could not be deleted yet .*free some, then resume it"):
            await captured(backend, request)
        assert await backend.state(WEB) == Status(InstanceState.UNKNOWN, "io-error")
        settled = await settle(backend, request)
        assert settled.snapshot is None
        # This disk fails for good by now, so that one more try does not help.
        assert ["free some, then resume it" in note for note in settled.notes] == [True]
        assert await backend.list_snapshots(WEB) == ()
        assert await tags_on(guest) == {"disk0": [], "memory": []}


@pytest.mark.parametrize("freezes", MODES)
async def test_any_other_error_of_the_disk_is_told_and_left_alone(tmp_path: Path, freezes: Freezer) -> None:
    async with failing_guest(tmp_path, BROKEN) as guest:
        backend = await opened(guest, tmp_path, mode="background")
        made = await captured(backend, new_request(freezes=freezes))
        (warning,) = made.warnings
        assert "io-error" in warning
        assert "left alone" in warning
        await backend.publish(made.snapshot)
        assert await backend.list_snapshots(WEB) == (made.snapshot,)
        assert await state_of(guest) == "io-error"
        assert await tags_on(guest) == {"disk0": [TAG], "memory": [TAG]}


async def test_a_guest_that_is_stuck_already_is_told_as_it_is(tmp_path: Path) -> None:
    async with failing_guest(tmp_path, BROKEN) as guest:
        backend = await opened(guest, tmp_path)
        await guest.qmp("blockdev-snapshot-internal-sync", device="disk0", name="operators")
        with trio.fail_after(30):
            while await state_of(guest) != "io-error":
                await trio.sleep(0.01)
        assert await backend.state(WEB) == Status(InstanceState.UNKNOWN, "io-error")


async def test_a_save_that_fills_the_disk_itself_fails_and_the_guest_is_continued_once(tmp_path: Path) -> None:
    """The save writes part of a cluster at its end, and so the first copy that fails is its own."""
    async with running_guest(tmp_path, fails=FULL) as guest:
        backend = await opened(guest, tmp_path)
        request = new_request()
        with pytest.raises(CaptureFailed, match="QEMU: "):
            await captured(backend, request)
        assert await settle(backend, request) == Settled()
        await assert_runs(backend, guest)
        assert await tags_on(guest) == {"disk0": []}
