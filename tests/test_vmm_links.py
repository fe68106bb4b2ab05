"""Whatever a guest's user puts in the place of its disks: what is copied is the guest's disk, or nothing."""

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from structlog.typing import EventDict

from hypemand.backends import registry
from hypemand.backends.base import Backend, BackendUnavailable, CaptureFailed, Surroundings, Unsupported
from hypemand.backends.vmm import guests as guests_module
from hypemand.backends.vmm.disks import locked, read_disk, signs_of
from hypemand.backends.vmm.handles import files_of_process, identity
from hypemand.backends.vmm.processes import has_no_guest
from hypemand.core.model import InstanceId, InstanceState, RestoreAction, SnapshotKind
from tests.vmm_backend import captured, carry_out, opened, published, request, run_of
from tests.vmm_backend import frozen as make_frozen
from tests.vmm_guest import CLOUD_HYPERVISOR, FIRECRACKER, KINDS, Guest, make_disk, running_guest

both = pytest.mark.parametrize("kind", KINDS)
SECRET = "the host's secret\n"
WEB = InstanceId("web-1")


@pytest.fixture
def chroot(tmp_path: Path) -> Path:
    made = tmp_path / "jail" / WEB / "root"
    made.mkdir(parents=True)
    (tmp_path / "secret").write_text(SECRET)
    return made


@pytest.mark.parametrize("when", ["before the pause", "before the capture"])
async def test_a_link_in_the_place_of_a_jailed_disk_fails_the_capture_and_no_byte_of_it_is_kept(
    when: str, chroot: Path, tmp_path: Path
) -> None:
    async with running_guest(FIRECRACKER, tmp_path, chroot=chroot) as guest, opened(guest, tmp_path) as backend:
        await backend.make_ready(WEB, request())
        if when == "before the pause":
            _exchange(guest.disks[0], tmp_path / "secret")
        await backend.pause(WEB, request())
        if when == "before the capture":
            _exchange(guest.disks[0], tmp_path / "secret")
        with pytest.raises(CaptureFailed, match=r"not there any more|is another file now"):
            await backend.capture(WEB, request())
        await backend.resume(WEB)
        for path in (tmp_path / "catalog").rglob("*"):
            assert not path.is_file() or SECRET.encode() not in path.read_bytes()


def _exchange(disk: Path, other: Path) -> None:
    disk.rename(disk.with_suffix(".old"))
    disk.symlink_to(other)


@both
async def test_a_file_that_was_put_in_the_place_of_a_disk_is_not_captured_for_it(kind: str, tmp_path: Path) -> None:
    async with running_guest(kind, tmp_path) as guest, opened(guest, tmp_path) as backend:
        await backend.prepare(WEB, SnapshotKind.STANDBY)
        guest.disks[0].rename(tmp_path / "old")
        make_disk(guest.disks[0])
        with pytest.raises(Unsupported, match=r"runs with another file than .*root\.raw.*put the guest's own back"):
            await backend.prepare(WEB, SnapshotKind.STANDBY)
        with pytest.raises(CaptureFailed, match="runs with another file"):
            await captured(backend, guest)
        (tmp_path / "old").rename(guest.disks[0])
        assert (await published(backend, guest)).size_bytes > 0


def test_a_process_that_runs_no_guest_is_not_asked_for_its_files(tmp_path: Path) -> None:
    assert files_of_process(os.getpid()) is None  # it may have handed a socket on to one that does
    machine = os.memfd_create("kvm-vm")
    try:
        found = files_of_process(os.getpid())
    finally:
        os.close(machine)
    assert found is not None
    disk = make_disk(tmp_path / "d").stat()
    assert (disk.st_dev, disk.st_ino) not in found
    assert files_of_process(2**22 + 1) is None


def test_a_process_that_opens_and_closes_files_all_the_time_is_seen_all_the_same(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "d")
    ended = threading.Event()

    def be_busy() -> None:
        while not ended.is_set():
            for descriptor in [os.dup(0) for _ in range(20)]:
                os.close(descriptor)

    busy = threading.Thread(target=be_busy)
    busy.start()
    try:
        assert all(has_no_guest(os.getpid()) for _ in range(100))
        machine = os.memfd_create("kvm-vm")
        with disk.open("rb") as file:
            wanted = identity(os.fstat(file.fileno()))
            looks = [files_of_process(os.getpid()) for _ in range(100)]
        os.close(machine)
    finally:
        ended.set()
        busy.join()
    assert all(found is not None and wanted in found for found in looks)


def test_what_is_copied_is_the_file_that_was_looked_at_first(tmp_path: Path) -> None:
    file = make_disk(tmp_path / "d")
    disk = read_disk(file)
    before = signs_of([disk])
    file.rename(tmp_path / "elsewhere")
    with pytest.raises(CaptureFailed, match="not there any more"):
        signs_of([disk])
    make_disk(file)
    with pytest.raises(CaptureFailed, match="another file now"):
        signs_of([disk])
    (tmp_path / "elsewhere").replace(file)
    assert signs_of([disk]) == before


def test_a_directory_that_becomes_a_link_after_the_look_leads_nowhere_else(tmp_path: Path) -> None:
    root = tmp_path / "root"
    found = make_disk(root / "images" / "d")
    assert read_disk(found, root=root).file == found
    (root / "images").rename(root / "old")
    make_disk(tmp_path / "outside" / "d")
    (root / "images").symlink_to(tmp_path / "outside")
    with pytest.raises(BackendUnavailable, match="can't be read"):
        read_disk(found, root=root)


