"""Mode background against a real QEMU: a freeze of milliseconds, the memory saved while the guest runs."""

import errno
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import evolve

from hypemand.backends import qmp
from hypemand.backends.base import (
    Backend,
    BackendError,
    BackendUnavailable,
    CaptureFailed,
    CaptureRequest,
    InvalidState,
    Settled,
    Status,
    Unsupported,
)
from hypemand.backends.catalog import Catalog, Manifest
from hypemand.backends.qemu import background, capturing, completing, memory_file, readying
from hypemand.core.model import Freezer, InstanceState, SnapshotKind
from tests.qemu_backend import (
    TAG,
    WEB,
    assert_runs,
    backend_of,
    begun,
    captured,
    drafts_in,
    marks_in,
    new_request,
    opened,
    operator_job,
    settle,
    tags_on,
    take,
)
from tests.qemu_guest import Guest, blockdev, make_disk, running_guest

pytestmark = pytest.mark.qemu

DEFAULT_BANDWIDTH = 128 << 20
SLOW = 1 << 20


async def opened_in_background(guest: Guest, tmp_path: Path) -> Backend:
    return await opened(guest, tmp_path, mode="background")


def background_request(name: str = TAG) -> CaptureRequest:
    return new_request(name, freezes=Freezer.ENGINE)


async def slow_down(guest: Guest) -> None:
    """Have a save that is under way take minutes."""
    await guest.qmp("migrate-set-parameters", max_bandwidth=SLOW)
    assert await migration(guest) == "active"


async def speed_up(guest: Guest) -> None:
    await guest.qmp("migrate-set-parameters", max_bandwidth=1 << 40)


async def migration(guest: Guest) -> str | None:
    status: str | None = (await guest.qmp("query-migrate")).get("status")
    return status


async def assert_no_trace(guest: Guest, tmp_path: Path) -> None:
    """In QEMU and in the catalog all is as if hypemand had never been there."""
    assert await marks_in(guest) == []
    assert await guest.qmp("query-jobs") == []
    assert await guest.qmp("query-fdsets") == []
    assert (await guest.qmp("query-migrate-parameters"))["max-bandwidth"] == DEFAULT_BANDWIDTH
    assert [c for c in await guest.qmp("query-migrate-capabilities") if c["state"]] == []
    assert drafts_in(tmp_path) == []
    assert [name for name in open_files(guest) if "/memory" in name] == []
    assert not is_write_protected(guest)


def is_write_protected(guest: Guest) -> bool:
    """Whether the guest would hang at its next write to memory that it has not written to for a while."""
    smaps = Path(f"/proc/{guest.process.pid}/smaps").read_text()
    return any(" uw" in line for line in smaps.splitlines() if line.startswith("VmFlags"))


async def ends_well(guest: Guest) -> bool:
    """Whether this QEMU can cancel a save without harm."""
    version = (await guest.qmp("query-version"))["qemu"]
    return (version["major"], version["minor"]) >= (8, 1)


def open_files(guest: Guest) -> list[str]:
    directory = Path(f"/proc/{guest.process.pid}/fd")
    return [str(path.readlink()) for path in directory.iterdir() if path.is_symlink()]


async def assert_nothing_left(guest: Guest, tmp_path: Path, backend: Backend) -> None:
    await assert_no_trace(guest, tmp_path)
    assert set(map(tuple, (await tags_on(guest)).values())) == {()}
    assert await backend.list_snapshots(WEB) == ()
    await assert_runs(backend, guest)


async def test_the_guest_runs_while_its_memory_is_saved_and_the_snapshot_is_listed_when_it_is_whole(
    tmp_path: Path,
) -> None:
    extra = blockdev("disk1", make_disk(tmp_path / "second.qcow2"))
    async with running_guest(tmp_path, filled=True, extra=extra) as guest:
        backend = await opened_in_background(guest, tmp_path)
        prepared = await backend.prepare(WEB, SnapshotKind.STANDBY)
        assert (prepared.freezes, prepared.warnings) == (Freezer.ENGINE, ())
        begin = await begun(backend, background_request())
        await slow_down(guest)
        await guest.next_ticks(20)
        assert await migration(guest) == "active"
        await speed_up(guest)
        made = await backend.complete(begin)
        assert await backend.list_snapshots(WEB) == ()
        await backend.publish(made.snapshot)
        assert await backend.list_snapshots(WEB) == (made.snapshot,)
        memory = tmp_path / "catalog" / WEB / made.snapshot.id / "memory"
        assert made.snapshot.size_bytes == memory.stat().st_size > 40 << 20
        assert made.freeze_s is not None
        assert 0 < made.freeze_s < 5
        assert await tags_on(guest) == {"disk0": [TAG], "disk1": [TAG]}
        await assert_no_trace(guest, tmp_path)
        await assert_runs(backend, guest)
        await backend.delete_snapshot(made.snapshot)
        assert not memory.exists()
        await assert_nothing_left(guest, tmp_path, backend)


