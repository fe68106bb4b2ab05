"""A guest of a real libvirtd, and the hand of an operator on it. A helper for tests, not a test."""

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path

import libvirt
import trio
from attrs import define, field, frozen

from hypemand.backends.libvirt.domains import Pause, mark
from hypemand.core.model import InstanceId
from tests.libvirt_site import Libvirtd, domain_xml, running_libvirtd, ticker_disk

BOOT_PATIENCE_S = 30
QUIET_S = 2.0
"""A save that writes nothing for so long is none."""
_WITH_ALL = libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA | libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
RUNNING = (libvirt.VIR_DOMAIN_RUNNING, 5)
"""Running, unpaused."""
SAVING = (libvirt.VIR_DOMAIN_PAUSED, Pause.SAVE)
BY_USER = (libvirt.VIR_DOMAIN_PAUSED, Pause.USER)
IO_ERROR = (libvirt.VIR_DOMAIN_PAUSED, Pause.IO_ERROR)


@define
class _Shared:
    """What the tests of one process share: to start it costs more than most of them."""

    stack: ExitStack = field(factory=ExitStack)
    libvirtd: Libvirtd | None = None
    guests: ExitStack = field(factory=ExitStack)
    guest: "LibvirtGuest | None" = None


_SHARED = _Shared()
_numbers = count(1)


def shared_libvirtd() -> Libvirtd:
    """A libvirtd, started for the first who asks."""
    if _SHARED.libvirtd is None:
        _SHARED.libvirtd = _SHARED.stack.enter_context(running_libvirtd())
    return _SHARED.libvirtd


@contextmanager
def shared_guest() -> Iterator["LibvirtGuest"]:
    """A guest of it without snapshots, running; nobody else's until the end of the block. In between it is paused."""
    if _SHARED.guest is None:
        _SHARED.guest = _SHARED.guests.enter_context(
            running_libvirt_guest(shared_libvirtd(), instance_id=f"shared-{next(_numbers)}", tick_ms=200)
        )
    guest = _SHARED.guest
    try:
        guest.tidy_up()
        yield guest
        guest.put_aside()
    except BaseException:  # whatever state it is in
        _SHARED.guest = None
        _SHARED.guests.close()
        raise


def end_shared() -> None:
    """End what was started."""
    _SHARED.guests.close()
    _SHARED.stack.close()
    _SHARED.guest = _SHARED.libvirtd = None