async def test_what_finished_runs_left_in_a_chroot_goes_with_the_next_capture(
    chroot: Path, tmp_path: Path, heard_log: list[EventDict]
) -> None:
    left = [chroot / ".hypemand-old", chroot / ".hypemand-link", chroot / ".hypemand-stays"]
    left[0].mkdir()
    (left[0] / "memory").write_bytes(b"secret")
    left[1].symlink_to(tmp_path)
    left[2].write_bytes(b"no directory")
    async with running_guest(FIRECRACKER, tmp_path, chroot=chroot) as guest, opened(guest, tmp_path) as backend:
        await published(backend, guest)
    assert list(chroot.glob(".hypemand*")) == [left[2]]
    assert (tmp_path / "secret").read_text() == SECRET
    (told,) = [entry for entry in heard_log if entry["log_level"] == "error"]
    assert (told["path"], "remove it by hand" in told["event"]) == (str(left[2]), True)


async def test_memory_that_can_not_be_removed_from_a_chroot_keeps_the_run_open(
    chroot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    async with running_guest(FIRECRACKER, tmp_path, chroot=chroot) as guest, opened(guest, tmp_path) as backend:
        made = await captured(backend, guest)
        with monkeypatch.context() as patched:
            patched.setattr(shutil, "rmtree", refuse)
            with pytest.raises(BackendUnavailable, match=r"\.hypemand-run-1: Operation not permitted"):
                await backend.complete(made)
        with monkeypatch.context() as patched:
            patched.setattr(guests_module, "remove", refuse)
            with pytest.raises(BackendUnavailable, match=r"\.hypemand-run-1: Operation not permitted"):
                await backend.settle(run_of(backend, guest), ours=False)
        await backend.settle(run_of(backend, guest), ours=False)
        assert not (chroot / ".hypemand-run-1").exists()
        assert await guest.ticks()


def stopped_backend(chroot: Path, tmp_path: Path) -> Backend:
    jail = str(chroot).replace(WEB, "{instance}")
    settings = {
        "type": FIRECRACKER,
        "socket": f"{jail}/run/firecracker.socket",
        "chroot": jail,
        "disks": [f"{jail}/*.raw", f"{jail}/more/*.raw"],
        "snapshot_dir": str(tmp_path / "catalog"),
    }
    return registry.connect("vms", settings, Surroundings(tmp_path / "state"))


@pytest.mark.parametrize("way", ["link", "directory", "dots"])
async def test_a_stopped_guests_link_out_of_its_chroot_is_refused(way: str, chroot: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (make_disk(outside / "x.raw")).write_text(SECRET)
    make_disk(chroot / "root.raw")
    if way == "link":
        (chroot / "more.raw").symlink_to(outside / "x.raw")
    elif way == "dots":
        (chroot / "more.raw").symlink_to("../../../outside/x.raw")
    else:
        (chroot / "more").symlink_to(outside)
    backend = stopped_backend(chroot, tmp_path)
    await backend.open(first_use=True)
    with pytest.raises(BackendUnavailable, match=r"leads out of .*root, or nowhere"):
        await backend.state(WEB)
    with pytest.raises(BackendUnavailable, match="have to be inside its chroot"):
        await backend.capture(WEB, request(kind=SnapshotKind.STOPPED))
    await backend.aclose()
    assert not [path for path in (tmp_path / "catalog").rglob("*") if path.is_file() and SECRET in path.read_text()]


async def test_a_stopped_guests_link_within_its_chroot_leads_to_its_disk(chroot: Path, tmp_path: Path) -> None:
    disk = make_disk(chroot / "images" / "disk")
    (chroot / "root.raw").symlink_to("/images/disk")
    backend = stopped_backend(chroot, tmp_path)
    await backend.open(first_use=True)
    assert (await backend.state(WEB)).state is InstanceState.STOPPED
    made = await backend.complete(await backend.capture(WEB, request(kind=SnapshotKind.STOPPED)))
    await backend.publish(made.snapshot)
    await backend.aclose()
    disk.write_bytes(b"")
    carry_out(made.snapshot.restore, RestoreAction.RUN)
    assert disk.stat().st_size == made.snapshot.size_bytes


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[Path]:
    """One that nobody writes to: who opens it waits. At the end whoever waits goes on."""
    path = tmp_path / WEB / "b.raw"
    path.parent.mkdir()
    os.mkfifo(path)
    yield path
    os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))


@both
async def test_a_pipe_among_the_disks_is_refused_and_keeps_nobody_waiting(
    kind: str, pipe: Path, tmp_path: Path
) -> None:
    settings = {
        "type": kind,
        "socket": f"{tmp_path}/{{instance}}.sock",
        "disks": [f"{tmp_path}/{{instance}}/*.raw"],
        "snapshot_dir": str(tmp_path / "catalog"),
    }
    backend = registry.connect("vms", settings, Surroundings(tmp_path / "state"))
    await backend.open(first_use=True)
    with trio.fail_after(20):
        for _ in range(41):
            with pytest.raises((BackendUnavailable, Unsupported), match="neither a file nor a block device"):
                await backend.prepare(WEB, SnapshotKind.STOPPED)
    await backend.aclose()
    assert locked([pipe]) == []


async def test_a_guests_disk_is_held_while_it_is_captured_and_let_go_after(tmp_path: Path) -> None:
    async with running_guest(CLOUD_HYPERVISOR, tmp_path) as guest, opened(guest, tmp_path) as backend:
        asked = await make_frozen(backend, guest)
        assert _is_open(guest)
        made = await backend.capture(WEB, asked)
        await backend.resume(WEB)
        await backend.complete(made)
        assert not _is_open(guest)


def _is_open(guest: Guest) -> bool:
    (disk,) = guest.disks
    return any(os.path.realpath(entry) == str(disk) for entry in Path("/proc/self/fd").iterdir())
