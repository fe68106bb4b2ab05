"""Whose guest a VMM has: the process that was paused is the one that is resumed, and no other one's pause is undone."""

import errno
import fcntl
import os
import signal
import socket as sockets
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import evolve

from hypemand.backends.base import Backend, BackendUnavailable, CaptureFailed
from hypemand.backends.vmm import disks as disks_module
from hypemand.backends.vmm import origin, processes, using
from hypemand.backends.vmm.backend import VmmBackend
from hypemand.backends.vmm.client import Peer
from hypemand.core.model import InstanceState, RunStarted, SnapshotKind
from tests.vmm_backend import captured, connect, frozen, opened, published, request, restore_option, run_of, running
from tests.vmm_guest import CLOUD_HYPERVISOR, FIRECRACKER, KINDS, Guest, make_disk, running_guest

both = pytest.mark.parametrize("kind", KINDS)
STOPPED = request(kind=SnapshotKind.STOPPED)


def client_of(backend: Backend, guest: Guest) -> Any:
    assert isinstance(backend, VmmBackend)
    return backend.guests.client(guest.instance_id)


@asynccontextmanager
async def known_disks(kind: str, directory: Path, **options: Any) -> AsyncIterator[tuple[Guest, Backend, Backend]]:
    """A guest, the backend that captures it, and one as another process has it, which knows its disks."""
    pattern = [f"{directory}/{{instance}}/*.raw"]
    async with (
        running(kind, directory, locks=False, **options) as (guest, backend),
        opened(guest, directory, disks=pattern) as fresh,
    ):
        yield guest, backend, fresh


@both
async def test_a_guest_whose_socket_is_another_vmms_by_now_is_resumed(kind: str, tmp_path: Path) -> None:
    async with running(kind, tmp_path) as (guest, backend):
        await frozen(backend, guest)
        guest.socket.rename(guest.away)
        async with running_guest(kind, tmp_path / "other", socket=guest.socket, empty=True, wait=False):
            await backend.resume(guest.instance_id)
            guest.socket.unlink()
            assert guest.state() == "Running"
            assert await guest.ticks()
        guest.away.rename(guest.socket)


@both
async def test_a_guest_whose_socket_was_removed_while_it_stood_still_is_captured_and_resumed(
    kind: str, tmp_path: Path
) -> None:
    async with running(kind, tmp_path) as (guest, backend):
        asked = await frozen(backend, guest)
        guest.socket.unlink()
        made = await backend.capture(guest.instance_id, asked)
        await backend.resume(guest.instance_id)
        assert await guest.ticks()
        assert (await backend.complete(made)).snapshot.size_bytes > 0


@both
async def test_a_capture_lets_go_of_the_socket(kind: str, tmp_path: Path) -> None:
    async with running(kind, tmp_path) as (guest, backend):
        await backend.state(guest.instance_id)
        before = len(list(Path("/proc/self/fd").iterdir()))
        await published(backend, guest)
        await backend.make_ready(guest.instance_id, request("run-2"))
        await backend.settle(run_of(backend, guest, "run-2"), ours=False)
        assert len(list(Path("/proc/self/fd").iterdir())) == before
        assert list((tmp_path / "catalog").rglob(origin.NOTE)) == []


@both
async def test_after_a_crash_a_run_stays_open_while_the_socket_is_another_vmms(kind: str, tmp_path: Path) -> None:
    async with known_disks(kind, tmp_path) as (guest, backend, fresh):
        await frozen(backend, guest)
        run = run_of(backend, guest)
        guest.socket.rename(guest.away)
        for options in ({"empty": True, "wait": False}, {}):
            async with running_guest(kind, tmp_path / "other", socket=guest.socket, **options) as other:  # type: ignore[arg-type]
                told = rf"process {guest.process.pid}, which can't.*belongs to process {other.process.pid} now"
                with pytest.raises(BackendUnavailable, match=told):
                    await fresh.settle(run, ours=True)
            guest.socket.unlink()
        guest.away.rename(guest.socket)
        assert guest.state() == "Paused"
        assert (await fresh.settle(run, ours=True)).resumed
        assert await guest.ticks()


@both
async def test_after_a_crash_a_run_stays_open_while_the_socket_of_its_guest_is_missing(
    kind: str, tmp_path: Path
) -> None:
    async with known_disks(kind, tmp_path) as (guest, backend, fresh):
        await frozen(backend, guest)
        run = run_of(backend, guest)
        guest.socket.rename(guest.away)
        with pytest.raises(BackendUnavailable, match=f"its VMM runs .process {guest.process.pid}"):
            await fresh.settle(run, ours=True)
        guest.away.rename(guest.socket)
        assert (await fresh.settle(run, ours=True)).resumed
        assert await guest.ticks()


