"""The qemu backend against a real QEMU."""

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from attrs import evolve

from hypemand.backends import qmp, registry
from hypemand.backends.base import (
    Backend,
    BackendUnavailable,
    CaptureFailed,
    CaptureRequest,
    InvalidState,
    Settled,
    Status,
    Surroundings,
    Unsupported,
)
from hypemand.backends.qemu import QemuBackend
from hypemand.backends.qemu_disks import check_capturable, dismiss, finished
from hypemand.core.errors import InvalidInput
from hypemand.core.model import Freezer, InstanceId, InstanceState, RunStarted, Snapshot, SnapshotKind, Trigger
from tests.qemu_guest import TICKER, Guest, blockdev, make_disk, run_img, running_guest

pytestmark = pytest.mark.qemu

WEB = InstanceId("web-1")
TAG = "nightly-20261122-010000"
_numbers = count(1)


def backend_of(guest: Guest, tmp_path: Path) -> Backend:
    return make_backend(guest.socket_template, tmp_path)


def make_backend(template: Path, tmp_path: Path) -> Backend:
    settings = {"type": "qemu", "socket": str(template), "snapshot_dir": str(tmp_path / "catalog")}
    return registry.connect("vms", settings, Surroundings(tmp_path / "state"))


async def opened(guest: Guest, tmp_path: Path) -> Backend:
    backend = backend_of(guest, tmp_path)
    await backend.open(first_use=True)
    return backend


def new_request(name: str = TAG) -> CaptureRequest:
    return CaptureRequest(
        run_id=f"run-{next(_numbers)}",
        name=name,
        kind=SnapshotKind.STANDBY,
        tags={"team": "backend"},
        created_at=datetime.now(UTC),
    )


def run_of(request: CaptureRequest, backend: Backend) -> RunStarted:
    return RunStarted(
        run_id=request.run_id,
        instance_id=WEB,
        backend=backend.name,
        trigger=Trigger.MANUAL,
        kind=request.kind,
        state_before=InstanceState.RUNNING,
        due_at=request.created_at,
        next_run_at=request.created_at + timedelta(hours=1),
        started_at=request.created_at,
        snapshot_name=request.name,
        tags=request.tags,
        max_freeze_s=60,
        freezes=Freezer.HYPERVISOR,
        boot_id="",
        connection=backend.connection,
    )


async def take(backend: Backend, name: str = TAG) -> Snapshot:
    captured = await backend.capture(WEB, new_request(name))
    await backend.publish(captured.snapshot)
    return captured.snapshot


async def settle(backend: Backend, request: CaptureRequest) -> Settled:
    with trio.fail_after(30):
        return await backend.settle(run_of(request, backend), ours=True)


def drafts_in(tmp_path: Path) -> list[Path]:
    return list(tmp_path.glob("catalog/*/.*"))


async def tags_on(guest: Guest) -> dict[str, list[str]]:
    """Tags by node, as QEMU itself lists them."""
    nodes = await guest.qmp("query-named-block-nodes", flat=True)
    return {n["node-name"]: [s["name"] for s in n["image"].get("snapshots", ())] for n in nodes if n["drv"] == "qcow2"}


async def operator_job(guest: Guest, command: str, tag: str, *nodes: str, job_id: str = "") -> None:
    """Save or delete on the test's monitor; a job with a *job_id* is left in QEMU as it is after a cancellation."""
    arguments: dict[str, Any] = {"vmstate": nodes[0]} if command == "snapshot-save" else {}
    async with qmp.connect(guest.test_socket) as monitor:
        await monitor.execute(command, job_id=job_id or "operator", tag=tag, devices=list(nodes), **arguments)
        with trio.fail_after(30):
            job = await finished(monitor, job_id or "operator")
        assert job is not None
        assert "error" not in job
        if not job_id:
            await dismiss(monitor, "operator")


