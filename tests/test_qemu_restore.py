"""The way back, as docs/restore.md and ``snapshots --json`` tell it, gone with a real guest: it counts on."""

import os
import re
import shlex
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import orjson
import pytest
import trio
from attrs import evolve, frozen

from hypemand.backends import qmp
from hypemand.backends.base import BackendUnavailable
from hypemand.core.model import Freezer, RestoreAction, Snapshot, SnapshotKind
from tests.qemu_backend import make_backend, opened, take
from tests.qemu_guest import Guest, blockdev, make_disk, run_img, running_guest

pytestmark = pytest.mark.qemu

PAGE = Path(__file__).parent.parent / "docs" / "restore.md"


def commands_of(page: str, part: str) -> list[str]:
    """The lines of the code block that the page marks as *part*."""
    (block,) = re.findall(rf"<!-- {re.escape(part)} -->\n```\w+\n(.*?)```", page, re.DOTALL)
    return [line for line in block.splitlines() if line]


@frozen
class Restored:
    """A guest that is back: its process, its serial line, and where the test can ask it."""

    process: "subprocess.Popen[bytes]"
    log: Path
    monitor: Path

    def ticks(self) -> list[int]:
        lines = self.log.read_text().split("\n")[1:-1] if self.log.exists() else []
        return [int(line, 16) for line in lines if re.fullmatch("[0-9a-f]{8}", line)]

    async def next_ticks(self, count: int) -> list[int]:
        with trio.fail_after(30):
            while len(self.ticks()) < count:
                assert self.process.poll() is None
                await trio.sleep(0.01)
        return self.ticks()


@asynccontextmanager
async def started(guest: Guest, disks: list[Path], command: str) -> AsyncIterator[Restored]:
    """Run *command*, with ``$GUEST`` in it, on the disks of *guest*, which has ended."""
    log, monitor = guest.log.with_name("restored.log"), guest.log.with_name("m")
    own = [
        *("qemu-system-x86_64", "-nodefaults", "-accel", "tcg", "-machine", "pc", "-m", "64", "-display", "none"),
        *("-serial", f"file:{log}", "-qmp", f"unix:{monitor},server=on,wait=off", "-no-reboot"),
        *blockdev("disk0", disks[0])[:3],
        "virtio-blk-pci,drive=disk0,bootindex=0",
        *(part for number, disk in enumerate(disks[1:], 1) for part in blockdev(f"disk{number}", disk)),
    ]
    script = log.with_name("start-guest")
    script.write_text(f'#!/bin/sh\nexec {shlex.join(own)} "$@"\n')
    script.chmod(0o700)
    process = subprocess.Popen(["bash", "-c", f"exec {command}"], env={**os.environ, "GUEST": str(script)})
    try:
        yield Restored(process, log, monitor)
    finally:
        process.kill()
        process.wait()


@frozen
class Taken:
    """A snapshot of a guest that has ended since, and what the guest had counted to."""

    guest: Guest
    disks: list[Path]
    snapshot: Snapshot
    before: int
    last: int

    def words(self, tmp_path: Path) -> dict[str, str]:
        """What the examples of the page stand for here."""
        memory = tmp_path / "catalog" / "web-1" / self.snapshot.id / "memory"
        return {
            "/var/lib/hypemand/catalog/vms/web-1/01JP0ZK3/memory": str(memory),
            "/var/lib/vms/web-1/disk.qcow2": str(self.disks[0]),
            "nightly-20260309-020000": self.snapshot.name,
        }

    def page(self, part: str, tmp_path: Path) -> list[str]:
        """The page's commands with those words put in."""
        lines = commands_of(PAGE.read_text(), part)
        for example, real in self.words(tmp_path).items():
            lines = [line.replace(example, real) for line in lines]
        return lines

    def tick_on_disk(self) -> int:
        """The counter in the boot disk, as the snapshot has it."""
        raw = self.disks[0].with_suffix(".raw")
        run_img("convert", "-l", f"snapshot.name={self.snapshot.name}", "-O", "raw", self.disks[0], raw)
        return int.from_bytes(raw.read_bytes()[4096:4100], "little")


async def taken(tmp_path: Path, freezes: Freezer, disks: int = 1) -> Taken:
    """A guest with so many disks that ran, was captured, ran on, and was killed."""
    others = [make_disk(tmp_path / f"other-{number}.qcow2") for number in range(1, disks)]
    extra = [part for number, disk in enumerate(others, 1) for part in blockdev(f"disk{number}", disk)]
    async with running_guest(tmp_path, extra=extra) as guest:
        backend = await opened(guest, tmp_path, mode="background")
        before = guest.ticks()[-1]
        snapshot = await take(backend, freezes=freezes)
        last = (await guest.next_ticks(10))[-1]
    return Taken(guest, [guest.disk, *others], snapshot, before, last)


def shell(command: str) -> None:
    subprocess.run(["bash", "-c", command], check=True, capture_output=True)