@both
async def test_the_same_where_its_note_is_lost_and_the_disks_tell(kind: str, tmp_path: Path) -> None:
    async with known_disks(kind, tmp_path) as (guest, backend, fresh):
        await frozen(backend, guest)
        run = run_of(backend, guest)
        (note,) = (tmp_path / "catalog").rglob(origin.NOTE)
        note.unlink()
        guest.socket.rename(guest.away)
        with pytest.raises(BackendUnavailable, match=r"a process has .*root\.raw open for writing"):
            await fresh.settle(run, ours=True)
        guest.away.rename(guest.socket)
        assert (await fresh.settle(run, ours=True)).resumed


@both
async def test_after_a_crash_a_guest_whose_vmm_has_ended_needs_no_disks_to_be_settled(
    kind: str, tmp_path: Path
) -> None:
    async with running(kind, tmp_path) as (guest, backend):
        await frozen(backend, guest)
        await guest.kill()
        other = connect(guest, tmp_path)
        assert (await other.settle(run_of(backend, guest), ours=True)).resumed is False
        assert list((tmp_path / "catalog").glob("*/.*")) == []
        await other.aclose()


@both
async def test_a_hung_catalog_keeps_no_guest_from_being_resumed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    async with known_disks(kind, tmp_path) as (guest, backend, fresh):
        await frozen(backend, guest)
        monkeypatch.setattr(origin, "read_note", lambda _: released.wait(20) and None)
        assert (await fresh.settle(run_of(backend, guest), ours=True)).resumed
        assert not released.is_set()
        assert await guest.ticks()
        released.set()


@both
async def test_a_guest_that_runs_without_its_socket_is_not_taken_for_stopped(kind: str, tmp_path: Path) -> None:
    async with known_disks(kind, tmp_path) as (guest, _, fresh):
        guest.socket.rename(guest.away)
        for ask in (
            lambda: fresh.state(guest.instance_id),
            lambda: fresh.prepare(guest.instance_id, SnapshotKind.STOPPED),
            lambda: fresh.capture(guest.instance_id, STOPPED),
        ):
            with pytest.raises(BackendUnavailable, match=r"root\.raw open for writing"):
                await ask()
        guest.away.rename(guest.socket)


