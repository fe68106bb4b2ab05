"""A guest that QEMU stopped at a write that failed: whether our snapshot is to blame, and how it goes on."""

import os
from collections.abc import Iterable
from pathlib import Path

import trio
from attrs import frozen

from hypemand.backends.qemu.disks import Disk, read_disks
from hypemand.backends.qmp import Monitor

LOOK_S = 0.25
"""How long to look after a capture whether the guest's next writes go well."""
SCARCE_LOOK_S = 5.0
SCARCE_BYTES = 64 * 1024 * 1024
"""With less free than that, it is looked at for longer."""
_PAUSE_S = 0.05


@frozen
class Stuck:
    """A guest in ``io-error``, its disks as they are, and those of them that had no room for a write."""

    disks: tuple[Disk, ...]

    @property
    def full(self) -> tuple[Disk, ...]:
        """The disks that had no room."""
        return tuple(disk for disk in self.disks if disk.out_of_room)


async def find_stuck(monitor: Monitor) -> Stuck | None:
    """The guest's trouble, if QEMU has stopped it at a failed write."""
    if (await monitor.execute("query-status"))["status"] != "io-error":
        return None
    return Stuck(await read_disks(monitor))


async def watch(monitor: Monitor, for_s: float) -> Stuck | None:
    """Look at the guest for so long; return as soon as it is stuck."""
    until = trio.current_time() + for_s
    while True:
        stuck = await find_stuck(monitor)
        if stuck is not None or trio.current_time() > until:
            return stuck
        await trio.sleep(_PAUSE_S)


async def continue_once(monitor: Monitor) -> str:
    """Let a stuck guest try its write again, and tell how that went."""
    await monitor.execute("cont")
    if await watch(monitor, LOOK_S) is None:
        return "the guest goes on"
    return "the guest still stands still for lack of room: free some, then resume it (QMP command cont)"


def is_scarce(files: Iterable[str]) -> bool:
    """Whether a filesystem of *files* has little room left. Blocking; files that are not seen from here don't count."""
    return any(_free_bytes(file) < SCARCE_BYTES for file in files if Path(file).is_absolute() and Path(file).is_file())


def _free_bytes(file: str) -> int:
    usage = os.statvfs(file)
    return usage.f_bavail * usage.f_frsize
