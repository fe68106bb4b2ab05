"""What can go wrong around a capture by libvirt: its daemon killed or hung, QEMU hung, a full disk. All of it real."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import libvirt
import pytest
import trio
from structlog.typing import EventDict

from hypemand.backends.base import Backend, BackendUnavailable, CaptureFailed, CaptureRequest, Settled, Status
from hypemand.backends.libvirt import capturing, connections
from hypemand.backends.libvirt.connections import THREADS_OF_ONE
from hypemand.core.model import InstanceState, SnapshotKind
from tests.libvirt_backend import NAME, WEB, backend_of, new_request, settle, take
from tests.libvirt_guest import (
    BY_USER,
    IO_ERROR,
    SAVING,
    LibvirtGuest,
    running_libvirt_guest,
    shared_libvirtd,
)
from tests.qemu_site import make_full, resize, small_filesystem

pytestmark = pytest.mark.libvirt


@pytest.fixture
def big() -> Iterator[LibvirtGuest]:
    """A guest whose save takes a while."""
    with running_libvirt_guest(shared_libvirtd(), memory_mb=256, filled=True) as guest:
        yield guest


async def in_mid_capture(
    guest: LibvirtGuest, backend: Backend, nursery: trio.Nursery
) -> tuple[CaptureRequest, list[str]]:
    """A capture in its midst; the list takes what it fails with."""
    await guest.next_ticks(20)  # its memory is filled by then
    request, errors = new_request(), list[str]()

    async def capture() -> None:
        try:
            await backend.capture(WEB, request)
        except CaptureFailed as error:
            errors.append(str(error))

    nursery.start_soon(capture)
    await guest.comes_to(SAVING)
    return request, errors


async def test_a_guest_runs_again_as_soon_as_a_killed_libvirtd_is_back_and_nothing_of_the_snapshot_is_left(
    big: LibvirtGuest,
) -> None:
    async with backend_of(big.libvirtd.uri) as backend:
        async with trio.open_nursery() as nursery:
            request, errors = await in_mid_capture(big, backend, nursery)
            big.libvirtd.kill()
            ticks = len(big.ticks())
            await big.saved()
            assert len(big.ticks()) <= ticks + 1
            big.libvirtd.start()
        (error,) = errors
        assert "libvirt could not be reached any more during the capture" in error
        assert error.endswith("the guest was found paused and was resumed")
        await big.next_ticks()
        assert await settle(backend, request) == Settled()
        assert (big.names(), big.tags()) == ([], [])
        again = await take(backend)
        assert await backend.list_snapshots(WEB) == (again,)
    await big.next_ticks()


async def state_of(backend: Backend) -> Status:
    """The guest's state, once a libvirtd that has just been started is through with looking at its guests."""
    with trio.fail_after(10):
        while True:
            with suppress(BackendUnavailable):
                return await backend.state(WEB)
            await trio.sleep(0.02)


async def test_another_process_finds_the_guest_frozen_by_a_killed_libvirtd_and_settles_the_run(
    big: LibvirtGuest,
) -> None:
    async with backend_of(big.libvirtd.uri) as backend, trio.open_nursery() as nursery:
        request, _ = await in_mid_capture(big, backend, nursery)
        big.libvirtd.kill()
        nursery.cancel_scope.cancel()
    async with backend_of(big.libvirtd.uri) as other:
        with pytest.raises(BackendUnavailable):
            await settle(other, request)
        await big.saved()
        big.libvirtd.start()
        status = await state_of(other)
        assert (status.state, status.detail[:4]) == (InstanceState.PAUSED, "save")
        assert await settle(other, request) == Settled(resumed=True)
        assert await other.state(WEB) == Status(InstanceState.RUNNING)
        await big.next_ticks()
        assert (big.names(), big.tags()) == ([], [])
        assert await settle(other, request) == Settled()


async def test_a_pause_by_an_operator_outlives_a_killed_libvirtd_and_settling(big: LibvirtGuest) -> None:
    with big.domain() as domain:
        domain.suspend()
    async with backend_of(big.libvirtd.uri) as backend:
        request = new_request()
        await backend.capture(WEB, request)
        big.libvirtd.kill()
        big.libvirtd.start()
        settled = await settle(backend, request)
        assert (settled.resumed, settled.snapshot is not None) == (False, True)
        assert big.state() == BY_USER


async def test_a_capture_whose_process_dies_is_finished_by_libvirt_and_adopted(big: LibvirtGuest) -> None:
    async with backend_of(big.libvirtd.uri) as backend, trio.open_nursery() as nursery:
        request, _ = await in_mid_capture(big, backend, nursery)
        nursery.cancel_scope.cancel()
    async with backend_of(big.libvirtd.uri) as other:
        with pytest.raises(BackendUnavailable, match="at work on this guest, which is paused for it"):
            await other.state(WEB)
        assert await other.list_snapshots(WEB) == ()
        settled = await settle(other, request)
        assert settled.snapshot is not None
        assert not settled.resumed
        assert await other.list_snapshots(WEB) == (settled.snapshot,)
        assert big.tags() == [NAME]
        await big.next_ticks()


