"""Guests whose VMM has ended: captured by their disks, and never while something uses them."""

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from hypemand.backends.base import Backend, BackendUnavailable, CaptureFailed, Unsupported
from hypemand.backends.vmm import disks as disks_module
from hypemand.core.model import InstanceState, RestoreAction, SnapshotKind
from tests.vmm_backend import carry_out, opened, request, run_of
from tests.vmm_guest import CLOUD_HYPERVISOR, KINDS, Guest, count_in, running_guest

both = pytest.mark.parametrize("kind", KINDS)
STOPPED = request(kind=SnapshotKind.STOPPED)


@asynccontextmanager
async def stopped(kind: str, directory: Path, *, left_over: bool = True) -> AsyncIterator[tuple[Guest, Backend]]:
    """A guest that has run, and a backend that knows where its disks are."""
    with tempfile.TemporaryDirectory(prefix="hypemand-") as short:
        socket = Path(short) / "web-1.sock"
        async with running_guest(kind, directory, socket=socket) as guest:
            pass
        if not left_over:
            socket.unlink()
        async with opened(guest, directory, disks=[f"{directory}/{{instance}}/*.raw"]) as backend:
            yield guest, backend


@both
@pytest.mark.parametrize("left_over", [False, True])
async def test_a_guest_without_a_vmm_is_captured_and_restored(kind: str, left_over: bool, tmp_path: Path) -> None:
    async with stopped(kind, tmp_path, left_over=left_over) as (guest, backend):
        assert await backend.instances() == {guest.instance_id}
        assert (await backend.state(guest.instance_id)).state is InstanceState.STOPPED
        ready = await backend.prepare(guest.instance_id, SnapshotKind.STOPPED)
        assert ready.rooms[0].needed_bytes > 0
        made = await backend.complete(await backend.capture(guest.instance_id, STOPPED))
        await backend.publish(made.snapshot)
        assert await backend.list_snapshots(guest.instance_id) == (made.snapshot,)
        saved = guest.count()
        guest.disks[0].write_bytes(b"something else")
        carry_out(made.snapshot.restore, RestoreAction.RUN)
        assert guest.count() == saved > 0
        assert made.snapshot.restore[-1].action is RestoreAction.START


@both
async def test_without_disks_nothing_is_known_of_a_guest_without_a_vmm(kind: str, tmp_path: Path) -> None:
    async with stopped(kind, tmp_path) as (guest, _):
        async with opened(guest, tmp_path) as unconfigured:
            with pytest.raises(BackendUnavailable, match="left over"):
                await unconfigured.state(guest.instance_id)
            with pytest.raises(Unsupported, match="setting disks"):
                await unconfigured.prepare(guest.instance_id, SnapshotKind.STOPPED)
            assert unconfigured.capabilities.kinds == {SnapshotKind.STANDBY}
        async with opened(guest, tmp_path, disks=["/nowhere/{instance}.raw"]) as unmounted:
            with pytest.raises(BackendUnavailable, match=r"no disk fits /nowhere.*not mounted"):
                await unmounted.state(guest.instance_id)


@both
async def test_a_vmm_that_starts_while_its_disks_are_copied_fails_the_capture(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_disks = disks_module.copy_disks
    async with stopped(kind, tmp_path) as (guest, backend):

        async def start_and_copy(*args: object) -> dict[str, int]:
            nursery.start_soon(_run, kind, tmp_path, guest.socket, over)
            with trio.fail_after(20):
                while not _runs(guest):
                    await trio.sleep(0.01)
            return await copy_disks(*args)  # type: ignore[arg-type]

        over = trio.Event()
        monkeypatch.setattr(disks_module, "copy_disks", start_and_copy)
        async with trio.open_nursery() as nursery:
            with pytest.raises(CaptureFailed, match=r"written to while it was copied|is Running now"):
                await backend.capture(guest.instance_id, STOPPED)
            over.set()


def _runs(guest: Guest) -> bool:
    try:
        return guest.state() == "Running"
    except OSError:
        return False


async def _run(kind: str, directory: Path, socket: Path, over: trio.Event) -> None:
    async with running_guest(kind, directory, socket=socket, wait=False):
        await over.wait()


@both
async def test_a_vmm_that_runs_when_the_capture_begins_fails_it(kind: str, tmp_path: Path) -> None:
    async with (
        running_guest(kind, tmp_path) as guest,
        opened(guest, tmp_path, disks=[f"{tmp_path}/{{instance}}/*.raw"]) as backend,
    ):
        with pytest.raises(CaptureFailed, match="is Running now"):
            await backend.capture(guest.instance_id, STOPPED)


@both
async def test_a_vmm_whose_socket_was_deleted_is_not_taken_for_stopped(kind: str, tmp_path: Path) -> None:
    async with running_guest(kind, tmp_path) as guest:
        async with opened(guest, tmp_path, disks=[f"{tmp_path}/{{instance}}/*.raw"]) as backend:
            await backend.state(guest.instance_id)
            guest.socket.rename(guest.away)
            for ask in (
                lambda: backend.state(guest.instance_id),
                lambda: backend.capture(guest.instance_id, STOPPED),
                lambda: backend.settle(run_of(backend, guest), ours=True),
            ):
                with pytest.raises(BackendUnavailable, match=f"its VMM runs .process {guest.process.pid}"):
                    await ask()
        if kind == CLOUD_HYPERVISOR:  # another process has never seen the VMM, but sees its locks
            async with opened(guest, tmp_path, disks=[f"{tmp_path}/{{instance}}/*.raw"]) as other:
                with pytest.raises(BackendUnavailable, match="a process has locked"):
                    await other.state(guest.instance_id)


@both
async def test_disks_that_are_written_to_while_they_are_copied_fail_the_capture(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_disks = disks_module.copy_disks
    async with stopped(kind, tmp_path) as (guest, backend):

        async def write_and_copy(*args: object) -> dict[str, int]:
            with guest.disks[0].open("r+b") as file:
                file.write(b"x")
            return await copy_disks(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(disks_module, "copy_disks", write_and_copy)
        with pytest.raises(CaptureFailed, match="something uses the disks"):
            await backend.capture(guest.instance_id, STOPPED)


@both
async def test_a_run_of_a_guest_whose_vmm_has_ended_is_settled_by_its_disks(kind: str, tmp_path: Path) -> None:
    async with stopped(kind, tmp_path) as (guest, backend):
        made = await backend.complete(await backend.capture(guest.instance_id, STOPPED))
        settled = await backend.settle(run_of(backend, guest), ours=True)
        assert (settled.snapshot, settled.resumed) == (None, False)
        assert list((tmp_path / "catalog").glob("*/.*")) == []
        assert made.snapshot.size_bytes == guest.disks[0].stat().st_size
        assert count_in(guest.disks[0]) > 0