async def test_it_asks_for_room_for_the_memory_in_the_catalog(tmp_path: Path) -> None:
    async with running_guest(tmp_path) as guest:
        backend = await opened_in_background(guest, tmp_path)
        on_disk, in_catalog = (await backend.prepare(WEB, SnapshotKind.STANDBY)).rooms
        assert (on_disk.path, in_catalog.path) == (guest.disk, tmp_path / "catalog")
        assert on_disk.needed_bytes < 64 << 20 < in_catalog.needed_bytes


async def test_our_stop_is_marked_inside_qemu_with_the_runs_id(tmp_path: Path) -> None:
    async with running_guest(tmp_path) as guest:
        backend = await opened_in_background(guest, tmp_path)
        request = background_request()
        await backend.pause(WEB, request)
        assert await backend.state(WEB) == Status(InstanceState.PAUSED)
        await backend.aclose()  # the monitor that the test asks by is another one, but one may do
        assert f"hypemand-paused-{request.run_id}" in await marks_in(guest)
        await backend.resume(WEB)
        assert f"hypemand-paused-{request.run_id}" not in await marks_in(guest)
        assert await settle(backend, request) == Settled()
        await assert_nothing_left(guest, tmp_path, backend)


async def test_a_pause_of_an_operator_just_before_ours_is_left_alone(tmp_path: Path) -> None:
    async with running_guest(tmp_path) as guest:
        backend = await opened_in_background(guest, tmp_path)
        await guest.qmp("stop")
        request = background_request()
        with pytest.raises(InvalidState, match="somebody else"):
            await backend.pause(WEB, request)
        assert await settle(backend, request) == Settled()
        assert await backend.state(WEB) == Status(InstanceState.PAUSED)


async def test_a_save_that_is_cancelled_harms_no_guest_and_leaves_nothing_or_a_whole_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before 8.1, QEMU would leave the guest's memory protected, and so the guest frozen."""
    async with running_guest(tmp_path, filled=True, reboots=True) as guest:
        backend = await opened_in_background(guest, tmp_path)
        request = background_request()
        begin = await begun(backend, request)
        await slow_down(guest)
        with trio.move_on_after(0.3) as budget:
            await backend.complete(begin)
        assert budget.cancelled_caught
        await assert_runs(backend, guest)
        if await ends_well(guest):
            assert await settle(backend, request) == Settled()
            assert await migration(guest) == "cancelled"
            await assert_nothing_left(guest, tmp_path, backend)
        else:
            monkeypatch.setattr("hypemand.backends.qemu.settling._SAVING_PATIENCE_S", 0.1)
            with pytest.raises(BackendUnavailable, match="still being saved"):
                await settle(backend, request)
            await speed_up(guest)
            monkeypatch.setattr("hypemand.backends.qemu.settling._SAVING_PATIENCE_S", 25.0)
            settled = await settle(backend, request)
            assert settled.snapshot is not None
            await backend.delete_snapshot(settled.snapshot)
            await assert_nothing_left(guest, tmp_path, backend)
        await guest.qmp("system_reset")  # it writes to all of its memory then
        with trio.fail_after(30):
            while guest.serial().count("BOOT") < 2:
                await trio.sleep(0.01)
        await assert_runs(backend, guest)
        await take(backend, freezes=Freezer.ENGINE)


