"""The qemu backend against a real QEMU."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from attrs import evolve

from hypemand.backends import qmp, registry
from hypemand.backends.base import (
    BackendUnavailable,
    CaptureFailed,
    InvalidState,
    Settled,
    Status,
    Surroundings,
    Unsupported,
)
from hypemand.backends.qemu.backend import QemuBackend
from hypemand.backends.qemu.disks import check_capturable
from hypemand.backends.qemu.names import is_remote, lasting_names
from hypemand.core.errors import InvalidInput
from hypemand.core.model import Freezer, InstanceState, SnapshotKind
from tests.qemu_backend import (
    TAG,
    WEB,
    assert_runs,
    backend_of,
    cancel,
    capture_until_stop,
    captured,
    drafts_in,
    make_backend,
    marks_in,
    new_request,
    opened,
    operator_job,
    settle,
    tags_on,
    take,
)
from tests.qemu_guest import TICKER, blockdev, make_disk, run_img, running_guest
from tests.runs import run_of

pytestmark = pytest.mark.qemu

VIRTIO = ["-device", "virtio-blk-pci,drive=data"]


async def test_a_capture_is_listed_with_its_name_and_tags_and_the_guest_goes_on(tmp_path: Path) -> None:
    async with running_guest(tmp_path, filled=True) as guest:
        backend = await opened(guest, tmp_path)
        request = new_request()
        made = await captured(backend, request)
        assert await backend.list_snapshots(WEB) == ()
        await backend.publish(made.snapshot)
        await backend.publish(made.snapshot)
        (listed,) = await backend.list_snapshots(WEB)
        assert listed == made.snapshot
        assert (listed.id, listed.name, listed.tags) == (request.run_id, TAG, {"team": "backend"})
        assert listed.size_bytes > 40 * 1024 * 1024
        assert made.freeze_s is not None
        assert 0 < made.freeze_s < 30
        assert await guest.qmp("query-jobs") == []
        await assert_runs(backend, guest)


async def test_a_restored_guest_counts_on_from_the_tick_in_memory_and_on_disk(tmp_path: Path) -> None:
    second = make_disk(tmp_path / "second.qcow2")
    extra = ["-drive", f"if=virtio,format=qcow2,file={second}"]
    async with running_guest(tmp_path, extra=extra) as guest:
        backend = await opened(guest, tmp_path)
        before = guest.ticks()[-1]
        await take(backend)
        after = (await guest.next_ticks())[-1]
        disk = guest.disk
    raw = tmp_path / "saved.raw"
    run_img("convert", "-l", f"snapshot.name={TAG}", "-O", "raw", disk, raw)
    on_disk = int.from_bytes(raw.read_bytes()[4096:4100], "little")
    assert before - 1 <= on_disk <= after
    async with running_guest(tmp_path, extra=extra, loadvm=TAG) as guest:
        assert "BOOT" not in guest.serial()
        # The line that is cut and the one before it were printed from the memory that was saved.
        in_memory = guest.ticks()[0] - 2
        assert abs(in_memory - on_disk) <= 1
        assert [s.name for s in await backend_of(guest, tmp_path).list_snapshots(WEB)] == [TAG]


async def test_prepare_tells_the_room_needed_and_every_name_taken(tmp_path: Path) -> None:
    async with running_guest(tmp_path) as guest:
        backend = await opened(guest, tmp_path)
        await operator_job(guest, "snapshot-save", "before-upgrade", "disk0")
        await take(backend)
        prepared = await backend.prepare(WEB, SnapshotKind.STANDBY)
        assert set(prepared.taken_names) == {"before-upgrade", TAG}
        (room,) = prepared.rooms
        assert room.needed_bytes > 64 * 1024 * 1024
        assert room.path == guest.disk
        assert prepared.warnings == ()
        with pytest.raises(Unsupported):
            await backend.prepare(WEB, SnapshotKind.STOPPED)


async def test_a_writable_raw_disk_is_refused_by_name_before_anything_happens(tmp_path: Path) -> None:
    raw = tmp_path / "data.img"
    raw.write_bytes(bytes(1024 * 1024))
    extra = ["-drive", f"if=virtio,format=raw,file={raw},id=data"]
    async with running_guest(tmp_path, extra=extra) as guest:
        backend = await opened(guest, tmp_path)
        with pytest.raises(Unsupported, match=r"data \(.*data\.img, raw\).*qemu-img convert"):
            await backend.prepare(WEB, SnapshotKind.STANDBY)
        with pytest.raises(Unsupported):
            await captured(backend, new_request())
        assert await tags_on(guest) == {"disk0": []}


async def test_read_only_disks_and_cd_roms_are_left_alone(tmp_path: Path) -> None:
    iso = tmp_path / "cd.iso"
    iso.write_bytes(bytes(1024 * 1024))
    base = make_disk(tmp_path / "base.qcow2")
    extra = [
        *("-drive", f"if=ide,media=cdrom,format=raw,file={iso}", "-drive", "if=ide,media=cdrom"),
        *("-drive", f"if=virtio,readonly=on,format=qcow2,file={base}"),
    ]
    async with running_guest(tmp_path, extra=extra) as guest:
        backend = await opened(guest, tmp_path)
        await backend.prepare(WEB, SnapshotKind.STANDBY)
        await take(backend)
        assert sorted((await tags_on(guest)).values()) == [[], [TAG]]


WAYS = {
    "hda": ["-hdb", "{file}"],
    "ide": ["-drive", "if=ide,index=2,format=qcow2,file={file}"],
    "virtio": ["-drive", "if=virtio,format=qcow2,file={file}"],
    "id": ["-drive", "if=virtio,id=data,format=qcow2,file={file}"],
    "none": ["-drive", "if=none,id=data,format=qcow2,file={file}", "-device", "virtio-blk-pci,drive=data"],
    "device id": ["-drive", "if=none,id=data,format=qcow2,file={file}", "-device", "virtio-blk-pci,drive=data,id=d1"],
    "node": ["-drive", "if=virtio,node-name=data,format=qcow2,file={file}"],
    "scsi": [
        *("-device", "virtio-scsi-pci", "-drive", "if=none,id=data,format=qcow2,file={file}"),
        *("-device", "scsi-hd,drive=data"),
    ],
    "usb": ["-usb", "-drive", "if=none,id=data,format=qcow2,file={file}", "-device", "usb-storage,drive=data"],
    "floppy": ["-drive", "if=floppy,format=qcow2,file={file}"],
    "blockdev": ["-blockdev", "qcow2,node-name=data,file.driver=file,file.filename={file}", *VIRTIO],
    "two nodes": [
        *("-blockdev", "file,node-name=below,filename={file}"),
        *("-blockdev", "qcow2,node-name=data,file=below", *VIRTIO),
    ],
    "throttled": ["-drive", "if=virtio,format=qcow2,throttling.iops-total=1000,file={file}"],
}


@pytest.mark.parametrize("freezes", [Freezer.HYPERVISOR, Freezer.ENGINE])
@pytest.mark.parametrize("way", WAYS)
async def test_a_disk_is_captured_however_it_is_attached_and_found_again_by_its_file(
    tmp_path: Path, way: str, freezes: Freezer
) -> None:
    second = make_disk(tmp_path / "second.qcow2")
    extra = [part.format(file=second) for part in WAYS[way]]
    async with running_guest(tmp_path, extra=extra) as guest:
        backend = await opened(guest, tmp_path, mode="background")
        made = await take(backend, freezes=freezes)
        assert sorted((await tags_on(guest)).values()) == [[TAG], [TAG]]
    disks = [str(tmp_path / "{instance}.qcow2"), str(tmp_path / "{instance}" / "none.qcow2")]
    stopped = make_backend(tmp_path / "{instance}.sock", tmp_path, disks=disks)
    assert await stopped.list_snapshots(WEB) == (made,)
    await stopped.delete_snapshot(made)
    info = json.loads(run_img("info", "--output=json", second))
    assert info.get("snapshots", []) == []


@pytest.mark.parametrize("freezes", [Freezer.HYPERVISOR, Freezer.ENGINE])
async def test_a_guest_with_hardware_that_cannot_be_saved_fails_with_qemus_reason_and_runs(
    tmp_path: Path, freezes: Freezer
) -> None:
    second = make_disk(tmp_path / "second.qcow2")
    extra = ["-drive", f"if=none,id=data,format=qcow2,file={second}", "-device", "nvme,drive=data,serial=1"]
    async with running_guest(tmp_path, extra=extra) as guest:
        backend = await opened(guest, tmp_path, mode="background")
        request = new_request(freezes=freezes)
        with pytest.raises(CaptureFailed, match=r"non-migratable device .*nvme"):
            await captured(backend, request)
        await assert_runs(backend, guest)
        assert await settle(backend, request) == Settled()
        assert set(map(tuple, (await tags_on(guest)).values())) == {()}
        assert await marks_in(guest) == []


async def test_a_drive_whose_writes_are_not_kept_is_refused(tmp_path: Path) -> None:
    second = make_disk(tmp_path / "second.qcow2")
    extra = ["-drive", f"if=virtio,id=data,format=qcow2,snapshot=on,file={second}"]
    async with running_guest(tmp_path, extra=extra) as guest:
        backend = await opened(guest, tmp_path)
        with pytest.raises(Unsupported, match="data is not kept"):
            await backend.prepare(WEB, SnapshotKind.STANDBY)


async def test_memory_of_devices_is_part_of_the_estimate(tmp_path: Path) -> None:
    extra = ["-device", "VGA,vgamem_mb=256"]
    async with running_guest(tmp_path, extra=extra) as guest:
        backend = await opened(guest, tmp_path)
        (room,) = (await backend.prepare(WEB, SnapshotKind.STANDBY)).rooms
        assert room.needed_bytes > (64 + 256) << 20


@pytest.mark.parametrize("disk_format", ["raw", "qcow2"])
async def test_a_writable_network_disk_is_refused_by_name_with_what_to_do(tmp_path: Path, disk_format: str) -> None:
    exported = make_disk(tmp_path / "exported.qcow2")
    async with running_guest(tmp_path) as guest:
        path = guest.socket.with_name("nbd.sock")
        server = subprocess.Popen(["qemu-nbd", "-f", "raw", "-t", "-k", path, exported])
        try:
            with trio.fail_after(30):
                while not path.exists():
                    await trio.sleep(0.01)
            extra = ["-drive", f"if=virtio,id=data,format={disk_format},file=nbd+unix:///?socket={path}"]
            (tmp_path / "other").mkdir()
            async with running_guest(tmp_path / "other", extra=extra) as other:
                backend = await opened(other, tmp_path)
                with pytest.raises(Unsupported, match=r"data \(nbd.*qemu-img convert.*read-only"):
                    await backend.prepare(WEB, SnapshotKind.STANDBY)
        finally:
            server.kill()
            server.wait()


@pytest.mark.parametrize(
    ("name", "remote"),
    [
        ("/var/lib/a:b.qcow2", False),
        ("disk.qcow2", False),
        ("nbd://host/export", True),
        ("nbd+unix:///?socket=/x", True),
        ("rbd:pool/image", True),
        ("iscsi://10.0.0.1/iqn/0", True),
        ('json:{"driver":"qcow2","file":{"driver":"rbd","pool":"p"}}', True),
        ('json:{"driver":"qcow2","file":{"driver":"blkdebug","image":{"driver":"file","filename":"x"}}}', False),
        ('json:{"driver":"qcow2","file":{"driver":"file","filename":"x"},"backing":{"driver":"nbd"}}', False),
        ('json:{"driver":"qcow2","file":{"driver":"fi', False),
    ],
)
def test_what_is_on_a_network_is_told_by_its_name(name: str, remote: bool) -> None:
    assert is_remote(name) == remote


def test_a_guest_without_a_writable_disk_is_refused() -> None:
    with pytest.raises(Unsupported, match="attach one in qcow2 format"):
        check_capturable([])


async def test_states_are_what_the_guest_does_and_an_operators_stop_is_a_pause(tmp_path: Path) -> None:
    async with running_guest(tmp_path) as guest:
        backend = await opened(guest, tmp_path)
        await assert_runs(backend, guest)
        await backend.resume(WEB)
        await guest.qmp("stop")
        assert await backend.state(WEB) == Status(InstanceState.PAUSED)
        with pytest.raises(InvalidState, match="somebody else"):
            await backend.pause(WEB, new_request())
        assert await backend.state(WEB) == Status(InstanceState.PAUSED)
        await backend.resume(WEB)
        assert await backend.state(WEB) == Status(InstanceState.PAUSED)
        await guest.qmp("cont")
        request = new_request()
        await backend.pause(WEB, request)
        await backend.pause(WEB, request)
        assert await backend.state(WEB) == Status(InstanceState.PAUSED)
        await backend.resume(WEB)
        await assert_runs(backend, guest)
        assert await marks_in(guest) == []


async def test_a_capture_of_a_guest_that_an_operator_paused_leaves_it_paused(tmp_path: Path) -> None:
    async with running_guest(tmp_path) as guest:
        backend = await opened(guest, tmp_path)
        await guest.qmp("stop")
        made = await captured(backend, new_request())
        assert made.freeze_s == 0
        assert await backend.state(WEB) == Status(InstanceState.PAUSED)


@pytest.mark.parametrize(
    ("extra", "status"),
    [
        (["-S"], Status(InstanceState.CREATED)),
        (["-incoming", "defer"], Status(InstanceState.INITIALIZING)),
    ],
)
async def test_a_guest_that_has_not_begun_is_neither_running_nor_resumed(
    tmp_path: Path, extra: list[str], status: Status
) -> None:
    async with running_guest(tmp_path, extra=extra, wait=False) as guest:
        backend = await opened(guest, tmp_path)
        assert await backend.state(WEB) == status
        with pytest.raises(InvalidState):
            await backend.resume(WEB)
        with pytest.raises(InvalidState):
            await backend.pause(WEB, new_request())


async def test_a_state_that_hypemand_has_no_word_for_is_told_in_qemus(tmp_path: Path) -> None:
    async with running_guest(tmp_path) as guest:
        backend = await opened(guest, tmp_path)
        await guest.qmp("stop")
        async with qmp.connect(guest.test_socket) as monitor:
            await monitor.execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
            await monitor.execute("migrate", uri="exec:cat >/dev/null")
            with trio.fail_after(30):
                await monitor.wait_event("MIGRATION", status="completed")
                while (await monitor.execute("query-status"))["status"] == "finish-migrate":
                    await trio.sleep(0.01)
        assert await backend.state(WEB) == Status(InstanceState.UNKNOWN, "postmigrate")


async def test_guests_are_discovered_by_their_sockets(tmp_path: Path) -> None:
    async with running_guest(tmp_path) as guest:
        (guest.socket.parent.parent / ".hidden").mkdir()
        assert await backend_of(guest, tmp_path).instances() == {WEB}
        named = guest.socket.parent / "{instance}.sock"
        assert await make_backend(named, tmp_path).instances() == {"qmp", "test"}


async def test_only_sockets_that_fit_the_template_in_full_are_guests(tmp_path: Path) -> None:
    names = ["a.b/vm-a.b.sock", "a/vm-b.sock", ".h/vm-.h.sock", "c d/vm-c d.sock", "e/vm-e.sock", "f/vm-f.sockx"]
    for name in names:
        path = tmp_path / "x[1]" / name
        path.parent.mkdir(parents=True)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    path.with_name("vm-f.sock").touch()
    template = tmp_path / "x[1]" / "{instance}" / "vm-{instance}.sock"
    assert await make_backend(template, tmp_path).instances() == {"a.b", "e"}


async def test_no_socket_at_all_is_unavailable_never_an_empty_host(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable):
        await make_backend(tmp_path / "{instance}.sock", tmp_path).instances()
    with pytest.raises(BackendUnavailable):
        await make_backend(tmp_path / "missing" / "{instance}" / "qmp.sock", tmp_path).instances()


async def test_deleting_twice_is_no_error_and_other_snapshots_stay(tmp_path: Path) -> None:
    async with running_guest(tmp_path) as guest:
        backend = await opened(guest, tmp_path)
        await operator_job(guest, "snapshot-save", "before-upgrade", "disk0")
        first, second = await take(backend, "a"), await take(backend, "b")
        await backend.delete_snapshot(first)
        await backend.delete_snapshot(first)
        assert await backend.list_snapshots(WEB) == (second,)
        assert await tags_on(guest) == {"disk0": ["before-upgrade", "b"]}
        # QEMU gives the number of a deleted snapshot again; nobody may be taken in by that.
        third = await take(backend, "c")
        assert await backend.list_snapshots(WEB) == (second, third)


async def test_a_delete_that_was_cancelled_is_no_hindrance_to_the_next(tmp_path: Path) -> None:
    async with running_guest(tmp_path) as guest:
        backend = await opened(guest, tmp_path)
        snapshot = await take(backend)
        await operator_job(guest, "snapshot-delete", "other", "disk0", job_id=f"hypemand-delete-{snapshot.id}")
        await backend.delete_snapshot(snapshot)
        assert await tags_on(guest) == {"disk0": []}
        assert await guest.qmp("query-jobs") == []


async def test_a_run_whose_job_qemu_has_already_fails_and_harms_nothing(tmp_path: Path) -> None:
    async with running_guest(tmp_path) as guest:
        backend = await opened(guest, tmp_path)
        request = new_request()
        await operator_job(guest, "snapshot-save", "other", "disk0", job_id=f"hypemand-{request.run_id}")
        with pytest.raises(CaptureFailed, match="already in use"):
            await captured(backend, request)
        assert await tags_on(guest) == {"disk0": ["other"]}


async def test_a_snapshot_that_an_operator_deleted_is_not_listed(tmp_path: Path) -> None:
    async with running_guest(tmp_path) as guest:
        backend = await opened(guest, tmp_path)
        snapshot = await take(backend)
        await operator_job(guest, "snapshot-delete", TAG, "disk0")
        assert await backend.list_snapshots(WEB) == ()
        await backend.delete_snapshot(snapshot)


async def test_an_operators_snapshot_by_the_same_name_is_neither_listed_nor_deleted(tmp_path: Path) -> None:
    async with running_guest(tmp_path) as guest:
        backend = await opened(guest, tmp_path)
        snapshot = await take(backend)
        await operator_job(guest, "snapshot-delete", TAG, "disk0")
        await operator_job(guest, "snapshot-save", TAG, "disk0")
        assert await backend.list_snapshots(WEB) == ()
        await backend.delete_snapshot(snapshot)
        assert await tags_on(guest) == {"disk0": [TAG]}


async def test_a_name_that_is_taken_fails_and_harms_nothing(tmp_path: Path) -> None:
    async with running_guest(tmp_path) as guest:
        backend = await opened(guest, tmp_path)
        await operator_job(guest, "snapshot-save", TAG, "disk0")
        request = new_request()
        with pytest.raises(CaptureFailed, match=TAG):
            await captured(backend, request)
        assert await tags_on(guest) == {"disk0": [TAG]}
        assert await settle(backend, request) == Settled()
        assert await tags_on(guest) == {"disk0": [TAG]}
        assert drafts_in(tmp_path) == []


async def test_a_save_that_fails_in_qemu_leaves_nothing_and_the_guest_runs(tmp_path: Path) -> None:
    second = make_disk(tmp_path / "second.qcow2")
    extra = blockdev("disk1", second, fails={"cluster_alloc": errno.ENOSPC})
    async with running_guest(tmp_path, extra=extra) as guest:
        backend = await opened(guest, tmp_path)
        request = new_request()
        with pytest.raises(CaptureFailed, match=r"QEMU: .*disk1"):
            await captured(backend, request)
        assert await settle(backend, request) == Settled()
        assert await tags_on(guest) == {"disk0": [], "disk1": []}
        assert await guest.qmp("query-jobs") == []
        assert drafts_in(tmp_path) == []
        await assert_runs(backend, guest)


async def test_a_full_catalog_fails_the_run_and_the_snapshot_is_adopted_once_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_guest(tmp_path) as guest:
        backend = await opened(guest, tmp_path)
        assert isinstance(backend, QemuBackend)
        write = type(backend.catalog).write_manifest

        def write_drafts_only(self: object, manifest: Any) -> None:
            if manifest.size_bytes:
                raise OSError(28, "No space left on device")
            write(backend.catalog, manifest)

        request = new_request()
        with monkeypatch.context() as patch:
            patch.setattr(type(backend.catalog), "write_manifest", write_drafts_only)
            with pytest.raises(CaptureFailed, match="No space left on device"):
                await captured(backend, request)
            with pytest.raises(BackendUnavailable, match="No space left on device"):
                await settle(backend, request)
        await assert_runs(backend, guest)
        settled = await settle(backend, request)
        assert settled.snapshot is not None
        assert await backend.list_snapshots(WEB) == (settled.snapshot,)


async def test_a_cancelled_capture_ends_at_once_and_is_adopted_when_settled(tmp_path: Path) -> None:
    async with running_guest(tmp_path, memory_mb=256, filled=True) as guest:
        backend = await opened(guest, tmp_path)
        request = new_request()
        await capture_until_stop(backend, guest, request, cancel)
        settled = await settle(backend, request)
        assert settled.snapshot is not None
        assert not settled.resumed
        assert await settle(backend, request) == settled
        assert await backend.list_snapshots(WEB) == (settled.snapshot,)
        assert (settled.snapshot.id, settled.snapshot.tags) == (request.run_id, request.tags)
        assert await guest.qmp("query-jobs") == []
        await assert_runs(backend, guest)


async def test_hypemand_killed_in_mid_save_leaves_a_running_guest_and_a_snapshot_to_adopt(tmp_path: Path) -> None:
    async with running_guest(tmp_path, memory_mb=256, filled=True) as guest:
        backend = await opened(guest, tmp_path)
        request = new_request()
        code = f"""
