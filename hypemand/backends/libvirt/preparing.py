"""What is looked at before a capture: can this guest be captured, what room will it take. Blocking; changes nothing."""

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree as ET

import libvirt
import structlog

from hypemand.backends.base import BackendUnavailable, Preparation, Room
from hypemand.backends.libvirt.disks import Disk, check_capturable, check_firmware, has_uefi_variables, read_disks
from hypemand.backends.libvirt.documents import read_xml
from hypemand.backends.libvirt.domains import control_of, find_domain, word_for
from hypemand.core.model import InstanceId, SnapshotKind

_MEMORY_MARGIN = 64 * 1024 * 1024
"""For the state of its devices."""
_DISK_MARGIN = 16 * 1024 * 1024
"""For the tables that a snapshot adds to a disk."""
_KIB = 1024
_log = structlog.get_logger()


def prepare(connection: libvirt.virConnect, instance: InstanceId, kind: SnapshotKind, *, here: bool) -> Preparation:
    """Look at *instance*.

    Args:
        here: Whether its disks are on this machine.
    """
    domain = find_domain(connection, instance)
    document = read_xml(domain.XMLDesc())
    disks = read_disks(document)
    check_capturable(disks)
    warnings = []
    if kind is SnapshotKind.STANDBY:
        check_firmware(document, connection.getLibVersion())
        needed = _memory_estimate(domain, document)
    else:
        _check_not_saved(domain)
        needed = _DISK_MARGIN
        if has_uefi_variables(document):
            warnings.append("a snapshot of the stopped guest is without its UEFI variables (<nvram>)")
    _check_alone(domain, disks)
    if not domain.isPersistent():
        warnings.append(
            "the guest is transient: when it ends, libvirt forgets its snapshots, which stay in its disks"
            " and are not pruned any more; virsh define makes it a lasting one"
        )
    return Preparation(
        rooms=_rooms([disk for disk in disks if disk.writable], needed) if here else (),
        taken_names=frozenset(domain.snapshotListNames()),
        warnings=tuple(warnings),
    )


def _check_alone(domain: libvirt.virDomain, disks: Sequence[Disk]) -> None:
    """Raise `BackendUnavailable` where somebody else has libvirt at work on this guest."""
    control = control_of(domain)
    if control == libvirt.VIR_DOMAIN_CONTROL_ERROR:
        raise BackendUnavailable("libvirt has lost contact with the guest's QEMU")
    if control == libvirt.VIR_DOMAIN_CONTROL_JOB:
        raise BackendUnavailable("libvirt is at somebody else's work on this guest: a save, a snapshot or a migration")
    if control is not None:
        for disk in disks:
            if disk.writable and domain.blockJobInfo(disk.name):
                raise BackendUnavailable(
                    f"somebody else's block job is under way on disk {disk.name} (see virsh blockjob); it is left"
                    " alone, and no snapshot is taken meanwhile"
                )


def _check_not_saved(domain: libvirt.virDomain) -> None:
    if domain.hasManagedSaveImage():
        raise BackendUnavailable(
            "the guest's memory is saved (virsh managedsave), and goes on with its disks as they are:"
            f" no snapshot is taken of them alone; virsh start {word_for(domain)}, or managedsave-remove"
        )


def _memory_estimate(domain: libvirt.virDomain, document: ET.Element) -> int:
    """What the guest's saved memory takes in bytes, with its devices; on the safe side."""
    ram = domain.info()[1] * _KIB
    models = document.findall("devices/video/model")
    video = sum(int(model.get(key, "0")) for model in models for key in ("ram", "vram")) * _KIB
    return ram + ram // 16 + video + _MEMORY_MARGIN


def memory_in_use(domain: libvirt.virDomain) -> int:
    """What a capture will hold of the guest's memory in bytes, about: pages that were never used are not saved."""
    most = domain.info()[1] * _KIB
    return min(most, domain.memoryStats().get("rss", most // _KIB) * _KIB)


def _rooms(disks: Sequence[Disk], first_needs: int) -> tuple[Room, ...]:
    """Their rooms. libvirt may see other files than this process does, and of a device no free space is to be had."""
    rooms = []
    for number, disk in enumerate(disks):
        path = Path(disk.file)
        if _is_seen(path):
            rooms.append(Room(path, _DISK_MARGIN if number else first_needs))
        else:
            _log.warning("free space is not checked: the guest's disk is not seen from here", disk=disk.file)
    return tuple(rooms)


def _is_seen(path: Path) -> bool:
    try:
        return path.is_absolute() and path.is_file()
    except OSError:  # the directories of its disks may be for libvirt alone
        return False