@frozen(kw_only=True)
class LibvirtGuest:
    """A guest that libvirt has defined and started."""

    libvirtd: Libvirtd
    instance_id: InstanceId
    disk: Path
    log: Path

    @contextmanager
    def domain(self) -> Iterator[libvirt.virDomain]:
        """The guest by a connection of the test's own."""
        connection = libvirt.open(self.libvirtd.uri)
        try:
            yield connection.lookupByName(self.instance_id)
        finally:
            connection.close()

    def state(self) -> tuple[int, int]:
        """State and reason, in libvirt's numbers."""
        with self.domain() as domain:
            state, reason = domain.state()
            return state, reason

    def runs(self) -> bool:
        """Whether its vCPUs run, as far as libvirt knows."""
        return self.state()[0] == libvirt.VIR_DOMAIN_RUNNING

    def names(self) -> list[str]:
        """Snapshots that libvirt has of it, oldest first."""
        with self.domain() as domain:
            return sorted(domain.snapshotListNames())

    def tags(self) -> list[str]:
        """Snapshots that are in its disk, whoever knows of them."""
        command = ["qemu-img", "snapshot", "-U", "-l", str(self.disk)]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return sorted(line.split()[1] for line in told.splitlines()[2:])

    def hang(self) -> None:
        """Have its QEMU stand still, as if it hung; `go_on` ends that."""
        os.kill(self.libvirtd.pid_of(self.instance_id), signal.SIGSTOP)

    def go_on(self) -> None:
        """Have its QEMU go on."""
        os.kill(self.libvirtd.pid_of(self.instance_id), signal.SIGCONT)

    async def comes_to(self, *states: tuple[int, int]) -> None:
        """Wait until it is in one of these states."""
        with self.domain() as domain, trio.fail_after(BOOT_PATIENCE_S):
            while tuple(domain.state()) not in states:
                await trio.sleep(0.005)

    async def saved(self) -> None:
        """Wait until QEMU is through with a save whose libvirtd was killed.

        libvirt 9.0 that is started before takes QEMU's late answer for that to
        a question of its own, can make nothing of it, and ends the guest.
        """
        written, quiet_since = 0, trio.current_time()
        with trio.fail_after(BOOT_PATIENCE_S):
            # If libvirtd was killed between its stop and its save, nothing is ever written.
            while not self._has_tags() and trio.current_time() < quiet_since + QUIET_S:
                blocks = self.disk.stat().st_blocks
                if blocks != written:
                    written, quiet_since = blocks, trio.current_time()
                await trio.sleep(0.05)
        await trio.sleep(0.3)

    def _has_tags(self) -> bool:
        with suppress(subprocess.CalledProcessError):
            return bool(self.tags())
        return False

    def put_aside(self) -> None:
        """Pause it, so that it takes no time from anybody."""
        if self.libvirtd.process.poll() is not None:
            self.libvirtd.start()
        with self.domain() as domain:
            if domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING:
                domain.suspend()

    def tidy_up(self) -> None:
        """Take away all that a test has left in it, and let it run."""
        with self.domain() as domain:
            for snapshot in domain.listAllSnapshots():
                snapshot.delete()
            mark(domain, None)
            if domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED:
                domain.resume()
        assert self.tags() == []

    def serial(self) -> str:
        """All that it has printed since it was started."""
        return self.log.read_text() if self.log.exists() else ""

    def ticks(self) -> list[int]:
        """Ticks printed in full, without the first line: a restored guest begins in the middle of one."""
        lines = self.serial().split("\n")[1:-1]
        return [int(line, 16) for line in lines if re.fullmatch("[0-9a-f]{8}", line)]

    async def next_ticks(self, count: int = 2) -> list[int]:
        """Wait until it has printed *count* more, and return all."""
        seen = len(self.ticks())
        with trio.fail_after(BOOT_PATIENCE_S):
            while len(ticks := self.ticks()) < seen + count:
                await trio.sleep(0.01)
        return ticks


@contextmanager
def running_libvirt_guest(
    libvirtd: Libvirtd,
    *,
    instance_id: str = "web-1",
    memory_mb: int = 16,
    filled: bool = False,
    tick_ms: int = 10,
    devices: str = "",
    starts: bool = True,
    home: Path | None = None,
) -> Iterator[LibvirtGuest]:
    """A guest until the end of the block.

    Args:
        home: An empty directory for its disk, which is taken away with it.
        filled: Whether its RAM has no zero pages, so that a save takes a while.
        tick_ms: How long it waits between ticks.
        devices: More of them, in libvirt's XML; ``{home}`` is the directory of its disk.
    """
    fill_end_mb = memory_mb - 16 if filled else 0
    home = home or libvirtd.new_home()
    disk = ticker_disk(libvirtd, home / f"{instance_id}.qcow2", fill_end_mb=fill_end_mb, tick_ms=tick_ms)
    log = disk.with_suffix(".log")
    xml = domain_xml(instance_id, disk, log, memory_mb=memory_mb, devices=devices.replace("{home}", str(home)))
    connection = libvirt.open(libvirtd.uri)
    try:
        domain = connection.defineXML(xml)
        if starts:
            domain.create()
    finally:
        connection.close()
    guest = LibvirtGuest(libvirtd=libvirtd, instance_id=InstanceId(instance_id), disk=disk, log=log)
    try:
        yield guest
    finally:
        _take_away(guest)


def _take_away(guest: LibvirtGuest) -> None:
    if guest.libvirtd.process.poll() is not None:
        guest.libvirtd.start()
    with suppress(libvirt.libvirtError), guest.domain() as domain:
        with suppress(libvirt.libvirtError):
            domain.destroy()
        domain.undefineFlags(_WITH_ALL)
    shutil.rmtree(guest.disk.parent, ignore_errors=True)  # it may be a mount