async def capture_until_stop(
    backend: Backend, guest: Guest, request: CaptureRequest, end: Callable[[trio.CancelScope], Awaitable[None]]
) -> None:
    """Begin a capture, and call *end* once the guest stands still in it."""
    async with qmp.connect(guest.test_socket) as monitor, trio.open_nursery() as nursery:
        nursery.start_soon(backend.capture, guest.instance_id, request)
        with trio.fail_after(30):
            await monitor.wait_event("STOP")
        await end(nursery.cancel_scope)


async def cancel(scope: trio.CancelScope) -> None:
    scope.cancel()


async def assert_runs(backend: Backend, guest: Guest) -> None:
    assert await backend.state(guest.instance_id) == Status(InstanceState.RUNNING)
    await guest.next_ticks()


async def test_a_capture_is_listed_with_its_name_and_tags_and_the_guest_goes_on(tmp_path: Path) -> None:
    async with running_guest(tmp_path, filled=True) as guest:
        backend = await opened(guest, tmp_path)
        request = new_request()
        captured = await backend.capture(WEB, request)
        assert await backend.list_snapshots(WEB) == ()
        await backend.publish(captured.snapshot)
        await backend.publish(captured.snapshot)
        (listed,) = await backend.list_snapshots(WEB)
        assert listed == captured.snapshot
        assert (listed.id, listed.name, listed.tags) == (request.run_id, TAG, {"team": "backend"})
        assert listed.size_bytes > 40 * 1024 * 1024
        assert captured.freeze_s is not None
        assert 0 < captured.freeze_s < 30
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
        assert prepared.needed_bytes > 64 * 1024 * 1024
        assert prepared.path is not None
        assert prepared.path.exists()
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
            await backend.capture(WEB, new_request())
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
        await backend.pause(WEB)
        assert await backend.state(WEB) == Status(InstanceState.PAUSED)
        await backend.resume(WEB)
        await assert_runs(backend, guest)
        await backend.pause(WEB)
        assert await backend.state(WEB) == Status(InstanceState.PAUSED)


async def test_a_capture_of_a_guest_that_an_operator_paused_leaves_it_paused(tmp_path: Path) -> None:
    async with running_guest(tmp_path) as guest:
        backend = await opened(guest, tmp_path)
        await guest.qmp("stop")
        captured = await backend.capture(WEB, new_request())
        assert captured.freeze_s == 0
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
            await backend.pause(WEB)


async def test_a_state_that_hypemand_has_no_word_for_is_told_in_qemus(tmp_path: Path) -> None:
    async with running_guest(tmp_path) as guest:
        backend = await opened(guest, tmp_path)
        await guest.qmp("stop")
        async with qmp.connect(guest.test_socket) as monitor:
            await monitor.execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
            await monitor.execute("migrate", uri="exec:cat >/dev/null")
            with trio.fail_after(30):
                await monitor.wait_event("MIGRATION", status="completed")
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
            await backend.capture(WEB, request)
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
            await backend.capture(WEB, request)
        assert await tags_on(guest) == {"disk0": [TAG]}
        assert await settle(backend, request) == Settled()
        assert await tags_on(guest) == {"disk0": [TAG]}
        assert drafts_in(tmp_path) == []


async def test_a_save_that_fails_in_qemu_leaves_nothing_and_the_guest_runs(tmp_path: Path) -> None:
    second = make_disk(tmp_path / "second.qcow2")
    file = {"driver": "file", "filename": str(second)}
    failing = {"driver": "blkdebug", "image": file, "inject-error": [{"event": "cluster_alloc", "errno": 28}]}
    spec = {"driver": "qcow2", "node-name": "disk1", "file": failing}
    extra = ["-blockdev", json.dumps(spec), "-device", "virtio-blk-pci,drive=disk1"]
    async with running_guest(tmp_path, extra=extra) as guest:
        backend = await opened(guest, tmp_path)
        with pytest.raises(CaptureFailed, match=r"QEMU: .*disk1"):
            await backend.capture(WEB, new_request())
        assert await tags_on(guest) == {"disk0": [], "disk1": []}
        assert await guest.qmp("query-jobs") == []
        assert drafts_in(tmp_path) == []
        await assert_runs(backend, guest)