async def test_a_capture_that_is_cancelled_in_the_pause_leaves_a_running_guest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = background.begin

    async def begin_and_hang(monitor: qmp.Monitor, uri: str, since: int) -> None:
        await begin(monitor, uri, since)
        await monitor.execute("migrate-set-parameters", max_bandwidth=SLOW)
        await trio.sleep_forever()

    monkeypatch.setattr(background, "begin", begin_and_hang)
    async with running_guest(tmp_path, filled=True) as guest:
        backend = await opened_in_background(guest, tmp_path)
        request = background_request()
        with trio.move_on_after(0.5):
            await begun(backend, request)
        await assert_runs(backend, guest)
        await speed_up(guest)
        settled = await settle(backend, request)
        assert (settled.snapshot is None) == await ends_well(guest)
        for snapshot in await backend.list_snapshots(WEB):
            await backend.delete_snapshot(snapshot)
        await assert_nothing_left(guest, tmp_path, backend)


KILLED = """
import datetime, os, signal, trio
from pathlib import Path
from hypemand.backends import base, registry
from hypemand.core.model import Freezer, SnapshotKind

async def main():
    backend = registry.connect("vms", {connection!r}, base.Surroundings(Path("/nonexistent")))
    request = base.CaptureRequest(
        run_id={run_id!r}, name={tag!r}, kind=SnapshotKind.STANDBY, tags={{}},
        created_at=datetime.datetime.now(datetime.UTC), freezes=Freezer.ENGINE,
    )
    for call in {calls!r}:
        if call == "resume":
            await backend.resume({instance!r})
        else:
            await getattr(backend, call)({instance!r}, request)
    os.kill(os.getpid(), signal.SIGKILL)

trio.run(main)
"""


async def hypemand_killed_after(backend: Backend, request: CaptureRequest, *calls: str) -> None:
    """Another process that does *calls* on the backend, and is killed at once then."""
    code = KILLED.format(
        connection=dict(backend.connection), run_id=request.run_id, tag=request.name, calls=calls, instance=WEB
    )
    with trio.fail_after(30):
        done = await trio.run_process([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL


async def test_hypemand_killed_in_the_pause_leaves_a_guest_that_settling_resumes(tmp_path: Path) -> None:
    async with running_guest(tmp_path, filled=True) as guest:
        backend = await opened_in_background(guest, tmp_path)
        request = background_request()
        await hypemand_killed_after(backend, request, "pause")
        assert await backend.state(WEB) == Status(InstanceState.PAUSED)
        settled = await settle(backend, request)
        assert (settled.resumed, settled.snapshot) == (True, None)
        await assert_nothing_left(guest, tmp_path, backend)
        assert await settle(backend, request) == Settled()


async def test_a_guest_is_resumed_even_while_the_catalog_is_not_there(tmp_path: Path) -> None:
    async with running_guest(tmp_path) as guest:
        backend = await opened_in_background(guest, tmp_path)
        request = background_request()
        await hypemand_killed_after(backend, request, "pause")
        (tmp_path / "catalog").rename(tmp_path / "unmounted")
        with pytest.raises(BackendUnavailable, match="mounted"):
            await settle(backend, request)
        await assert_runs(backend, guest)
        (tmp_path / "unmounted").rename(tmp_path / "catalog")
        assert await settle(backend, request) == Settled(resumed=True)
        assert await settle(backend, request) == Settled()
        await assert_nothing_left(guest, tmp_path, backend)


async def test_after_the_resume_a_pause_is_an_operators_even_if_the_run_was_never_settled(tmp_path: Path) -> None:
    async with running_guest(tmp_path, filled=True) as guest:
        backend = await opened_in_background(guest, tmp_path)
        request = background_request()
        await hypemand_killed_after(backend, request, "pause", "capture", "resume")
        await guest.qmp("stop")
        settled = await settle(backend, request)
        assert not settled.resumed
        assert await backend.state(WEB) == Status(InstanceState.PAUSED)


async def test_hypemand_killed_while_memory_is_saved_loses_nothing_the_snapshot_is_adopted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hypemand.backends.qemu.settling._SAVING_PATIENCE_S", 25.0)  # however busy this machine is
    async with running_guest(tmp_path, memory_mb=256, filled=True) as guest:
        backend = await opened_in_background(guest, tmp_path)
        request = background_request()
        await hypemand_killed_after(backend, request, "pause", "capture")
        settled = await settle(backend, request)
        assert settled.snapshot is not None
        assert settled.snapshot.size_bytes > 200 << 20
        assert await backend.list_snapshots(WEB) == (settled.snapshot,)
        await assert_no_trace(guest, tmp_path)
        await assert_runs(backend, guest)


async def test_a_save_that_still_goes_on_is_not_settled_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hypemand.backends.qemu.settling._SAVING_PATIENCE_S", 0.5)
    async with running_guest(tmp_path, filled=True) as guest:
        backend = await opened_in_background(guest, tmp_path)
        request = background_request()
        await begun(backend, request)
        await slow_down(guest)
        with pytest.raises(BackendUnavailable, match="still being saved"):
            await settle(backend, request)
        await speed_up(guest)
        monkeypatch.setattr("hypemand.backends.qemu.settling._SAVING_PATIENCE_S", 25.0)
        settled = await settle(backend, request)
        assert settled.snapshot is not None


async def test_a_save_of_an_earlier_run_that_is_long_over_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    """QEMU goes on telling of a migration that is completed until the next one begins."""
    async with running_guest(tmp_path) as guest:
        backend = await opened_in_background(guest, tmp_path)
        first = await take(backend, "first", freezes=Freezer.ENGINE)
        request = background_request()
        await hypemand_killed_after(backend, request, "pause")
        assert await migration(guest) == "completed"
        settled = await settle(backend, request)
        assert (settled.resumed, settled.snapshot) == (True, None)
        assert await backend.list_snapshots(WEB) == (first,)


async def test_a_qemu_that_ends_while_memory_is_saved_fails_the_capture_and_its_disks_are_cleared(
    tmp_path: Path,
) -> None:
    request = background_request()
    async with running_guest(tmp_path, filled=True) as guest:
        backend = await opened_in_background(guest, tmp_path)
        begin = await begun(backend, request)
        await slow_down(guest)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guest.kill)
            with trio.fail_after(20), pytest.raises(CaptureFailed, match="QEMU has ended"):
                await backend.complete(begin)
        assert await settle(backend, request) == Settled()
        assert drafts_in(tmp_path) == []
    async with running_guest(tmp_path) as guest:
        backend = backend_of(guest, tmp_path, mode="background")
        assert await tags_on(guest) == {"disk0": []}
        await take(backend, freezes=Freezer.ENGINE)


async def test_a_save_that_does_not_advance_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completing, "STALL_S", 1.0)
    async with running_guest(tmp_path, filled=True) as guest:
        backend = await opened_in_background(guest, tmp_path)
        request = background_request()
        begin = await begun(backend, request)
        await slow_down(guest)
        guest.process.send_signal(signal.SIGSTOP)
        try:
            with trio.fail_after(30), pytest.raises(CaptureFailed, match="nothing was saved"):
                await backend.complete(begin)
        finally:
            guest.process.send_signal(signal.SIGCONT)
        await assert_runs(backend, guest)
        await speed_up(guest)
        settled = await settle(backend, request)
        assert settled.snapshot is not None
        assert await backend.list_snapshots(WEB) == (settled.snapshot,)
        await assert_no_trace(guest, tmp_path)


