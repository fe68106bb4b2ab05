"""Snapshots of a guest that libvirt knows: found, listed, published, deleted; and those that it lost. Blocking."""

from collections.abc import Iterator
from contextlib import contextmanager

import libvirt
import structlog
from attrs import evolve, frozen

from hypemand.backends.libvirt.connections import is_lost, text_of
from hypemand.backends.libvirt.disks import parts_of, read_disks
from hypemand.backends.libvirt.documents import (
    Note,
    Stage,
    lost_document,
    newer_format_of,
    note_of,
    published_document,
    read_xml,
)
from hypemand.core.model import RunStarted

_log = structlog.get_logger()


@frozen
class Found:
    """A snapshot of ours, as libvirt has it."""

    handle: libvirt.virDomainSnapshot
    name: str
    note: Note


def find(domain: libvirt.virDomain, name: str, run_id: str) -> Found | None:
    """The snapshot of that run. Another one of its name is somebody else's."""
    with _gone_is_none():
        handle = domain.snapshotLookupByName(name)
        note = _note_in(handle)
        if note is not None and note.id == run_id:
            return Found(handle, name, note)
    return None


def find_all(domain: libvirt.virDomain) -> list[Found]:
    """All snapshots of ours, those that are being made too, in no order."""
    found = []
    for handle in domain.listAllSnapshots():
        with _gone_is_none():
            note = _note_in(handle)
            if note is not None:
                found.append(Found(handle, handle.getName(), note))
    return found


def _note_in(handle: libvirt.virDomainSnapshot) -> Note | None:
    document = read_xml(handle.getXMLDesc())
    newer = newer_format_of(document)
    if newer is not None:
        _log.error(
            "snapshot passed over and left alone: its description can't be used",
            snapshot_name=handle.getName(),
            error=f"format {newer} is newer than this hypemand",
        )
    return note_of(document)


def publish(domain: libvirt.virDomain, found: Found) -> Note:
    """Have it listed: what libvirt keeps of it is written anew, in one stroke. Its data is not touched."""
    note = evolve(found.note, stage=Stage.LISTED)
    if found.note.stage is not Stage.LISTED:
        document = found.handle.getXMLDesc(libvirt.VIR_DOMAIN_SNAPSHOT_XML_SECURE)
        flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE
        if found.handle.isCurrent():
            flags |= libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_CURRENT
        domain.snapshotCreateXML(published_document(document, note), flags)
    return note


def delete(domain: libvirt.virDomain, name: str, run_id: str) -> None:
    """Delete the snapshot of that run; others that were made after it stay. Gone already: no error."""
    found = find(domain, name, run_id)
    if found is not None:
        with _gone_is_none():
            found.handle.delete()


def delete_lost(domain: libvirt.virDomain, run: RunStarted) -> None:
    """Delete what the disks may have of a snapshot of *run* that libvirt does not know.

    So it is when libvirt's daemon was killed while it was made: QEMU finishes
    it, and nobody writes it into libvirt's books. It is written there, and
    deleted like any other.
    """
    if run.snapshot_name in domain.snapshotListNames():
        return  # somebody else's
    note = Note(id=run.run_id, kind=run.kind, created_at=run.started_at, tags=run.tags, size_bytes=0, stage=Stage.LOST)
    disks = parts_of(read_disks(read_xml(domain.XMLDesc())))
    document = lost_document(run.snapshot_name, note, disks, domain.XMLDesc(libvirt.VIR_DOMAIN_XML_SECURE))
    handle = domain.snapshotCreateXML(document, libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE)
    delete_remains(Found(handle, run.snapshot_name, note))


def delete_remains(found: Found) -> None:
    """Delete a snapshot of which not everything may be there, for some libvirts an error: then it is struck off."""
    try:
        with _gone_is_none():
            found.handle.delete()
    except libvirt.libvirtError as error:
        if is_lost(error) or error.get_error_code() == libvirt.VIR_ERR_OPERATION_TIMEOUT:
            raise
        _log.warning(
            "what may be left of a snapshot in the guest's disks could not be deleted",
            snapshot_name=found.name,
            run_id=found.note.id,
            error=text_of(error),
        )
        found.handle.delete(libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY)


@contextmanager
def _gone_is_none() -> Iterator[None]:
    try:
        yield
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN_SNAPSHOT:
            raise
