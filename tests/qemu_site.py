"""A host with QEMU guests: the real daemon over them, a schedule of another backend beside. A helper for tests."""

import os
import socket as sockets
import subprocess
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import trio
from attrs import define, frozen

from tests.processes import DaemonProcess, Lab, run_cli, running_daemon
from tests.qemu_guest import Guest

OTHER = "other-1"
OUTCOMES = ("snapshot taken", "run failed", "run interrupted", "run skipped")
LATE_S = 5.0  # a busy machine takes its time; whoever waits for a hypervisor that hangs is later still
"""However bad things are at one guest, no other schedule is later than that."""


@frozen
class Site:
    """A running daemon, with what is asked of it after a fault."""

    lab: Lab
    daemon: DaemonProcess

    async def run_due(self, *instances: str) -> int:
        """Make runs due now; return the mark of the log from which on they are told."""
        mark = self.daemon.mark()
        self.lab.make_due(self.daemon, *instances or ("web-1",))
        return mark

    async def assert_others_are_on_time(self) -> None:
        """The other schedule's run begins in time, now that one guest is in trouble."""
        mark = await self.run_due(OTHER)
        taken = await self.daemon.wait_for("snapshot taken", since=mark, instance_id=OTHER)
        assert taken["late_s"] < LATE_S

    async def assert_next_slot_works(self, guest: Guest) -> None:
        """The next run of the guest succeeds, what is listed is whole, and the guest runs."""
        await self.settled()
        mark = await self.run_due(guest.instance_id)
        await self.daemon.wait_for("snapshot taken", since=mark, instance_id=guest.instance_id)
        await guest.next_ticks()
        assert (await guest.qmp("query-status"))["status"] == "running"
        await self.assert_listed_is_whole(guest)

    async def settled(self) -> None:
        """Wait until no run is open, and all are in the schedules' files, which can be edited then."""
        with trio.fail_after(60):
            while (
                len(self.lab.started()) > len({run["run_id"] for run in self.ended()}) or self.told() - self.written()
            ):
                await trio.sleep(0.05)
        last = {str(run["instance_id"]): run["outcome"] for run in self.lab.log_lines("finished")}
        for instance in (instance for instance, outcome in last.items() if outcome != "skipped"):
            await self.lab.recorded(len(self.lab.history(instance)), instance)

    def told(self) -> set[str]:
        """Runs of which the log tells how they ended."""
        return {line["run_id"] for event in OUTCOMES for line in self.daemon.logged(event)}

    def written(self) -> set[str]:
        """Runs of which the run log does."""
        return {str(run["run_id"]) for run in self.lab.log_lines("finished")}

    def ended(self) -> list[dict[str, object]]:
        ids = {run["run_id"] for run in self.lab.started()}
        return [run for run in self.lab.log_lines("finished") if run["run_id"] in ids]

    async def assert_listed_is_whole(self, guest: Guest) -> None:
        """What hypemand lists is what its runs have kept and what is on the disks, and nothing half done is left."""
        ran = await run_cli("snapshots", guest.instance_id, "--json", "-c", self.lab.config)
        listed = [snapshot["name"] for snapshot in ran.json]
        runs = self.lab.history(guest.instance_id)
        assert listed == [run["snapshot_name"] for run in runs if run["snapshot_id"]]
        on_disk = await tags_of(guest)
        assert {node: sorted(tags) for node, tags in on_disk.items()} == dict.fromkeys(on_disk, sorted(listed))
        assert list((self.lab.state / "catalog" / "vms").glob("*/.*")) == []
        objects = await guest.qmp("qom-list", path="/objects")
        assert [found["name"] for found in objects if found["name"].startswith("hypemand")] == []
        assert [job["id"] for job in await guest.qmp("query-jobs")] == []


async def tags_of(guest: Guest) -> dict[str, list[str]]:
    """Tags by node, without those of an operator."""
    nodes = await guest.qmp("query-named-block-nodes", flat=True)
    return {
        n["node-name"]: [s["name"] for s in n["image"].get("snapshots", ()) if not s["name"].startswith("operator")]
        for n in nodes
        if n["drv"] == "qcow2"
    }