async def test_a_guest_that_reboots_while_its_memory_is_saved_harms_nothing(tmp_path: Path) -> None:
    async with running_guest(tmp_path, filled=True, reboots=True) as guest:
        backend = await opened_in_background(guest, tmp_path)
        begin = await begun(backend, background_request())
        await slow_down(guest)
        await guest.qmp("system_reset")
        await speed_up(guest)
        made = await backend.complete(begin)
        await backend.publish(made.snapshot)
        assert await backend.list_snapshots(WEB) == (made.snapshot,)
        with trio.fail_after(30):
            while guest.serial().count("BOOT") < 2:
                await trio.sleep(0.01)
        await assert_runs(backend, guest)


async def test_a_qemu_that_cannot_do_it_falls_back_to_internal_and_says_why(tmp_path: Path) -> None:
    async with running_guest(tmp_path) as guest:
        await guest.qmp("migrate-set-capabilities", capabilities=[{"capability": "xbzrle", "state": True}])
        backend = await opened_in_background(guest, tmp_path)
        prepared = await backend.prepare(WEB, SnapshotKind.STANDBY)
        assert prepared.freezes is Freezer.HYPERVISOR
        (warning,) = prepared.warnings
        assert "xbzrle" in warning
        assert "internal" in warning
        (room,) = prepared.rooms
        assert room.path == guest.disk
        snapshot = await take(backend, freezes=prepared.freezes)
        assert await backend.list_snapshots(WEB) == (snapshot,)
        on = {c["capability"] for c in await guest.qmp("query-migrate-capabilities") if c["state"]}
        assert on == {"xbzrle"}


