"""The disks of a guest by its XML, and whether they can be captured."""

from collections.abc import Iterable, Mapping
from xml.etree import ElementTree as ET

from attrs import frozen

from hypemand.backends.base import Unsupported

_CAPTURABLE = "qcow2"
_LEFT_OUT = frozenset({"no", "manual", "external"})
_UEFI_CREATES, _UEFI_DELETES = 10_009_000, 10_010_000
"""Versions of libvirt from which on it makes internal snapshots of guests with UEFI, and deletes and reverts them."""


@frozen
class Disk:
    """A disk.

    Attributes:
        name: The guest's name for it, such as ``vda``.
        file: Its file or device on the machine of libvirt; empty: it has none there.
        format: ``qcow2``, ``raw`` ...
        setting: What the guest's XML says itself of snapshots; empty: nothing.
    """

    name: str
    file: str
    format: str
    writable: bool
    setting: str = ""
    transient: bool = False


def read_disks(domain: ET.Element) -> tuple[Disk, ...]:
    """All disks in a guest's document, CD-ROMs too."""
    return tuple(map(_disk, domain.findall("devices/disk")))


def _disk(element: ET.Element) -> Disk:
    source, driver, target = (element.find(tag) for tag in ("source", "driver", "target"))
    kind = element.get("device", "disk")
    attached = source is not None and bool(source.attrib)
    return Disk(
        name=target.get("dev", "") if target is not None else "",
        file=(source.get("file") or source.get("dev") or "") if source is not None else "",
        format=driver.get("type", "") if driver is not None else "",
        writable=attached and kind != "cdrom" and element.find("readonly") is None,
        setting=element.get("snapshot", ""),
        transient=element.find("transient") is not None,
    )


def parts_of(disks: Iterable[Disk]) -> Mapping[str, bool]:
    """By name, whether a disk is part of a snapshot: the writable ones are, and have to be."""
    return {disk.name: disk.writable for disk in disks}


def check_capturable(disks: Iterable[Disk]) -> None:
    """Raise `Unsupported` unless every writable disk can hold an internal snapshot; there must be one."""
    writable = [disk for disk in disks if disk.writable]
    if not writable:
        raise Unsupported("the guest has no writable disk that could hold a snapshot")
    for disk in writable:
        where = f"disk {disk.name} ({disk.file or 'not a file'})"
        if disk.format != _CAPTURABLE:
            raise Unsupported(
                f"{where} is {disk.format or 'of a format that is not told'}, and only qcow2 can hold internal"
                " snapshots: convert it (qemu-img convert -O qcow2), or make it read-only"
            )
        if disk.setting in _LEFT_OUT:
            raise Unsupported(
                f"{where} is marked snapshot='{disk.setting}' in the guest's XML: libvirt makes internal snapshots of"
                " all writable disks or none; take the mark out, or make the disk read-only"
            )
        if disk.transient:
            raise Unsupported(f"{where} is transient, and can't hold snapshots that last")


def check_firmware(domain: ET.Element, version: int) -> None:
    """Raise `Unsupported` where UEFI's variables, which are a disk of QEMU's, can't be captured while the guest runs.

    Args:
        version: Of libvirt's daemon.
    """
    if not has_uefi_variables(domain):
        return
    if version < _UEFI_DELETES:
        begins = "" if version < _UEFI_CREATES else ", for 10.9 can make them but not delete them"
        raise Unsupported(
            f"the guest has UEFI firmware, of which libvirt {version_text(version)} makes no internal snapshots"
            f" while it runs: that takes libvirt 10.10 or later{begins}"
        )
    nvram = domain.find("os/nvram")
    if nvram is None or nvram.get("format", "raw") != _CAPTURABLE:
        raise Unsupported(
            "the guest's UEFI variables (<nvram>) are raw, and can't hold internal snapshots: convert the file with"
            " qemu-img convert -O qcow2, and set format='qcow2' on <nvram>"
        )


def has_uefi_variables(domain: ET.Element) -> bool:
    """Whether the guest's firmware keeps variables in a file of its own."""
    loader = domain.find("os/loader")
    return domain.find("os/nvram") is not None or (loader is not None and loader.get("type") == "pflash")


def version_text(number: int) -> str:
    """A version as libvirt counts it, in words: 9000000 is 9.0.0."""
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"
