"""Guests of Cloud Hypervisor and Firecracker: one instant of memory and disks, and back to it."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import trio

from hypemand.backends import registry
from hypemand.backends.base import BackendUnavailable, CaptureFailed, InvalidState, Unsupported
from hypemand.backends.catalog import MANIFEST, MARKER
from hypemand.core.errors import InvalidInput
from hypemand.core.model import InstanceState, RestoreAction, Snapshot, SnapshotKind
from tests.vmm_backend import (
    RUN,
    captured,
    carry_out,
    connect,
    frozen,
    published,
    request,
    restore_option,
    run_of,
    running,
)
from tests.vmm_guest import CLOUD_HYPERVISOR, FIRECRACKER, KINDS, MIB, count_in, make_disk, running_guest

both = pytest.mark.parametrize("kind", KINDS)
MEMORY = {CLOUD_HYPERVISOR: "vmm/memory-ranges", FIRECRACKER: "vmm/memory"}


def home_of(directory: Path, snapshot: Snapshot) -> Path:
    return directory / "catalog" / snapshot.instance_id / snapshot.id


def manifest_of(directory: Path, snapshot: Snapshot) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((home_of(directory, snapshot) / MANIFEST).read_text())
    return manifest


@both
async def test_memory_and_disks_of_a_snapshot_are_of_one_instant(kind: str, tmp_path: Path) -> None:
    disks = [(make_disk(tmp_path / str(number) / "disk.raw"), "rw") for number in range(3)]
    async with running(kind, tmp_path, disks=disks, tick_s=0.002) as (guest, backend):
        snapshot = await published(backend, guest)
        assert await guest.ticks() > 0
    home = home_of(tmp_path, snapshot)
    counts = {count_in(file) for file in (*home.glob("disks/*"), home / MEMORY[kind])}
    assert len(counts) == 1
    assert min(counts) > 0
    assert sorted(path.name for path in home.glob("disks/*")) == ["0-disk.raw", "1-disk.raw", "2-disk.raw"]


@both
@pytest.mark.parametrize("jailed", [False, True])
async def test_the_steps_of_a_restore_lead_back_to_the_saved_count(kind: str, jailed: bool, tmp_path: Path) -> None:
    chroot = tmp_path / "jail" / "web-1" / "root" if jailed and kind == FIRECRACKER else None
    with tempfile.TemporaryDirectory(prefix="hypemand-") as short:
        socket = Path(short) / "web-1.sock"
        async with running(kind, tmp_path, chroot=chroot, socket=socket, tick_s=0.01) as (guest, backend):
            snapshot = await published(backend, guest)
            later = await guest.ticks() + 20
            with trio.fail_after(20):
                while guest.count() < later:
                    await trio.sleep(0.01)
        saved = count_in(home_of(tmp_path, snapshot) / MEMORY[kind])
        assert socket.is_socket()  # left over
        carry_out(snapshot.restore, RestoreAction.RUN)
        option = restore_option(snapshot.restore)
        given: dict[str, Any] = {"socket": socket, "restore": option, "keep_socket": True, "empty": True}
        async with running_guest(kind, tmp_path, chroot=chroot, wait=False, **given) as restored:
            assert restored.count() == saved
            assert restored.state() in ("Paused", "Not started")
            carry_out(snapshot.restore, RestoreAction.MONITOR)
            assert saved < await restored.ticks() < later


@both
async def test_the_manifest_tells_what_it_is_of_and_what_it_lacks(kind: str, tmp_path: Path) -> None:
    disks = [(make_disk(tmp_path / "root.raw"), "rw"), (make_disk(tmp_path / "tools.raw"), "ro")]
    async with running(kind, tmp_path, disks=disks) as (guest, backend):
        snapshot = await published(backend, guest)
    manifest = manifest_of(tmp_path, snapshot)
    assert manifest["hypervisor"]["name"] == kind
    assert manifest["hypervisor"]["version"] in ("51.1", "1.13.1")
    assert manifest["hypervisor"]["uuid"] in ("6f0bd1d3-3f1c-4d7e-9f0e-2d4a1c0b5e77", "anonymous")
    assert [disk["file"] for disk in manifest["details"]["disks"]] == [str(tmp_path / "root.raw")]
    assert [left["file"] for left in manifest["details"]["left_out"]] == [str(tmp_path / "tools.raw")]
    sizes = {name: (home_of(tmp_path, snapshot) / name).stat().st_size for name in manifest["files"]}
    assert manifest["files"] == sizes
    assert snapshot.size_bytes == sum(sizes.values()) > 2 * MIB
    assert not any("tools" in name for name in sizes)


async def test_a_vmm_without_a_guest_is_created_and_says_so(tmp_path: Path) -> None:
    for old in (False, True):
        async with running(CLOUD_HYPERVISOR, tmp_path, empty=True, old=old, wait=False) as (guest, backend):
            status = await backend.state(guest.instance_id)
            assert (status.state, status.detail) == (InstanceState.CREATED, "the VMM runs without a VM")
    async with running(FIRECRACKER, tmp_path, empty=True, wait=False) as (guest, backend):
        assert (await backend.state(guest.instance_id)).state is InstanceState.CREATED
        with pytest.raises(InvalidState, match="Created"):
            await backend.make_ready(guest.instance_id, request())


@both
async def test_a_state_that_is_not_known_is_unknown_with_its_word(kind: str, tmp_path: Path) -> None:
    async with running(kind, tmp_path) as (guest, backend):
        guest.fail_look(status=200, body={"state": "BreakPoint", "config": {}, "something": "new"})
        status = await backend.state(guest.instance_id)
    assert (status.state, status.detail) == (InstanceState.UNKNOWN, "BreakPoint")


@both
async def test_a_vmm_that_is_busy_or_fails_tells_nothing_of_its_guest(kind: str, tmp_path: Path) -> None:
    async with running(kind, tmp_path) as (guest, backend):
        guest.fail_look(status=503, body={"error": "Too many open connections"})
        with pytest.raises(BackendUnavailable, match="busy: Too many open connections"):
            await backend.state(guest.instance_id)
        guest.fail_look(status=500, body=["Error from API", "Poisoned state"])
        with pytest.raises(BackendUnavailable, match="Error from API: Poisoned state"):
            await backend.state(guest.instance_id)


async def test_a_guest_that_has_shut_down_in_a_vmm_that_lives_is_not_stopped(tmp_path: Path) -> None:
    async with running(CLOUD_HYPERVISOR, tmp_path) as (guest, backend):
        guest.fail_look(status=200, body={"state": "Shutdown", "config": {}})
        assert (await backend.state(guest.instance_id)).state is InstanceState.SHUTDOWN


@both
@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (500, ["Error from API", "The VM could not be snapshotted", "No space left"], "API: The VM could not be snap"),
        (400, {"fault_message": "Create snapshot error: no space"}, "Create snapshot error: no space"),
        (500, "plain words\nof an old version", "plain words of an old version"),
        (405, None, "HTTP status 405"),
    ],
)
async def test_what_the_vmm_says_of_a_failed_save_is_what_the_run_says(
    kind: str, status: int, body: Any, told: str, tmp_path: Path
) -> None:
    async with running(kind, tmp_path) as (guest, backend):
        guest.fail_save(status=status, body=body)
        with pytest.raises(CaptureFailed, match=told):
            await captured(backend, guest)
        assert guest.state() == "Running"
        await backend.settle(run_of(backend, guest), ours=False)
        assert (await published(backend, guest)).id == RUN


@both
async def test_a_pause_by_an_operator_is_refused_and_stays(kind: str, tmp_path: Path) -> None:
    async with running(kind, tmp_path) as (guest, backend):
        await backend.make_ready(guest.instance_id, request())
        guest.pause()
        with pytest.raises(InvalidState, match="Paused, and not by hypemand"):
            await backend.pause(guest.instance_id, request())
        assert guest.state() == "Paused"


@pytest.mark.parametrize(
    "body",
    [
        ["Error from API", "Cannot pause VM", "Invalid transition: InvalidStateTransition(Paused, Paused)"],
        "invalid VM state transition: Paused to Paused",
    ],
)
async def test_a_pause_by_an_operator_in_the_same_moment_is_refused(body: Any, tmp_path: Path) -> None:
    async with running(CLOUD_HYPERVISOR, tmp_path) as (guest, backend):
        guest.fail_pause(status=500, body=body)
        with pytest.raises(InvalidState, match="somebody else"):
            await frozen(backend, guest)


@both
async def test_a_pause_that_went_half_wrong_is_to_be_followed_by_a_resume(kind: str, tmp_path: Path) -> None:
    async with running(kind, tmp_path) as (guest, backend):
        guest.fail_pause(status=500, body=["Error from API", "Cannot pause devices"])
        with pytest.raises(BackendUnavailable, match="Cannot pause devices"):
            await frozen(backend, guest)
        await backend.resume(guest.instance_id)
        assert await guest.ticks()


@both
async def test_a_guest_that_somebody_resumes_in_mid_capture_fails_it(kind: str, tmp_path: Path) -> None:
    async with running(kind, tmp_path) as (guest, backend):
        asked = await frozen(backend, guest)
        guest.fail_save(late_s=0.3)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, _resume_after_the_save, guest)
            with pytest.raises(CaptureFailed, match="somebody else has resumed it"):
                await backend.capture(guest.instance_id, asked)
        assert guest.state() == "Running"


def _resume_after_the_save(guest: Any) -> None:
    while not guest.saves():
        pass
    guest.resume()  # served when the save is over: before the capture looks again


async def test_a_disk_that_is_attached_in_mid_capture_fails_it(tmp_path: Path) -> None:
    async with running(CLOUD_HYPERVISOR, tmp_path) as (guest, backend):
        asked = await frozen(backend, guest)
        guest.fail_save(late_s=0.3)
        more = str(make_disk(tmp_path / "more.raw"))

        def attach() -> None:
            while not guest.saves():
                pass
            guest.ask("PUT", "/api/v1/vm.add-disk", {"path": more})

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, attach)
            with pytest.raises(CaptureFailed, match="disks were changed"):
                await backend.capture(guest.instance_id, asked)
        await backend.resume(guest.instance_id)
        snapshot = await published(backend, guest, request("run-2"))
    assert sorted(manifest_of(tmp_path, snapshot)["files"])[:2] == ["disks/0-root.raw", "disks/1-more.raw"]


@both
async def test_the_capture_ends_its_copies_at_the_freeze_deadline(kind: str, tmp_path: Path) -> None:
    async with running(kind, tmp_path, save_s=0.2) as (guest, backend):
        asked = request(freeze_deadline=trio.current_time() + 0.1)
        with pytest.raises(CaptureFailed, match=r"freeze budget was over when 0 B of .* raise its max_freeze"):
            await captured(backend, guest, asked)
        assert guest.saves() == 1
        assert asked.meter.total_bytes > 0
        assert await guest.ticks()


@both
async def test_preparing_counts_memory_and_the_data_of_disks(kind: str, tmp_path: Path) -> None:
    disks = [(make_disk(tmp_path / "root.raw", size=64 * MIB, data=2 * MIB), "rw")]
    async with running(kind, tmp_path, disks=disks, memory=4 * MIB) as (guest, backend):
        ready = await backend.prepare(guest.instance_id, SnapshotKind.STANDBY)
    (room,) = ready.rooms
    assert room.path == tmp_path / "catalog"
    assert 6 * MIB < room.needed_bytes < 30 * MIB
    assert (ready.warnings, ready.advice) == ((), ())


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"devices": [{"path": "/sys/bus/pci/devices/0000:01:00.0/"}]}, "VFIO.*detach"),
        ({"vdpa": [{"path": "/dev/vhost-vdpa-0"}]}, "vDPA.*detach"),
        ({"memory": {"size": MIB, "file": "/dev/shm/web-1", "shared": True}}, "shared file.*shared=off"),
        ({"memory": {"size": 0, "zones": [{"size": MIB, "file": "/x", "shared": True}]}}, "shared file"),
        ({"disks": [{"id": "d0", "vhost_user": True, "vhost_socket": "/run/x"}]}, "d0 is served by another process"),
        (
            {"disks": [{"id": "d0", "vhost_user": True, "vhost_socket": "/run/x", "readonly": True}]},
            "disk d0 is served",
        ),
        ({"fs": [{"tag": "share", "socket": "/run/fs"}]}, "shared directory 'share'.*vhost-user.*restore hangs"),
        ({"net": [{"id": "n0", "vhost_user": True, "vhost_socket": "/run/n"}]}, "network device n0 is served by"),
        ({"generic_vhost_user": [{"id": "g0", "socket": "/run/g", "virtio_id": 26}]}, "device g0 is served by"),
        ({"pmem": [{"id": "p0", "file": "/dev/null"}]}, "neither a file nor a block device"),
    ],
)
async def test_what_could_not_be_restored_is_refused_before_the_freeze(
    config: dict[str, Any], told: str, tmp_path: Path
) -> None:
    async with running(CLOUD_HYPERVISOR, tmp_path) as (guest, backend):
        info = guest.ask("GET", "/api/v1/vm.info")[1]
        guest.fail_look(status=200, body={**info, "config": {**info["config"], **config}})
        with pytest.raises(Unsupported, match=told):
            await backend.prepare(guest.instance_id, SnapshotKind.STANDBY)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"net": [{"id": "net1", "fds": [3]}]}, "net1 were given as descriptors"),
    ],
)
async def test_what_a_snapshot_lacks_is_warned_of(config: dict[str, Any], told: str, tmp_path: Path) -> None:
    async with running(CLOUD_HYPERVISOR, tmp_path, config=config) as (guest, backend):
        ready = await backend.prepare(guest.instance_id, SnapshotKind.STANDBY)
    assert any(told in warning for warning in ready.warnings)


async def test_pmem_that_the_guest_writes_is_a_disk_and_discarded_writes_are_not(tmp_path: Path) -> None:
    kept, gone = make_disk(tmp_path / "kept.raw"), make_disk(tmp_path / "gone.raw")
    config = {"pmem": [{"file": str(kept)}, {"file": str(gone), "discard_writes": True}]}
    async with running(CLOUD_HYPERVISOR, tmp_path, config=config) as (guest, backend):
        manifest = manifest_of(tmp_path, await published(backend, guest))
    assert "disks/1-kept.raw" in manifest["files"]
    assert [left["file"] for left in manifest["details"]["left_out"]] == [str(gone)]


async def test_firecracker_drives_of_other_processes_and_tracked_pages_are_told(tmp_path: Path) -> None:
    drives = [{"drive_id": "d0", "is_root_device": True, "socket": "/run/x"}]
    async with running(FIRECRACKER, tmp_path) as (guest, backend):
        config = guest.ask("GET", "/vm/config")[1]
        guest.fail({"request": "GET /vm/config", "status": 200, "body": {**config, "drives": drives}})
        with pytest.raises(Unsupported, match="d0 is served by another process"):
            await backend.prepare(guest.instance_id, SnapshotKind.STANDBY)
        drives[0]["is_read_only"] = True
        guest.fail({"request": "GET /vm/config", "status": 200, "body": {**config, "drives": drives}})
        with pytest.raises(Unsupported, match="d0 is served by another process"):
            await backend.prepare(guest.instance_id, SnapshotKind.STANDBY)
        tracked = {**config["machine-config"], "track_dirty_pages": True}
        guest.fail({"request": "GET /vm/config", "status": 200, "body": {**config, "machine-config": tracked}})
        ready = await backend.prepare(guest.instance_id, SnapshotKind.STANDBY)
    assert "tracks its dirty pages" in ready.warnings[0]


@both
async def test_a_vmm_that_does_not_write_where_it_says_is_found_out(kind: str, tmp_path: Path) -> None:
    async with running(kind, tmp_path) as (guest, backend):
        guest.fail_save(status=204)
        made = await captured(backend, guest)
        with pytest.raises(CaptureFailed, match="does it see the same directory"):
            await backend.complete(made)


@both
@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("memory", b"x", "has 1 B of its memory of 1.0 MiB"),
        ("memory", None, "can't be found"),
        ("state.json", b'{"devices": [', "state.json is not whole"),
        ("config.json", b"", "config.json can't be found"),
        ("config.json", b"\0" * 100, "config.json is not whole"),
    ],
)
async def test_a_save_that_is_not_whole_is_no_snapshot(
    kind: str, name: str, content: bytes | None, told: str, tmp_path: Path
) -> None:
    if name != "memory" and kind == FIRECRACKER:
        name = "state"
        content, told = b"", "state can't be found"
    file = Path(MEMORY[kind]).name if name == "memory" else name
    async with running(kind, tmp_path) as (guest, backend):
        made = await captured(backend, guest)
        (saving,) = (tmp_path / "catalog").glob("web-1/.*/vmm")
        (saving / file).unlink()
        if content is not None:
            (saving / file).write_bytes(content)
        with pytest.raises(CaptureFailed, match=told):
            await backend.complete(made)
        await backend.settle(run_of(backend, guest), ours=False)
        assert await backend.list_snapshots(guest.instance_id) == ()


@both
async def test_relative_paths_are_those_of_the_vmms_directory(kind: str, tmp_path: Path) -> None:
    async with running(kind, tmp_path) as (guest, backend):
        look = "/api/v1/vm.info" if kind == CLOUD_HYPERVISOR else "/vm/config"
        told = json.dumps(guest.ask("GET", look)[1])
        relative = json.loads(told.replace(str(guest.disks[0]), "root.raw"))
        assert relative != json.loads(told)
        here = Path(f"/proc/{guest.process.pid}/cwd").readlink()
        guest.fail({"request": f"GET {look}", "status": 200, "body": relative})
        with pytest.raises(BackendUnavailable, match=r"root\.raw, which is not seen from here"):
            await backend.prepare(guest.instance_id, SnapshotKind.STANDBY)
    assert not (here / "root.raw").exists()


def test_diff_snapshots_are_refused_with_the_reason(tmp_path: Path) -> None:
    given = {"socket": "/run/{instance}.sock", "snapshot_type": "Diff", "chroot": "/srv/jail"}
    with pytest.raises(InvalidInput) as refused:
        registry.parse_settings(FIRECRACKER, given)
    told = str(refused.value)
    assert "snapshot_type: 'Diff' is not made" in told
    assert "chroot: '/srv/jail' must have {instance}" in told
    for mode in ("8", "0777", "070", "rwx"):
        with pytest.raises(InvalidInput, match="snapshot_mode"):
            registry.parse_settings(CLOUD_HYPERVISOR, {"socket": "/run/{instance}.sock", "snapshot_mode": mode})


@both
async def test_the_connection_says_all_that_another_process_needs(kind: str, tmp_path: Path) -> None:
    async with running_guest(kind, tmp_path, wait=False) as guest:
        backend = connect(guest, tmp_path, disks=["/d/{instance}/*.raw"], snapshot_group="0", snapshot_mode="2750")
        told = json.loads(json.dumps(dict(backend.connection)))
        assert told["disks"] == ["/d/{instance}/*.raw"]
        assert (told["snapshot_group"], told["snapshot_mode"]) == ("0", "2750")
        assert backend.capabilities.kinds == {SnapshotKind.STANDBY, SnapshotKind.STOPPED}


@both
async def test_the_guest_is_thawed_also_where_the_catalog_is_not_mounted_and_that_is_told_later(
    kind: str, tmp_path: Path
) -> None:
    marker = tmp_path / "catalog" / MARKER
    async with running(kind, tmp_path) as (guest, backend):
        await frozen(backend, guest)
        marker.rename(tmp_path / "away")
        with pytest.raises(BackendUnavailable, match=r"no \.hypemand-catalog"):
            await backend.settle(run_of(backend, guest), ours=True)
        assert guest.state() == "Running"
        (tmp_path / "away").rename(marker)
        settled = await backend.settle(run_of(backend, guest), ours=True)
        assert (settled.resumed, settled.snapshot) == (True, None)
        assert list((tmp_path / "catalog").glob("*/.*")) == []


@both
async def test_settling_waits_for_a_save_that_nobody_waits_for_any_more(kind: str, tmp_path: Path) -> None:
    async with running(kind, tmp_path, save_s=0.5) as (guest, backend):
        asked = await frozen(backend, guest)
        with trio.move_on_after(0.1):
            await backend.capture(guest.instance_id, asked)
        other = connect(guest, tmp_path)  # as after a crash
        settled = await other.settle(run_of(backend, guest), ours=True)
        assert settled.resumed
        assert guest.saves() == 1
        assert list((tmp_path / "catalog").glob("*/.*")) == []
        await other.aclose()
        assert await guest.ticks()