async def test_a_lost_connection_is_made_anew_and_nobody_notices(big: LibvirtGuest) -> None:
    async with backend_of(big.libvirtd.uri) as backend:
        assert await backend.state(WEB) == Status(InstanceState.RUNNING)
        big.libvirtd.kill()
        with pytest.raises(BackendUnavailable, match="can't be reached"):
            await backend.state(WEB)
        big.libvirtd.start()
        assert await backend.state(WEB) == Status(InstanceState.RUNNING)
        big.libvirtd.kill()
        big.libvirtd.start()
        snapshot = await take(backend)
        assert await backend.list_snapshots(WEB) == (snapshot,)


async def test_a_capture_that_libvirt_was_never_asked_for_fails_at_once_and_waits_for_nobody(big: LibvirtGuest) -> None:
    async with backend_of(big.libvirtd.uri) as backend:
        request = new_request()
        big.libvirtd.kill()
        with pytest.raises(CaptureFailed, match=r"was not begun: libvirt at .* can't be reached"):
            await backend.capture(WEB, request)
        big.libvirtd.start()
        assert await settle(backend, request) == Settled()


async def test_a_hung_libvirtd_is_given_up_and_takes_no_threads_for_ever(big: LibvirtGuest) -> None:
    async with backend_of(big.libvirtd.uri) as backend:
        await backend.state(WEB)
        before = threading.active_count()
        with big.libvirtd.hung():
            for _ in range(THREADS_OF_ONE + 2):
                with trio.move_on_after(0.05) as scope:
                    await backend.prepare(WEB, SnapshotKind.STANDBY)
                assert scope.cancelled_caught
            with trio.move_on_after(0.05) as scope:
                await settle(backend, new_request())
            assert scope.cancelled_caught
            assert threading.active_count() <= before + THREADS_OF_ONE
        assert await backend.state(WEB) == Status(InstanceState.RUNNING)
        await take(backend)


async def test_a_qemu_that_hangs_holds_up_no_other_guest(big: LibvirtGuest) -> None:
    with running_libvirt_guest(big.libvirtd, instance_id="other-1") as other:
        async with backend_of(big.libvirtd.uri) as backend:
            big.hang()
            try:
                for number in range(THREADS_OF_ONE + 2):
                    with trio.move_on_after(0.2) as scope:
                        await backend.capture(WEB, new_request(f"begun-{number}"))
                    assert scope.cancelled_caught
                assert await backend.state(WEB) == Status(InstanceState.RUNNING)
                request = new_request()
                await backend.prepare(other.instance_id, SnapshotKind.STANDBY)
                captured = await backend.capture(other.instance_id, request)
                await backend.publish(captured.snapshot)
                assert await backend.list_snapshots(other.instance_id) == (captured.snapshot,)
            finally:
                big.go_on()
            await big.next_ticks()
            await take(backend)
            assert big.tags() == ["begun-0", NAME], "a capture that was given up before it began has been made"


@contextmanager
def operator_saves(guest: LibvirtGuest) -> Iterator[None]:
    """Somebody else's snapshot under way, for as long as the block takes."""

    def save() -> None:
        with suppress(libvirt.libvirtError), guest.domain() as domain:
            domain.snapshotCreateXML("<domainsnapshot><name>operator</name></domainsnapshot>")

    thread = threading.Thread(target=save)
    guest.hang()
    thread.start()
    try:
        yield
    finally:
        guest.go_on()
        thread.join()


async def test_work_of_somebody_else_is_waited_for_and_not_taken_for_ours(big: LibvirtGuest) -> None:
    async with backend_of(big.libvirtd.uri) as backend:
        with operator_saves(big):
            with big.domain() as domain, trio.fail_after(10):
                while domain.controlInfo()[0] != libvirt.VIR_DOMAIN_CONTROL_JOB:
                    await trio.sleep(0.01)
            with pytest.raises(BackendUnavailable, match="somebody else's work"):
                await backend.prepare(WEB, SnapshotKind.STANDBY)
            with trio.move_on_after(0.3) as scope:
                await settle(backend, new_request())
            assert scope.cancelled_caught
        await take(backend)
        assert big.names() == [NAME, "operator"]
        assert await settle(backend, new_request("nightly-20260309-030000")) == Settled()
        assert big.names() == big.tags() == [NAME, "operator"]