import datetime, trio
from pathlib import Path
from hypemand.backends import base, registry
from hypemand.core.model import SnapshotKind
backend = registry.connect("vms", {dict(backend.connection)!r}, base.Surroundings(Path("/nonexistent")))
at = datetime.datetime.now(datetime.UTC)
request = base.CaptureRequest(
    run_id={request.run_id!r}, name={TAG!r}, kind=SnapshotKind.STANDBY, tags={{}}, created_at=at, freezes=None
)
trio.run(backend.capture, {WEB!r}, request)
"""
        async with qmp.connect(guest.test_socket) as monitor:
            process = await trio.lowlevel.open_process([sys.executable, "-c", code])
            with trio.fail_after(30):
                await monitor.wait_event("STOP")
            process.kill()
            await process.wait()
        settled = await settle(backend, request)
        assert settled.snapshot is not None
        assert await backend.list_snapshots(WEB) == (settled.snapshot,)
        await assert_runs(backend, guest)


async def test_settling_leaves_an_operators_pause_alone(tmp_path: Path) -> None:
    async with running_guest(tmp_path, memory_mb=256, filled=True) as guest:
        backend = await opened(guest, tmp_path)
        request = new_request()
        await capture_until_stop(backend, guest, request, cancel)
        await guest.qmp("stop")
        settled = await settle(backend, request)
        assert not settled.resumed
        assert await backend.state(WEB) == Status(InstanceState.PAUSED)


async def test_a_snapshot_on_some_disks_only_is_removed_when_settled(tmp_path: Path) -> None:
    extra = blockdev("disk1", make_disk(tmp_path / "second.qcow2"))
    async with running_guest(tmp_path, extra=extra) as guest:
        backend = await opened(guest, tmp_path)
        request = new_request()
        await captured(backend, request)
        await operator_job(guest, "snapshot-delete", TAG, "disk1")
        assert await settle(backend, request) == Settled()
        assert await settle(backend, request) == Settled()
        assert await tags_on(guest) == {"disk0": [], "disk1": []}
        assert drafts_in(tmp_path) == []


async def test_a_tag_older_than_the_run_is_not_its_own(tmp_path: Path) -> None:
    async with running_guest(tmp_path) as guest:
        backend = await opened(guest, tmp_path)
        request = new_request()
        await capture_until_stop(backend, guest, request, cancel)
        await operator_job(guest, "snapshot-save", "other", "disk0")  # returns once the one before it is over
        run = run_of(request, backend, WEB)
        settled = await backend.settle(evolve(run, started_at=run.started_at + timedelta(hours=1)), ours=True)
        assert settled == Settled()
        assert await tags_on(guest) == {"disk0": [TAG, "other"]}


async def test_a_disk_that_was_taken_away_is_told_when_settled(tmp_path: Path) -> None:
    second = make_disk(tmp_path / "second.qcow2")
    request = new_request()
    async with running_guest(tmp_path, extra=blockdev("disk1", second)) as guest:
        backend = await opened(guest, tmp_path)
        await captured(backend, request)
    async with running_guest(tmp_path) as guest:
        settled = await settle(backend_of(guest, tmp_path), request)
        assert settled.snapshot is None
        assert [str(second) in note for note in settled.notes] == [True]
        assert await tags_on(guest) == {"disk0": []}


async def test_a_qemu_killed_in_mid_save_is_unavailable_and_its_run_is_settled_by_its_disks(tmp_path: Path) -> None:
    request = new_request()
    async with running_guest(tmp_path, memory_mb=256, filled=True) as guest:
        backend = await opened(guest, tmp_path)

        async def kill(_: trio.CancelScope) -> None:
            await guest.kill()

        with pytest.raises(ExceptionGroup) as caught:
            await capture_until_stop(backend, guest, request, kill)
        assert caught.group_contains(BackendUnavailable)
        for asked in (backend.state, backend.list_snapshots):
            with pytest.raises(BackendUnavailable, match="refuses"):
                await asked(WEB)
        settled = await settle(backend, request)
        assert await settle(backend, request) == settled
    async with running_guest(tmp_path, memory_mb=256) as guest:
        backend = backend_of(guest, tmp_path)
        assert await tags_on(guest) == {"disk0": [TAG] if settled.snapshot else []}
        assert await settle(backend, request) == settled
        await take(backend, "next")


async def test_a_missing_socket_is_unavailable_never_stopped(tmp_path: Path) -> None:
    backend = make_backend(tmp_path / "{instance}.sock", tmp_path)
    with pytest.raises(BackendUnavailable, match="there is no monitor"):
        await backend.state(WEB)


async def test_a_monitor_that_another_client_holds_is_unavailable_soon(tmp_path: Path) -> None:
    async with running_guest(tmp_path) as guest:
        backend = await opened(guest, tmp_path)
        assert isinstance(backend, QemuBackend)
        backend.monitors.patience_s = 0.5
        async with qmp.connect(guest.socket), trio.open_nursery() as nursery:
            with trio.fail_after(30), pytest.raises(BackendUnavailable, match="a monitor of its own"):
                await backend.state(WEB)
            backend.monitors.patience_s = 60
            nursery.start_soon(backend.state, WEB)
            await trio.testing.wait_all_tasks_blocked()
            backend.monitors.patience_s = 0.5
            with trio.fail_after(30), pytest.raises(BackendUnavailable, match="by hypemand itself"):
                await backend.state(WEB)
            nursery.cancel_scope.cancel()
        await assert_runs(backend, guest)


async def test_a_state_asked_during_a_capture_is_answered_after_it(tmp_path: Path) -> None:
    async with running_guest(tmp_path, memory_mb=256, filled=True) as guest:
        backend = await opened(guest, tmp_path)
        request = new_request()

        async def ask(_: trio.CancelScope) -> None:
            assert await backend.state(WEB) == Status(InstanceState.RUNNING)

        await capture_until_stop(backend, guest, request, ask)


async def test_a_missing_catalog_hides_nothing(tmp_path: Path) -> None:
    async with running_guest(tmp_path) as guest:
        backend = await opened(guest, tmp_path)
        request = new_request()
        snapshot = await take(backend)
        (tmp_path / "catalog").rename(tmp_path / "unmounted")
        with pytest.raises(BackendUnavailable):
            await backend.open(first_use=False)
        with pytest.raises(BackendUnavailable):
            await backend.prepare(WEB, SnapshotKind.STANDBY)
        with pytest.raises(BackendUnavailable):
            await backend.list_snapshots(WEB)
        with pytest.raises(BackendUnavailable):
            await backend.delete_snapshot(snapshot)
        with pytest.raises(BackendUnavailable):
            await settle(backend, request)
        with pytest.raises(BackendUnavailable):
            await captured(backend, new_request("other"))
        assert await tags_on(guest) == {"disk0": [TAG]}


def test_settings_name_what_is_wrong_and_where(tmp_path: Path) -> None:
    settings = {"type": "qemu", "socket": "/run/vms/qmp.sock", "mode": "magic"}
    with pytest.raises(InvalidInput) as caught:
        registry.connect("vms", settings, Surroundings(tmp_path))
    assert {problem.path for problem in caught.value.problems} == {"socket", "mode"}


def test_the_connection_is_enough_to_connect_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {"type": "qemu", "socket": "{instance}/qmp.sock"}
    told = json.loads(json.dumps(registry.connect("vms", settings, Surroundings(Path("state"))).connection))
    monkeypatch.chdir("/")
    assert registry.connect("vms", told, Surroundings(Path("/elsewhere"))).connection == told
    assert told["snapshot_dir"] == str(tmp_path / "state" / "catalog" / "vms")


def test_the_ticker_is_what_its_source_says(tmp_path: Path) -> None:
    code = TICKER.read_bytes()
    assert len(code) == 512
    assert code[510:] == b"\x55\xaa"
    assert int.from_bytes(code[500:504], "little") == 10_000
    assert code[504:508] == bytes(4)
    assemble = (
        f"as --32 -o t.o {TICKER.with_suffix('.S')} && ld -m elf_i386 -Ttext 0x7c00 --oformat binary -o t.bin t.o"
    )
    if shutil.which("as") and shutil.which("ld"):
        subprocess.run(assemble, shell=True, check=True, cwd=tmp_path)
        assert (tmp_path / "t.bin").read_bytes() == code


async def test_a_relative_disk_name_is_looked_up_where_qemu_runs(tmp_path: Path) -> None:
    """Else the space check would be left out in silence."""
    (tmp_path / "disk.qcow2").touch()
    async with running_guest(tmp_path) as guest, qmp.connect(guest.socket) as monitor:
        process = monitor.peer_process()
        assert process == guest.process.pid
        relative = os.path.relpath(tmp_path / "disk.qcow2")
        names = [relative, "elsewhere.qcow2", "web-1.qcow2", str(tmp_path / "disk.qcow2")]
        # The third is relative to no directory that is known, but QEMU has it open.
        expected = [str(tmp_path / "disk.qcow2"), "elsewhere.qcow2", str(guest.disk), str(tmp_path / "disk.qcow2")]
        assert lasting_names(process, names) == expected