async def test_a_foreign_migration_fails_the_capture_and_is_named_and_left_alone(tmp_path: Path) -> None:
    async with running_guest(tmp_path, filled=True) as guest:
        backend = await opened_in_background(guest, tmp_path)
        await guest.qmp("migrate-set-parameters", max_bandwidth=SLOW)
        await guest.qmp("migrate", uri="exec:cat >/dev/null")
        with pytest.raises(BackendUnavailable, match="migration"):
            await backend.prepare(WEB, SnapshotKind.STANDBY)
        for request in (background_request(), new_request()):
            with pytest.raises(CaptureFailed, match="migration"):
                await captured(backend, request)
            assert await settle(backend, request) == Settled()
        assert await migration(guest) == "active"
        assert await tags_on(guest) == {"disk0": []}
        await assert_runs(backend, guest)


async def test_a_foreign_job_fails_the_capture_and_is_named_and_left_alone(tmp_path: Path) -> None:
    async with running_guest(tmp_path) as guest:
        backend = await opened_in_background(guest, tmp_path)
        target = str(tmp_path / "copy.qcow2")
        arguments = {"device": "disk0", "target": target, "format": "qcow2", "sync": "full", "speed": 4096}
        await guest.qmp("drive-backup", job_id="weekly-backup", **arguments)
        with pytest.raises(BackendUnavailable, match=r"'weekly-backup' \(backup"):
            await backend.prepare(WEB, SnapshotKind.STANDBY)
        for request in (background_request(), new_request()):
            with pytest.raises(CaptureFailed, match="weekly-backup"):
                await captured(backend, request)
            assert await settle(backend, request) == Settled()
        (job,) = await guest.qmp("query-jobs")
        assert (job["id"], job["status"]) == ("weekly-backup", "running")
        await assert_runs(backend, guest)


async def test_a_foreign_backup_job_hides_no_snapshot_and_loses_none(tmp_path: Path) -> None:
    """It puts a filter over the disk, below which the snapshots are."""
    async with running_guest(tmp_path) as guest:
        backend = await opened_in_background(guest, tmp_path)
        kept = await take(backend, "kept", freezes=Freezer.ENGINE)
        request = background_request()
        await captured(backend, request)
        arguments = {"device": "disk0", "target": str(tmp_path / "copy.qcow2"), "format": "qcow2", "sync": "full"}
        await guest.qmp("drive-backup", job_id="weekly-backup", speed=1, **arguments)
        for call in (
            lambda: backend.list_snapshots(WEB),
            lambda: backend.delete_snapshot(kept),
            lambda: settle(backend, request),
        ):
            with pytest.raises(BackendUnavailable, match="somebody else's job"):
                await call()
        await guest.qmp("job-cancel", id="weekly-backup")
        with trio.fail_after(30):
            while await guest.qmp("query-jobs"):
                await trio.sleep(0.01)
        settled = await settle(backend, request)
        assert settled.snapshot is not None
        assert await backend.list_snapshots(WEB) == (kept, settled.snapshot)


async def test_memory_whose_snapshot_is_gone_from_the_disk_is_told(tmp_path: Path, heard_log: list[Any]) -> None:
    async with running_guest(tmp_path) as guest:
        backend = await opened_in_background(guest, tmp_path)
        made = await take(backend, freezes=Freezer.ENGINE)
        await operator_job(guest, "snapshot-delete", TAG, "disk0")
        assert await backend.list_snapshots(WEB) == ()
    assert [line["snapshot_name"] for line in heard_log if "gone from its disk" in line["event"]] == [made.name]


async def test_a_guest_whose_state_cannot_be_saved_is_refused_with_qemus_reason(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    extra = ["-virtfs", f"local,path={shared},mount_tag=shared,security_model=none"]
    async with running_guest(tmp_path, extra=extra) as guest:
        backend = await opened_in_background(guest, tmp_path)
        async with qmp.connect(guest.test_socket) as monitor:
            blocked = "blocked-reasons" in await monitor.execute("query-migrate")
        if blocked:
            with pytest.raises(Unsupported, match="can't save"):
                await backend.prepare(WEB, SnapshotKind.STANDBY)
        else:
            assert (await backend.prepare(WEB, SnapshotKind.STANDBY)).warnings == ()


async def test_a_catalog_without_room_for_the_memory_fails_the_capture_before_the_guest_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readying, "memory_estimate", more_than_any_filesystem)
    async with running_guest(tmp_path) as guest, qmp.connect(guest.test_socket) as monitor:
        backend = await opened_in_background(guest, tmp_path)
        request = background_request()
        with pytest.raises(BackendError, match=r"No space left|File too large"):
            await backend.make_ready(WEB, request)
        await monitor.execute("query-status")
        assert [event for event in monitor.events if event.name == "STOP"] == []
    assert drafts_in(tmp_path) != []