async def test_a_full_catalog_takes_the_snapshot_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_guest(tmp_path) as guest:
        backend = await opened(guest, tmp_path)
        assert isinstance(backend, QemuBackend)
        write = type(backend.catalog).write_manifest

        def write_drafts_only(self: object, manifest: Any) -> None:
            if manifest.size_bytes:
                raise OSError(28, "No space left on device")
            write(backend.catalog, manifest)

        monkeypatch.setattr(type(backend.catalog), "write_manifest", write_drafts_only)
        with pytest.raises(CaptureFailed, match="No space left on device"):
            await backend.capture(WEB, new_request())
        assert await tags_on(guest) == {"disk0": []}
        await assert_runs(backend, guest)


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
    run_id={request.run_id!r}, name={TAG!r}, kind=SnapshotKind.STANDBY, tags={{}}, created_at=at
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
        await backend.capture(WEB, request)
        await operator_job(guest, "snapshot-delete", TAG, "disk1")
        assert await settle(backend, request) == Settled()
        assert await settle(backend, request) == Settled()
        assert await tags_on(guest) == {"disk0": [], "disk1": []}
        assert drafts_in(tmp_path) == []


async def test_a_tag_older_than_the_run_is_not_its_own(tmp_path: Path) -> None:
    async with running_guest(tmp_path) as guest:
        backend = await opened(guest, tmp_path)
        request = new_request()
        await backend.capture(WEB, request)
        run = run_of(request, backend)
        settled = await backend.settle(evolve(run, started_at=run.started_at + timedelta(hours=1)), ours=True)
        assert settled == Settled()
        assert await tags_on(guest) == {"disk0": [TAG]}


async def test_a_disk_that_was_taken_away_is_told_when_settled(tmp_path: Path) -> None:
    second = make_disk(tmp_path / "second.qcow2")
    request = new_request()
    async with running_guest(tmp_path, extra=blockdev("disk1", second)) as guest:
        backend = await opened(guest, tmp_path)
        await backend.capture(WEB, request)
    async with running_guest(tmp_path) as guest:
        settled = await settle(backend_of(guest, tmp_path), request)
        assert settled.snapshot is None
        assert [str(second) in note for note in settled.notes] == [True]
        assert await tags_on(guest) == {"disk0": []}


async def test_a_qemu_killed_in_mid_save_is_unavailable_and_its_partial_snapshot_goes(tmp_path: Path) -> None:
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
        with pytest.raises(BackendUnavailable):
            await settle(backend, request)
    async with running_guest(tmp_path, memory_mb=256) as guest:
        backend = backend_of(guest, tmp_path)
        settled = await settle(backend, request)
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
        hasty = evolve(backend, patience_s=0.5)
        async with qmp.connect(guest.socket), trio.open_nursery() as nursery:
            with trio.fail_after(30), pytest.raises(BackendUnavailable, match="a monitor of its own"):
                await hasty.state(WEB)
            nursery.start_soon(backend.state, WEB)
            await trio.testing.wait_all_tasks_blocked()
            with trio.fail_after(30), pytest.raises(BackendUnavailable, match="by hypemand itself"):
                await hasty.state(WEB)
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
            await backend.capture(WEB, new_request("other"))
        assert await tags_on(guest) == {"disk0": [TAG]}


def test_settings_name_what_is_wrong_and_where(tmp_path: Path) -> None:
    settings = {"type": "qemu", "socket": "/run/vms/qmp.sock", "mode": "background"}
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
    async with running_guest(tmp_path) as guest, qmp.connect(guest.socket) as monitor:
        assert monitor.peer_directory() == Path.cwd()