@asynccontextmanager
async def running_site(
    directory: Path,
    socket: Path,
    *,
    mode: str = "internal",
    instances: Iterable[str] = ("web-1",),
    concurrency: int = 2,
) -> AsyncIterator[Site]:
    """The daemon with guests behind *socket*; their schedules run when the test makes them due."""
    lab = Lab(directory)
    schedules = "".join(
        f"""
[[schedules]]
instance = "{instance}"
backend = "{"lab" if instance == OTHER else "vms"}"
interval = "1m"
retention = {{ max_count = 100 }}
"""
        for instance in (*instances, OTHER)
    )
    lab.replace(f"""
state_dir = "state"
[runs]
min_free = "1MiB"
[backends.vms]
type = "qemu"
socket = "{socket}"
mode = "{mode}"
concurrency = {concurrency}
[backends.lab]
type = "embedded"
root = "lab"
instances = {{ {OTHER} = {{ memory = "64KiB", disk = "256KiB" }} }}
{schedules}
""")
    async with running_daemon(lab.config) as daemon:
        for instance in (*instances, OTHER):
            await daemon.wait_for("schedule made", instance_id=instance)
        yield Site(lab, daemon)
        await daemon.stop()


@define(eq=False)
class Wire:
    """A monitor that is reached through the test, which can cut it. Descriptors pass, too."""

    path: Path
    target: Path
    _cut: trio.Event

    def cut(self) -> None:
        """Cut what is connected; later connections work."""
        self._cut.set()
        self._cut = trio.Event()

    async def serve(self) -> None:
        """Pass connections on, one after the other, until cancelled."""
        listener = trio.socket.socket(trio.socket.AF_UNIX)
        with listener:
            await listener.bind(str(self.path))
            listener.listen(1)
            while True:
                near, _ = await listener.accept()
                with near:
                    await self._pass_on(near)

    async def _pass_on(self, near: trio.socket.SocketType) -> None:
        far = trio.socket.socket(trio.socket.AF_UNIX)
        with far:
            await far.connect(str(self.target))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_pump, near, far, nursery.cancel_scope)
                nursery.start_soon(_pump, far, near, nursery.cancel_scope)
                await self._cut.wait()
                nursery.cancel_scope.cancel()


async def _pump(source: trio.socket.SocketType, target: trio.socket.SocketType, scope: trio.CancelScope) -> None:
    while True:
        try:
            data, ancillary, _, _ = await source.recvmsg(65536, sockets.CMSG_SPACE(4))
            if not data:
                break
            sent = await target.sendmsg([data], [(level, kind, bytes(held)) for level, kind, held in ancillary])
            while sent < len(data):
                sent += await target.send(data[sent:])
        except OSError:
            break
        for _, _, held in ancillary:
            os.close(int.from_bytes(held[:4], "little"))
    scope.cancel()


@asynccontextmanager
async def wired(guest: Guest) -> AsyncIterator[Wire]:
    """A `Wire` to the monitor of *guest*."""
    wire = Wire(guest.socket.with_name("wire.sock"), guest.socket, trio.Event())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wire.serve)
        yield wire
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def small_filesystem(directory: Path, size: str) -> AsyncIterator[None]:
    """A tmpfs of *size* at *directory*."""
    directory.mkdir()
    mount("tmpfs", "-o", f"size={size}", "-t", "tmpfs", str(directory))
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def make_full(directory: Path) -> None:
    """Make the filesystem of `small_filesystem` as small as what is in it, though that is growing."""
    while True:
        usage = os.statvfs(directory)
        with suppress(subprocess.CalledProcessError):
            resize(directory, f"{(usage.f_blocks - usage.f_bfree) * usage.f_frsize // 1024}k")
            return


def resize(directory: Path, size: str) -> None:
    """Give the filesystem of `small_filesystem` another *size*."""
    mount(str(directory), "-o", f"remount,size={size}")


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)