async def test_what_was_made_ready_for_a_pause_that_never_came_leaves_no_trace(tmp_path: Path) -> None:
    async with running_guest(tmp_path) as guest:
        backend = await opened_in_background(guest, tmp_path)
        request = background_request()
        await backend.make_ready(WEB, request)
        assert await settle(backend, request) == Settled()
        assert (await marks_in(guest), drafts_in(tmp_path)) == ([], [])
        async with qmp.connect(guest.socket) as monitor:  # which serves one client: ours has let go of it
            assert (await monitor.execute("query-status"))["status"] == "running"
        await captured(backend, background_request("run-2"))
        await assert_runs(backend, guest)


async def test_a_pause_finds_what_was_made_ready_and_makes_it_once(tmp_path: Path) -> None:
    async with running_guest(tmp_path) as guest:
        backend = await opened_in_background(guest, tmp_path)
        request = background_request()
        await backend.make_ready(WEB, request)
        (draft,) = drafts_in(tmp_path)
        made = draft.stat()
        await backend.make_ready(WEB, request)
        await backend.pause(WEB, request)
        assert draft.stat().st_ino == made.st_ino
        taken = await backend.capture(WEB, request)
        await backend.resume(WEB)
        assert taken.snapshot.id == request.run_id


async def more_than_any_filesystem(monitor: qmp.Monitor) -> int:
    return 1 << 50


async def test_where_no_room_can_be_reserved_an_old_qemu_falls_back_to_internal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hypemand.backends.qemu.preparing.can_reserve", lambda directory: False)
    async with running_guest(tmp_path) as guest:
        backend = await opened_in_background(guest, tmp_path)
        prepared = await backend.prepare(WEB, SnapshotKind.STANDBY)
        if await ends_well(guest):
            assert (prepared.freezes, prepared.warnings) == (Freezer.ENGINE, ())
        else:
            assert prepared.freezes is Freezer.HYPERVISOR
            assert "can't reserve room" in prepared.warnings[0]


def test_room_that_was_reserved_and_not_needed_is_given_back(tmp_path: Path) -> None:
    assert memory_file.can_reserve(tmp_path)
    path = tmp_path / "memory"
    descriptor = memory_file.open_reserved(path, 8 << 20)
    os.write(descriptor, bytes(4096))
    os.close(descriptor)
    assert path.stat().st_blocks * 512 >= 8 << 20
    assert memory_file.trim(path) == 4096
    assert path.stat().st_blocks * 512 < 1 << 20
    assert memory_file.trim(tmp_path / "missing") == 0