async def test_a_disk_that_is_too_small_for_the_memory_fails_the_capture_and_the_guest_runs_on() -> None:
    libvirtd = shared_libvirtd()
    home = libvirtd.new_home() / "small"
    async with small_filesystem(home, "40m"), backend_of(libvirtd.uri) as backend:
        with running_libvirt_guest(libvirtd, memory_mb=128, filled=True, home=home) as guest:
            await guest.next_ticks(20)
            request = new_request()
            with pytest.raises(CaptureFailed, match=r"libvirt: .*Error while writing VM state"):
                await backend.capture(WEB, request)
            await guest.next_ticks()
            assert await settle(backend, request) == Settled()
            assert (guest.names(), guest.tags()) == ([], [])


async def test_a_snapshot_that_leaves_the_guest_no_room_is_deleted_and_the_guest_goes_on() -> None:
    libvirtd = shared_libvirtd()
    home = libvirtd.new_home() / "small"
    async with small_filesystem(home, "200m"), backend_of(libvirtd.uri) as backend:
        with running_libvirt_guest(libvirtd, memory_mb=64, tick_ms=300, home=home) as guest:
            await guest.next_ticks(2)
            request = new_request()
            captured = await backend.capture(WEB, request)
            make_full(home)
            await guest.comes_to(IO_ERROR)
            with pytest.raises(CaptureFailed, match=r"left no room .* deleted; the guest goes on"):
                await backend.complete(captured)
            resize(home, "200m")
            assert await settle(backend, request) == Settled()
            await guest.next_ticks()
            assert (guest.names(), guest.tags()) == ([], [])


async def test_a_guest_that_a_broken_disk_has_stopped_is_told_of_and_its_snapshot_is_kept(
    big: LibvirtGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capturing, "_disk_errors", lambda *_, **__: {"vda": 1})  # one that is not for lack of room
    async with backend_of(big.libvirtd.uri) as backend:
        captured = await backend.complete(await backend.capture(WEB, new_request()))
        assert captured.warnings == ("QEMU has stopped the guest at a write that failed, on vda; it is left so",)
        await backend.publish(captured.snapshot)
        assert await backend.list_snapshots(WEB) == (captured.snapshot,)


async def test_a_guest_that_stands_still_for_an_io_error_is_never_resumed_by_settling(
    heard_log: list[EventDict],
) -> None:
    libvirtd = shared_libvirtd()
    home = libvirtd.new_home() / "small"
    async with small_filesystem(home, "200m"), backend_of(libvirtd.uri) as backend:
        with running_libvirt_guest(libvirtd, memory_mb=64, tick_ms=300, home=home) as guest:
            await guest.next_ticks(2)
            request = new_request()
            await backend.capture(WEB, request)
            make_full(home)
            await guest.comes_to(IO_ERROR)
            resize(home, "200m")
            assert await backend.state(WEB) == Status(InstanceState.UNKNOWN, "paused: io error")
            settled = await settle(backend, request)
            assert not settled.resumed
            assert guest.state() == IO_ERROR


RELAY = """#!{python}
import os, select, socket, sys
there = socket.socket(socket.AF_UNIX)
there.connect({socket!r})
ends = {{0: there.fileno(), there.fileno(): 1}}
with open({pids!r}, "a") as file:
    print(os.getpid(), file=file)
while True:
    for end in select.select(list(ends), [], [])[0]:
        data = os.read(end, 65536)
        if not data:
            sys.exit()
        os.write(ends[end], data)
"""
"""A tunnel to libvirt, as ssh would be one."""


@pytest.fixture
def pids(tmp_path: Path) -> Iterator[Path]:
    """Where tunnels write who they are; ended with the test."""
    file = tmp_path / "pids"
    yield file
    for pid in file.read_text().split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


async def test_a_connection_over_the_network_that_is_dead_is_noticed(
    big: LibvirtGuest, tmp_path: Path, pids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "KEEPALIVE_S", 1)
    monkeypatch.setattr(connections, "KEEPALIVE_COUNT", 1)
    tunnel = tmp_path / "tunnel"
    tunnel.write_text(RELAY.format(python=sys.executable, socket=str(big.libvirtd.socket), pids=str(pids)))
    tunnel.chmod(0o700)
    async with backend_of(f"qemu+ext:///session?command={tunnel}") as backend:
        assert (await backend.prepare(WEB, SnapshotKind.STANDBY)).rooms == ()
        async with trio.open_nursery() as nursery:
            request, errors = await in_mid_capture(big, backend, nursery)
            for pid in pids.read_text().split():
                os.kill(int(pid), signal.SIGSTOP)
        (error,) = errors
        assert "libvirt could not be reached any more during the capture" in error
        assert error.endswith("the guest was not left paused")
        settled = await settle(backend, request)
        assert settled.snapshot is not None
        assert await backend.list_snapshots(WEB) == (settled.snapshot,)
    await big.next_ticks()
