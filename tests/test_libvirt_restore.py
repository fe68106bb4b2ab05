"""The way back to a snapshot of libvirt's, as docs/restore.md and ``snapshots --json`` tell it, with a real guest."""

import subprocess
from pathlib import Path

import pytest

from hypemand.core.model import RestoreAction, Snapshot, SnapshotKind
from tests.libvirt_backend import NAME, WEB, backend_of, new_request, settle, take
from tests.libvirt_guest import LibvirtGuest, running_libvirt_guest, shared_libvirtd
from tests.test_qemu_restore import commands_of

pytestmark = pytest.mark.libvirt

PAGE = Path(__file__).parent.parent / "docs" / "restore.md"


def page(part: str, guest: LibvirtGuest) -> list[str]:
    """The page's commands, with the words of *guest* put in."""
    lines = commands_of(PAGE.read_text(), part)
    return [line.replace("qemu:///system", f"'{guest.libvirtd.uri}'") for line in lines]


def shell(command: str) -> None:
    done = subprocess.run(["bash", "-c", command], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def assert_is_way_back(snapshot: Snapshot, commands: list[str]) -> None:
    assert [step.action for step in snapshot.restore] == [RestoreAction.RUN] * len(commands)
    assert [step.command for step in snapshot.restore] == commands


async def assert_counts_on(guest: LibvirtGuest, before: int, after: int) -> None:
    """The guest goes on from between these two ticks, without having booted."""
    first, *ticks = await guest.next_ticks(20)
    assert "BOOT" not in guest.serial()
    assert before - 1 <= first <= after + 2
    assert [first, *ticks] == list(range(first, first + len(ticks) + 1))


@pytest.mark.parametrize("runs", [True, False], ids=["over a guest that runs", "over one that is shut off"])
async def test_a_guest_captured_while_it_ran_comes_back_by_the_pages_command(runs: bool) -> None:
    with running_libvirt_guest(shared_libvirtd(), memory_mb=64) as guest:
        async with backend_of(guest.libvirtd.uri) as backend:
            before = (await guest.next_ticks(20))[-1]
            snapshot = await take(backend)
            after = guest.ticks()[-1]
            await take(backend, "nightly-20260310-020000")
            await guest.next_ticks(20)
            if not runs:
                with guest.domain() as domain:
                    domain.destroy()
            commands = page("libvirt", guest)
            assert_is_way_back(snapshot, commands)
            for command in commands:
                shell(command)
            await assert_counts_on(guest, before, after)
            assert [kept.name for kept in await backend.list_snapshots(snapshot.instance_id)] == [
                NAME,
                "nightly-20260310-020000",
            ]
            await take(backend, "nightly-20260311-020000")
            for kept in await backend.list_snapshots(snapshot.instance_id):
                await backend.delete_snapshot(kept)
            assert guest.tags() == []
            await guest.next_ticks()


async def test_a_guest_that_was_reverted_can_still_have_the_run_settled_that_made_its_snapshot() -> None:
    with running_libvirt_guest(shared_libvirtd()) as guest:
        async with backend_of(guest.libvirtd.uri) as backend:
            request = new_request()
            await backend.publish((await backend.capture(guest.instance_id, request)).snapshot)
            for command in page("libvirt", guest):
                shell(command)
            settled = await settle(backend, request)
            assert settled.snapshot is not None
            assert settled.snapshot.name == NAME
            await guest.next_ticks()


async def test_a_stopped_guest_comes_back_by_the_pages_commands() -> None:
    with running_libvirt_guest(shared_libvirtd()) as guest:
        async with backend_of(guest.libvirtd.uri) as backend:
            await guest.next_ticks(20)
            with guest.domain() as domain:
                domain.destroy()
            snapshot = await take(backend, kind=SnapshotKind.STOPPED)
            was = guest.disk.read_bytes()
            with guest.domain() as domain:
                domain.create()
            await guest.next_ticks(50)
            with guest.domain() as domain:
                domain.destroy()
            assert guest.disk.read_bytes() != was
            commands = page("libvirt, stopped", guest)
            assert_is_way_back(snapshot, commands)
            guest.log.unlink()
            for command in commands:
                shell(command)
            await guest.next_ticks(3)
            assert guest.serial().startswith("BOOT")


async def test_what_the_page_says_that_snapshots_forbid_is_what_libvirt_refuses() -> None:
    page = PAGE.with_name("libvirt.md").read_text()
    with running_libvirt_guest(shared_libvirtd()) as guest:

        def refusal(*words: str) -> str:
            command = ["virsh", "--connect", guest.libvirtd.uri, *words]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            assert done.returncode == 1
            return done.stderr.strip().rpartition(": ")[2]

        migrate = ("migrate", WEB, guest.libvirtd.uri)
        async with backend_of(guest.libvirtd.uri) as backend:
            await take(backend)
            live = refusal(*migrate, "--live")
            with guest.domain() as domain:
                domain.destroy()
            offline = refusal(*migrate, "--offline", "--persistent")
            undefined = refusal("undefine", WEB)
            assert live == offline
            assert f"| to migrate the guest, running or shut off | `{live}` |" in page
            assert f"| to undefine it while it is shut off | `{undefined}` |" in page
            shell(f"virsh --connect '{guest.libvirtd.uri}' undefine {WEB} --snapshots-metadata")
            assert await backend.list_snapshots(WEB) == ()
            assert guest.tags() == [NAME]


@pytest.mark.parametrize("made_of", ["number", "UUID", "option"])
async def test_the_way_back_of_a_guest_with_the_name_of_another_ones_number_leaves_the_other_alone(
    made_of: str,
) -> None:
    with running_libvirt_guest(shared_libvirtd()) as other:
        pid = other.libvirtd.pid_of(WEB)
        with other.domain() as domain:
            name = {"number": str(domain.ID()), "UUID": domain.UUIDString(), "option": "--current"}[made_of]
        with running_libvirt_guest(shared_libvirtd(), instance_id=name, starts=False) as guest:
            async with backend_of(guest.libvirtd.uri) as backend:
                await take(backend)
                request = new_request(kind=SnapshotKind.STOPPED)
                snapshot = (await backend.capture(guest.instance_id, request)).snapshot
                await backend.publish(snapshot)
                assert await backend.list_snapshots(guest.instance_id) == (snapshot,)
                for step in snapshot.restore:
                    assert step.command is not None
                    shell(step.command)
            assert guest.runs()
            assert other.libvirtd.pid_of(WEB) == pid
            await other.next_ticks()