async def test_a_connection_that_is_lost_in_the_pause_leaves_a_running_guest_and_no_made_up_freeze(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = background.begin

    async def begin_and_lose(monitor: qmp.Monitor, uri: str, since: int) -> None:
        await begin(monitor, uri, since)
        with socket.socket(fileno=os.dup(monitor._stream.socket.fileno())) as line:
            line.shutdown(socket.SHUT_RDWR)

    monkeypatch.setattr(background, "begin", begin_and_lose)
    async with running_guest(tmp_path, filled=True) as guest:
        backend = await opened_in_background(guest, tmp_path)
        request = background_request()
        begun_one = await begun(backend, request)
        await assert_runs(backend, guest)
        made = await backend.complete(begun_one)
        assert made.freeze_s is None
        await backend.publish(made.snapshot)
        await assert_no_trace(guest, tmp_path)


async def test_a_qemu_that_ends_in_the_pause_has_nothing_to_resume(tmp_path: Path) -> None:
    async with running_guest(tmp_path) as guest:
        backend = await opened_in_background(guest, tmp_path)
        request = background_request()
        await backend.pause(WEB, request)
        await guest.kill()
        await backend.resume(WEB)
        assert await settle(backend, request) == Settled()
        assert drafts_in(tmp_path) == []


async def test_a_qemu_that_lives_without_its_monitor_is_still_to_be_resumed(tmp_path: Path) -> None:
    async with running_guest(tmp_path) as guest:
        backend = await opened_in_background(guest, tmp_path)
        request = background_request()
        await backend.pause(WEB, request)
        await backend.aclose()
        guest.socket.rename(guest.socket.with_suffix(".away"))
        with pytest.raises(BackendUnavailable, match="a running QEMU holds"):
            await backend.resume(WEB)
        guest.socket.with_suffix(".away").rename(guest.socket)
        await backend.resume(WEB)
        await assert_runs(backend, guest)
        assert await settle(backend, request) == Settled()
        await assert_nothing_left(guest, tmp_path, backend)


@pytest.mark.parametrize("freezes", [Freezer.HYPERVISOR, Freezer.ENGINE])
async def test_a_disk_that_is_taken_away_after_it_was_listed_fails_or_is_left_out(
    tmp_path: Path, freezes: Freezer
) -> None:
    second = make_disk(tmp_path / "second.qcow2")
    spec = {"driver": "qcow2", "node-name": "disk1", "file": {"driver": "file", "filename": str(second)}}
    extra = [
        *("-device", "virtio-scsi-pci", "-blockdev", json.dumps(spec)),
        *("-device", "scsi-hd,drive=disk1,id=hot"),
    ]
    async with running_guest(tmp_path, extra=extra) as guest:
        backend = await opened_in_background(guest, tmp_path)
        request = new_request(freezes=freezes)
        assert len((await backend.prepare(WEB, SnapshotKind.STANDBY)).rooms) == 3
        if freezes is Freezer.ENGINE:
            await backend.pause(WEB, request)
        async with qmp.connect(guest.test_socket) as monitor:
            await monitor.execute("device_del", id="hot")
            with trio.fail_after(30):
                await monitor.wait_event("DEVICE_DELETED")
            await monitor.execute("blockdev-del", node_name="disk1")
        if freezes is Freezer.ENGINE:
            with pytest.raises(CaptureFailed, match="disk1"):
                await backend.capture(WEB, request)
            await backend.resume(WEB)
            settled = await settle(backend, request)
            assert settled.snapshot is None
            assert await tags_on(guest) == {"disk0": []}
        else:
            made = await captured(backend, request)
            await backend.publish(made.snapshot)
            assert await tags_on(guest) == {"disk0": [TAG]}
        await assert_runs(backend, guest)
        await take(backend, "next", freezes=freezes)


async def test_a_guest_that_somebody_lets_go_on_in_our_pause_is_no_torn_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = background.begin

    async def begin_after_a_foreign_cont(monitor: qmp.Monitor, uri: str, since: int) -> None:
        await guest.qmp("cont")
        await guest.next_ticks(3)
        await begin(monitor, uri, since)

    monkeypatch.setattr(background, "begin", begin_after_a_foreign_cont)
    async with running_guest(tmp_path) as guest:
        backend = await opened_in_background(guest, tmp_path)
        request = background_request()
        with pytest.raises(CaptureFailed, match="somebody let the guest go on"):
            await begun(backend, request)
        await assert_runs(backend, guest)
        assert await settle(backend, request) == Settled()
        await assert_nothing_left(guest, tmp_path, backend)


async def test_memory_that_was_lost_by_a_power_failure_is_not_adopted(tmp_path: Path) -> None:
    async with running_guest(tmp_path, filled=True) as guest:
        backend = await opened_in_background(guest, tmp_path)
        request = background_request()
        await captured(backend, request)
        (memory,) = tmp_path.glob("catalog/*/.*/memory")
        os.truncate(memory, 4096)
        assert await settle(backend, request) == Settled()
        await assert_nothing_left(guest, tmp_path, backend)


async def test_a_migration_of_somebody_else_that_is_complete_is_not_taken_for_our_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU tells of its last migration only, not whose it was."""
    async with running_guest(tmp_path, filled=True) as guest:
        backend = await opened_in_background(guest, tmp_path)
        request = background_request()
        begin = await begun(backend, request)
        await slow_down(guest)
        (memory,) = tmp_path.glob("catalog/*/.*/memory")
        told = await guest.qmp("query-migrate")
        whole = background.Progress(status="completed", pages=9, written=told["ram"]["total"], total=0, error="")

        async def of_another(monitor: qmp.Monitor) -> background.Progress:
            return whole

        monkeypatch.setattr(background, "progress_of", of_another)
        with pytest.raises(CaptureFailed, match="somebody else has migrated"):
            await backend.complete(begin)
        assert memory.stat().st_size < whole.written
        monkeypatch.undo()
        assert await migration(guest) == "active"  # not cancelled: it might have been theirs
        await speed_up(guest)
        assert (await settle(backend, request)).snapshot is not None


def test_a_save_is_told_by_what_it_has_written() -> None:
    progress = background.Progress(status="active", pages=1, written=100 << 20, total=0, error="")
    assert background.is_into(progress, 99 << 20, 101 << 20)
    assert not background.is_into(progress, 10 << 20, 12 << 20)
    assert not background.is_into(progress, 300 << 20, 300 << 20)
    assert not background.is_whole(progress, 100 << 20)
    done = evolve(progress, status="completed")
    assert background.is_whole(done, 101 << 20)
    assert not background.is_whole(done, 98 << 20)
    assert not background.is_whole(done, 400 << 20)


async def test_a_capability_that_a_killed_hypemand_has_left_on_is_set_off(tmp_path: Path) -> None:
    async with running_guest(tmp_path) as guest:
        on = [{"capability": "background-snapshot", "state": True}]
        await guest.qmp("migrate-set-capabilities", capabilities=on)
        backend = await opened_in_background(guest, tmp_path)
        made = await take(backend, freezes=Freezer.ENGINE)
        await assert_no_trace(guest, tmp_path)
        await backend.delete_snapshot(made)


async def test_a_qemu_that_does_not_say_whether_it_can_is_unavailable_and_not_taken_for_able(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(monitor: qmp.Monitor, *, on: bool) -> None:
        await trio.sleep_forever()

    async with running_guest(tmp_path) as guest:
        backend = await opened_in_background(guest, tmp_path)
        monkeypatch.setattr(background, "_set_capability", hang)
        monkeypatch.setattr(background, "_SHIELDED_S", 0.1)
        with trio.fail_after(20), pytest.raises(BackendUnavailable, match="did not answer"):
            await backend.prepare(WEB, SnapshotKind.STANDBY)


async def test_a_migration_that_is_set_to_tls_falls_back_with_the_reason(tmp_path: Path) -> None:
    async with running_guest(tmp_path) as guest:
        await guest.qmp("migrate-set-parameters", tls_creds="tls0")
        backend = await opened_in_background(guest, tmp_path)
        prepared = await backend.prepare(WEB, SnapshotKind.STANDBY)
        assert prepared.freezes is Freezer.HYPERVISOR
        assert "TLS" in prepared.warnings[0]


@pytest.mark.parametrize("freezes", [Freezer.HYPERVISOR, Freezer.ENGINE])
async def test_a_name_that_somebody_takes_in_the_last_moment_stays_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, freezes: Freezer
) -> None:
    """Two daemons over one guest would fire in the same second."""
    write_draft = readying.write_draft

    async def write_and_lose_the_race(catalog: Catalog, draft: Manifest) -> None:
        await write_draft(catalog, draft)
        await guest.qmp("blockdev-snapshot-internal-sync", device="disk0", name=draft.name)

    for module in (readying, capturing):
        monkeypatch.setattr(module, "write_draft", write_and_lose_the_race)
    async with running_guest(tmp_path) as guest:
        backend = await opened_in_background(guest, tmp_path)
        request = new_request(freezes=freezes)
        with pytest.raises(CaptureFailed, match="already exists"):
            await captured(backend, request)
        assert await settle(backend, request) == Settled()
        assert await tags_on(guest) == {"disk0": [TAG]}
        assert await marks_in(guest) == []
        assert drafts_in(tmp_path) == []
        await assert_runs(backend, guest)


async def test_a_guest_that_is_stuck_at_a_write_when_it_is_resumed_is_not_resumed_for_ever(tmp_path: Path) -> None:
    async with running_guest(tmp_path, fails={"cow_write": errno.EIO}) as guest:
        backend = await opened_in_background(guest, tmp_path)
        request = background_request()
        await backend.pause(WEB, request)
        await backend.capture(WEB, request)
        await guest.qmp("cont")
        with trio.fail_after(30):
            while (await guest.qmp("query-status"))["status"] != "io-error":
                await trio.sleep(0.01)
        await backend.resume(WEB)
        assert [mark for mark in await marks_in(guest) if "paused" in mark] == []