@pytest.fixture
def no_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for files of somebody else, where this process is not root."""
    ask = fcntl.fcntl

    def refused(descriptor: Any, command: int, argument: Any = 0) -> Any:
        if command == fcntl.F_SETLEASE:
            raise PermissionError(errno.EACCES, "Permission denied")
        return ask(descriptor, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", refused)


@pytest.mark.usefixtures("no_leases")
async def test_without_the_right_to_ask_who_writes_a_guest_is_not_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with known_disks(FIRECRACKER, tmp_path) as (guest, _, fresh):
        guest.socket.rename(guest.away)
        monkeypatch.setattr(using, "_sees_all", lambda: False)
        with pytest.raises(BackendUnavailable, match=r"root\.raw open for writing can't be told.*CAP_LEASE"):
            await fresh.state(guest.instance_id)
        monkeypatch.setattr(using, "_sees_all", lambda: True)
        monkeypatch.setattr(using, "_processes", lambda: iter([Path(f"/proc/{guest.process.pid}")]))
        with pytest.raises(BackendUnavailable, match=r"a process has .*root\.raw open for writing"):
            await fresh.state(guest.instance_id)
        monkeypatch.setattr(using, "_processes", lambda: iter([Path("/proc/self"), Path("/proc/none")]))
        assert (await fresh.state(guest.instance_id)).state is InstanceState.STOPPED
        guest.away.rename(guest.socket)


def test_whoever_reads_a_disk_does_not_use_it_and_asking_leaves_nothing(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "root.raw")
    with disk.open("rb"):
        assert using.use_of([disk]) == using.Use()
    with disk.open("r+b"):
        assert using.use_of([disk]) == using.Use(written=[str(disk)])
    assert using.use_of([disk]) == using.Use()
    assert "LEASE" not in Path("/proc/locks").read_text()


def test_a_disk_that_is_opened_while_the_kernel_is_asked_ends_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = make_disk(tmp_path / "root.raw")
    ask, got = fcntl.fcntl, []

    def ask_and_open(descriptor: Any, command: int, argument: Any = 0) -> Any:
        answer = ask(descriptor, command, argument)
        if (command, argument) == (fcntl.F_SETLEASE, fcntl.F_RDLCK):
            with pytest.raises(BlockingIOError):
                os.open(disk, os.O_WRONLY | os.O_NONBLOCK)
        return answer

    before = signal.signal(signal.SIGIO, lambda *_: got.append("SIGIO"))
    try:
        monkeypatch.setattr(fcntl, "fcntl", ask_and_open)
        assert using.use_of([disk]) == using.Use()
    finally:
        signal.signal(signal.SIGIO, before)
    assert got == []


@asynccontextmanager
async def restored_by_an_operator(directory: Path) -> AsyncIterator[tuple[Guest, Backend, RunStarted]]:
    """A guest that was captured when its VMM was killed, and comes up paused, as the operator wants it."""
    with tempfile.TemporaryDirectory(prefix="hypemand-") as short:
        socket = Path(short) / "web-1.sock"
        async with (
            running_guest(CLOUD_HYPERVISOR, directory, socket=socket) as guest,
            opened(guest, directory) as backend,
        ):
            option = restore_option((await published(backend, guest)).restore)
            await frozen(backend, guest, request("run-2"))
            run = run_of(backend, guest, "run-2")
            await guest.kill()
            async with running_guest(
                CLOUD_HYPERVISOR, directory, socket=socket, restore=option, wait=False
            ) as restored:
                yield restored, backend, run


async def test_a_guest_that_an_operator_has_restored_after_a_crash_stays_paused(tmp_path: Path) -> None:
    async with restored_by_an_operator(tmp_path) as (guest, _, run), opened(guest, tmp_path) as fresh:
        settled = await fresh.settle(run, ours=True)
        assert guest.state() == "Paused"
        assert not settled.resumed
        assert "somebody else's pause" in settled.notes[0]
        assert list((tmp_path / "catalog").glob("*/.*.partial")) == []


async def test_a_guest_that_an_operator_has_restored_in_mid_capture_stays_paused(tmp_path: Path) -> None:
    async with restored_by_an_operator(tmp_path) as (guest, backend, run):
        await backend.resume(guest.instance_id)  # its VMM was seen to end: nothing is left to be resumed
        assert not (await backend.settle(run, ours=True)).resumed
        assert guest.state() == "Paused"


async def test_without_a_note_the_age_of_its_process_tells_that_the_pause_is_not_ours(tmp_path: Path) -> None:
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    async with restored_by_an_operator(tmp_path) as (guest, _, run), opened(guest, tmp_path) as fresh:
        for note in (tmp_path / "catalog").rglob(origin.NOTE):
            note.unlink()
        began = processes.seconds(processes.started_of(guest.process.pid) or 0)
        later = evolve(run, boot_id=boot_id, boot_s=began - 1)
        assert not (await fresh.settle(later, ours=True)).resumed
        assert guest.state() == "Paused"
        assert (await fresh.settle(evolve(later, boot_s=began + 1), ours=True)).resumed
        assert guest.state() == "Running"


@both
async def test_a_filesystem_that_hangs_after_the_save_ends_the_capture_with_the_budget(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    look = disks_module.signs_of
    hangs = [True, False, True]

    def hang(disks: Any) -> Any:
        if hangs.pop(0):
            released.wait(30)
        return look(disks)

    async with running(kind, tmp_path) as (guest, backend):
        monkeypatch.setattr(disks_module, "signs_of", hang)
        for told in ("when 0 B of", "not yet looked at again"):
            asked = request(freeze_deadline=trio.current_time() + 0.5)
            with trio.fail_after(20), pytest.raises(CaptureFailed, match=f"freeze budget was over.*{told}"):
                await captured(backend, guest, asked)
            assert await guest.ticks()
            monkeypatch.setattr(disks_module, "signs_of", look)
            await backend.settle(run_of(backend, guest), ours=False)
            monkeypatch.setattr(disks_module, "signs_of", hang)
        released.set()


@both
async def test_copies_that_hang_end_with_the_budget(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(*_: object, **__: object) -> int:
        return await trio.sleep_forever()

    async with running(kind, tmp_path) as (guest, backend):
        monkeypatch.setattr(disks_module, "copy_file", hang)
        asked = request(freeze_deadline=trio.current_time() + 0.5)
        with pytest.raises(CaptureFailed, match="budget was over when 0 B of"), trio.fail_after(20):
            await captured(backend, guest, asked)
        assert await guest.ticks()


async def test_a_pause_that_leaves_a_guest_half_paused_says_so(tmp_path: Path) -> None:
    async with running(CLOUD_HYPERVISOR, tmp_path) as (guest, backend):
        guest.fail_pause(status=500, body=["Error from API", "Cannot pause devices"])
        with pytest.raises(
            BackendUnavailable, match=r"Cannot pause devices; the guest may stand still all the same: .*start it anew"
        ):
            await frozen(backend, guest)
        assert not any(line.startswith("PUT /api/v1/vm.pause 2") for line in guest.requests())


async def test_a_pause_that_firecracker_refuses_is_undone_and_nothing_is_said_of_it(tmp_path: Path) -> None:
    async with running(FIRECRACKER, tmp_path) as (guest, backend):
        guest.fail_pause(status=400, body={"fault_message": "no"})
        with pytest.raises(BackendUnavailable, match=r"could not pause the guest: no$"):
            await frozen(backend, guest)
        assert await guest.ticks()


@both
async def test_a_vmm_that_nobody_has_waited_for_has_ended(kind: str, tmp_path: Path) -> None:
    async with running(kind, tmp_path) as (guest, backend):
        await frozen(backend, guest)
        os.kill(guest.process.pid, 9)
        os.waitid(os.P_PID, guest.process.pid, os.WEXITED | os.WNOWAIT)
        await backend.resume(guest.instance_id)
        assert (await backend.settle(run_of(backend, guest), ours=True)).resumed is False


@both
async def test_a_process_that_has_got_the_number_of_a_vmm_is_not_that_vmm(kind: str, tmp_path: Path) -> None:
    async with known_disks(kind, tmp_path) as (guest, _, fresh):
        await fresh.state(guest.instance_id)
        client = client_of(fresh, guest)
        await guest.kill()
        client.peer = evolve(client.peer, pid=os.getpid())
        assert (await fresh.state(guest.instance_id)).state is InstanceState.STOPPED


def test_a_process_is_known_by_its_number_and_its_begin() -> None:
    started = processes.started_of(os.getpid())
    assert started is not None
    me = Peer(os.getpid(), 0, 0, started)
    assert me.lives()
    assert me.is_same(evolve(me, started=None))
    assert not evolve(me, started=started + 1).lives()
    assert not me.is_same(evolve(me, started=started + 1))
    assert evolve(me, pid=0, started=None).lives()  # of another namespace: nothing is known of it
    assert not evolve(me, pid=0).is_known
    assert processes.started_of(0) is None


def test_a_process_that_only_hands_sockets_on_is_noted_for_no_guest(tmp_path: Path) -> None:
    origin.write_note(tmp_path, Peer(os.getpid(), 0, 0, 1))
    assert origin.read_note(tmp_path) is None
    machine = os.memfd_create("kvm-vm")
    origin.write_note(tmp_path, Peer(os.getpid(), 0, 0, 1))
    os.close(machine)
    noted = origin.read_note(tmp_path)
    assert noted is not None
    assert (noted.pid, noted.started) == (os.getpid(), 1)


def test_a_note_of_another_namespace_or_a_torn_one_tells_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "has_no_guest", lambda _: False)
    origin.write_note(tmp_path, Peer(os.getpid(), 0, 0, None))
    assert origin.read_note(tmp_path) is not None
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(processes, "namespace", lambda: "pid:[1]")
        assert origin.read_note(tmp_path) is None
    for torn in (b"", b'{"pid": 1', b"[]", b'{"pid": "x", "started": 1, "namespace": ""}'):
        (tmp_path / origin.NOTE).write_bytes(torn)
        assert origin.read_note(tmp_path) is None


@pytest.fixture
def jail() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hypemand-") as short:
        yield Path(short)


async def test_the_socket_below_a_chroot_is_not_looked_for_outside(jail: Path, tmp_path: Path) -> None:
    root = jail / "web-1" / "root"
    (root / "run").mkdir(parents=True)
    outside = jail / "outside"
    outside.mkdir()
    template = f"{jail}/{{instance}}/root/run/fc.sock"
    async with (
        running_guest(FIRECRACKER, tmp_path, chroot=root, socket=root / "run" / "fc.sock") as guest,
        opened(guest, tmp_path, socket=template, chroot=f"{jail}/{{instance}}/root") as backend,
    ):
        assert (await backend.state(guest.instance_id)).state is InstanceState.RUNNING
        (root / "run").rename(root / "moved")
        (root / "run").symlink_to("/moved")  # for Firecracker that is in its root directory
        assert (await backend.state(guest.instance_id)).state is InstanceState.RUNNING
        (root / "run").unlink()
        with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as others:
            others.bind(str(outside / "fc.sock"))
            others.listen()
            (root / "run").symlink_to(outside)
            with trio.fail_after(20), pytest.raises(BackendUnavailable, match="there is no such socket"):
                await backend.state(guest.instance_id)
        (root / "run").unlink()
        (root / "moved").rename(root / "run")
