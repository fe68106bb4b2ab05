"""What is looked at before a capture: can this guest be captured, how, and what room will it take. Changes nothing."""

import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import structlog

from hypemand.backends.base import BackendUnavailable, Preparation, Room, Unsupported
from hypemand.backends.qemu import background, images
from hypemand.backends.qemu.disks import Disk, check_capturable, read_disks
from hypemand.backends.qemu.jobs import check_alone
from hypemand.backends.qemu.memory_file import can_reserve
from hypemand.backends.qemu.settings import BACKGROUND, INTERNAL
from hypemand.backends.qemu.threads import in_thread
from hypemand.backends.qmp import Monitor
from hypemand.core.model import Freezer

_MEMORY_MARGIN = 64 * 1024 * 1024
"""For the state of its devices."""
_DISK_MARGIN = 16 * 1024 * 1024
"""For the tables that a snapshot adds to a disk."""
_FALLBACK = (
    "mode background is not possible with this guest's QEMU, so it is captured in mode internal,"
    " which freezes it for longer"
)
_NO_RIGHT = ": or QEMU has no right to userfaultfd, see vm.unprivileged_userfaultfd in docs/qemu.md"
_log = structlog.get_logger()


async def prepare_running(monitor: Monitor, mode: str, catalog: Path, known_disks: Collection[Path]) -> Preparation:
    """For a guest that runs.

    Args:
        mode: As configured.
        catalog: Where memory goes that is saved in the background.
        known_disks: The guest's disks by the patterns for stopped guests.
    """
    await check_alone(monitor)
    if blocked := (await monitor.execute("query-migrate")).get("blocked-reasons"):
        raise Unsupported(f"QEMU can't save the state of this guest: {'; '.join(blocked)}")
    disks = await read_disks(monitor)
    check_capturable(disks)
    warnings = _not_known(disks, known_disks)
    if mode == BACKGROUND and (why := await _why_not_in_background(monitor, catalog)) is not None:
        mode = INTERNAL
        warnings = (*warnings, f"{_FALLBACK} ({why}{_NO_RIGHT if 'host kernel' in why else ''})")
    memory = await memory_estimate(monitor)
    in_background = mode == BACKGROUND
    on_first_disk = _DISK_MARGIN if in_background else memory
    rooms = await in_thread(_rooms, disks, [on_first_disk, *[_DISK_MARGIN] * (len(disks) - 1)])
    return Preparation(
        rooms=(*rooms, Room(catalog, memory)) if in_background else rooms,
        taken_names=_names(disks),
        freezes=Freezer.ENGINE if in_background else Freezer.HYPERVISOR,
        warnings=warnings,
    )


async def _why_not_in_background(monitor: Monitor, catalog: Path) -> str | None:
    if not background.ends_well(monitor) and not await in_thread(can_reserve, catalog):
        return (
            f"QEMU {monitor.version} would leave the guest frozen if {catalog} became full,"
            " and the filesystem there can't reserve room"
        )
    return await background.why_impossible(monitor)


async def prepare_stopped(files: Sequence[Path]) -> Preparation:
    """For a guest that does not run.

    Raises:
        ImageInUse: It does.
    """
    if not files:
        raise BackendUnavailable("its disks are gone since it was looked at: is a filesystem not mounted?")
    disks = await images.read_images(files)
    check_capturable(disks, "let no pattern of the setting disks fit it")
    rooms = await in_thread(_rooms, disks, [_DISK_MARGIN] * len(disks))
    return Preparation(rooms=rooms, taken_names=_names(disks))


async def memory_estimate(monitor: Monitor) -> int:
    """What the guest's saved memory takes in bytes, with its devices; on the safe side."""
    summary = await monitor.execute("query-memory-size-summary")
    ram: int = summary["base-memory"] + summary.get("plugged-memory", 0)
    # Devices have memory, too, of which only the human monitor tells: name, page size, offset, used, total.
    told = await monitor.execute("human-monitor-command", command_line="info ramblock")
    blocks = sum(int(used, 16) for used in re.findall(r"0x[0-9a-f]+\s+(0x[0-9a-f]+)\s+0x[0-9a-f]+", told))
    ram = max(ram, blocks)
    return ram + ram // 16 + _MEMORY_MARGIN


def _not_known(disks: Iterable[Disk], known: Collection[Path]) -> tuple[str, ...]:
    """Warnings of disks that a capture of the stopped guest would leave out; none where it is not configured."""
    files = {str(path) for path in known}
    left_out = [disk.file for disk in disks if known and disk.file not in files]
    return tuple(
        f"no pattern of the setting disks fits {file}: a snapshot of the stopped guest would lack it"
        for file in left_out
    )


def _names(disks: Iterable[Disk]) -> frozenset[str]:
    return frozenset(entry.tag for disk in disks for entry in disk.entries)


def _rooms(disks: Sequence[Disk], needed: Sequence[int]) -> tuple[Room, ...]:
    """QEMU may see other files than this process does, and of a device no free space is to be had."""
    rooms = []
    for disk, needed_bytes in zip(disks, needed, strict=True):
        path = Path(disk.file)
        if path.is_absolute() and path.is_file():
            rooms.append(Room(path, needed_bytes))
        else:
            _log.warning("free space is not checked: the guest's disk is not seen from here", disk=disk.file)
    return tuple(rooms)