async def assert_counts_on(restored: Restored, taken: Taken, on_disk: int) -> None:
    ticks = await restored.next_ticks(20)
    assert "BOOT" not in restored.log.read_text()
    # The line that is cut and the one before it were printed from the memory that was saved.
    assert abs(ticks[0] - 2 - on_disk) <= 1
    assert taken.before - 1 <= on_disk <= taken.last
    assert ticks == list(range(ticks[0], ticks[0] + len(ticks)))


async def test_a_guest_captured_in_mode_internal_comes_back_by_the_pages_command(tmp_path: Path) -> None:
    was = await taken(tmp_path, Freezer.HYPERVISOR)
    (start,) = was.page("internal", tmp_path)
    (step,) = was.snapshot.restore
    assert (step.action, f"$GUEST {step.command}") == (RestoreAction.START, start)
    on_disk = was.tick_on_disk()
    async with started(was.guest, was.disks, start) as restored:
        await assert_counts_on(restored, was, on_disk)


async def test_a_guest_captured_in_the_background_comes_back_by_the_pages_commands(tmp_path: Path) -> None:
    was = await taken(tmp_path, Freezer.ENGINE)
    revert, start = was.page("background", tmp_path)
    (then,) = was.page("background, monitor", tmp_path)
    first, second, third = was.snapshot.restore
    assert (first.action, first.command) == (RestoreAction.RUN, revert)
    assert (second.action, f"$GUEST {second.command}") == (RestoreAction.START, start)
    assert (third.action, third.command) == (RestoreAction.MONITOR, then)
    on_disk = was.tick_on_disk()
    shell(revert)
    async with started(was.guest, was.disks, start) as restored:
        await monitor_command(restored, then)
        await assert_counts_on(restored, was, on_disk)


async def monitor_command(restored: Restored, line: str) -> None:
    """Send *line* once the memory is loaded."""
    command = orjson.loads(line)["execute"]
    with trio.fail_after(30):
        while True:
            with suppress(BackendUnavailable):
                async with qmp.connect(restored.monitor) as monitor:
                    while (await monitor.execute("query-status"))["status"] != "paused":
                        await trio.sleep(0.01)
                    await monitor.execute(command)
                    return
            await trio.sleep(0.01)


@pytest.mark.parametrize("freezes", [Freezer.HYPERVISOR, Freezer.ENGINE])
async def test_the_steps_of_the_snapshot_itself_lead_back_with_several_disks(tmp_path: Path, freezes: Freezer) -> None:
    was = await taken(tmp_path, freezes, disks=3)
    on_disk = was.tick_on_disk()
    starts = [step.command for step in was.snapshot.restore if step.action is RestoreAction.START]
    for step in was.snapshot.restore:
        if step.action is RestoreAction.RUN:
            shell(step.command)
    async with started(was.guest, was.disks, f"$GUEST {starts[0]}") as restored:
        for step in was.snapshot.restore:
            if step.action is RestoreAction.MONITOR:
                await monitor_command(restored, step.command)
        await assert_counts_on(restored, was, on_disk)


async def test_a_stopped_guest_comes_back_by_the_pages_commands(tmp_path: Path) -> None:
    was = await taken(tmp_path, Freezer.HYPERVISOR)
    backend = make_backend(tmp_path / "{instance}.sock", tmp_path, disks=[str(tmp_path / "{instance}.qcow2")])
    snapshot = await take(backend, "stopped", kind=SnapshotKind.STOPPED, freezes=None)
    stopped = evolve(was, snapshot=snapshot)
    on_disk = stopped.tick_on_disk()
    async with running_guest(tmp_path) as guest:
        await guest.next_ticks(20)
    revert, start = stopped.page("stopped", tmp_path)
    assert [step.action for step in snapshot.restore] == [RestoreAction.RUN, RestoreAction.START]
    assert [snapshot.restore[0].command, f"$GUEST {snapshot.restore[1].command}".strip()] == [revert, start]
    shell(revert)
    assert on_disk == int.from_bytes(raw_bytes(was.disks[0])[4096:4100], "little")
    async with started(was.guest, was.disks, start) as restored:
        await restored.next_ticks(3)
        assert restored.log.read_text().startswith("BOOT")


def raw_bytes(disk: Path) -> bytes:
    raw = disk.with_suffix(".now")
    run_img("convert", "-O", "raw", disk, raw)
    return raw.read_bytes()


async def test_a_disk_as_it_was_can_be_looked_at_by_the_pages_command(tmp_path: Path) -> None:
    was = await taken(tmp_path, Freezer.ENGINE)
    (look,) = was.page("look", tmp_path)
    shell(look.replace("/tmp/web-1-then.qcow2", str(tmp_path / "then.qcow2")))
    then = int.from_bytes(raw_bytes(tmp_path / "then.qcow2")[4096:4100], "little")
    assert then == was.tick_on_disk()
