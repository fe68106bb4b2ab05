"""A snapshot in libvirt's XML: the one to be made, and what of ours is in its description.

The description has a line for people, and one of JSON with what libvirt has no
place for. Only snapshots with such a line are ours. An operator who takes it
out makes the snapshot their own.
"""

import re
import shlex
from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Any
from xml.etree import ElementTree as ET
from xml.sax.saxutils import escape

import orjson
from attrs import Factory, frozen
from cattrs import BaseValidationError

from hypemand.backends.base import CaptureRequest
from hypemand.core.model import Extra, InstanceId, RestoreAction, RestoreStep, Snapshot, SnapshotKind
from hypemand.core.structure import new_converter

FORMAT = 1
_DESCRIPTION = re.compile("<description>.*?</description>", re.DOTALL)
"""The first one in a document is the snapshot's own; a guest's comes later."""


class Stage(StrEnum):
    """How far a snapshot has come."""

    MAKING = "making"
    LISTED = "listed"
    LOST = "lost"


_FOR_PEOPLE = {
    Stage.MAKING: "hypemand is at work on this snapshot, and completes or deletes it.",
    Stage.LISTED: "Taken by hypemand on schedule, and deleted by its retention.",
    Stage.LOST: "What is left of a snapshot that could not be completed: not to be used, hypemand deletes it.",
}
_CONVERTER = new_converter(omit_defaults=False, words=[Stage])


@frozen(kw_only=True)
class Note:
    """What we write into the description of a snapshot.

    Attributes:
        id: Of the run that made it.
        size_bytes: An estimate: libvirt does not tell.
    """

    id: str
    kind: SnapshotKind
    created_at: datetime
    tags: Mapping[str, str]
    size_bytes: int
    stage: Stage = Stage.MAKING
    hypemand: int = FORMAT
    extra: Extra = Factory(dict)

    @property
    def text(self) -> str:
        """The whole description."""
        return f"{_FOR_PEOPLE[self.stage]}\n{orjson.dumps(_CONVERTER.unstructure(self)).decode()}"


def read_xml(text: str) -> ET.Element:
    """A document of libvirt's."""
    return ET.fromstring(text)  # noqa: S314 - it is libvirt that wrote it


def note_of(document: ET.Element) -> Note | None:
    """Our note in a snapshot's *document*; None where it is somebody else's."""
    fields = _fields_of(document)
    if fields is None or newer_format_of(document) is not None:
        return None
    try:
        return _CONVERTER.structure(fields, Note)
    except (TypeError, ValueError, BaseValidationError):
        return None


def newer_format_of(document: ET.Element) -> int | None:
    """The format of the note in *document*, if it is a later hypemand's, of which nothing can be told."""
    number = (_fields_of(document) or {}).get("hypemand")
    return number if isinstance(number, int) and number > FORMAT else None


def _fields_of(document: ET.Element) -> dict[str, Any] | None:
    line = (document.findtext("description") or "").rpartition("\n")[2]
    try:
        fields = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return fields if isinstance(fields, dict) and "hypemand" in fields else None


def new_note(request: CaptureRequest, size_bytes: int) -> Note:
    """The note of a snapshot that is to be made."""
    return Note(
        id=request.run_id,
        kind=request.kind,
        created_at=request.created_at,
        tags=request.tags,
        size_bytes=size_bytes,
    )


def new_document(request: CaptureRequest, note: Note, disks: Mapping[str, bool]) -> str:
    """What libvirt is asked to make.

    Args:
        disks: By the name that the guest has for each disk, whether it is part of it.
    """
    root = ET.Element("domainsnapshot")
    ET.SubElement(root, "name").text = request.name
    ET.SubElement(root, "description").text = note.text
    _add_parts(root, request.kind, disks)
    return ET.tostring(root, encoding="unicode")


def _add_parts(root: ET.Element, kind: SnapshotKind, disks: Mapping[str, bool]) -> None:
    ET.SubElement(root, "memory", snapshot="internal" if kind is SnapshotKind.STANDBY else "no")
    parts = ET.SubElement(root, "disks")
    for name, is_part in disks.items():
        ET.SubElement(parts, "disk", name=name, snapshot="internal" if is_part else "no")


def lost_document(name: str, note: Note, disks: Mapping[str, bool], domain: str) -> str:
    """A document of a snapshot that libvirt does not know, though it may be on the disks of *domain*, so that it does.

    Args:
        domain: The guest's own document.
    """
    root = ET.Element("domainsnapshot")
    ET.SubElement(root, "name").text = name
    ET.SubElement(root, "description").text = note.text
    ET.SubElement(root, "state").text = "running" if note.kind is SnapshotKind.STANDBY else "shutoff"
    ET.SubElement(root, "creationTime").text = "0"
    _add_parts(root, note.kind, disks)
    return ET.tostring(root, encoding="unicode").replace("</domainsnapshot>", f"{domain}</domainsnapshot>")


def published_document(document: str, note: Note) -> str:
    """The same snapshot with *note* in its description, all else as it is to the letter."""
    description = f"<description>{escape(note.text)}</description>"
    return _DESCRIPTION.sub(lambda _: description, document, count=1)


def snapshot_of(instance: InstanceId, name: str, note: Note, *, uri: str, word: str) -> Snapshot:
    """The snapshot as the engine sees it.

    Args:
        word: What virsh calls the guest by.
    """
    return Snapshot(
        id=note.id,
        instance_id=instance,
        name=name,
        kind=note.kind,
        created_at=note.created_at,
        size_bytes=note.size_bytes,
        tags=note.tags,
        restore=_way_back(word, name, note.kind, uri),
    )


def _way_back(guest: str, name: str, kind: SnapshotKind, uri: str) -> tuple[RestoreStep, ...]:
    def virsh(*words: str) -> RestoreStep:
        return RestoreStep(RestoreAction.RUN, shlex.join(["virsh", "--connect", uri, *words]))

    if kind is SnapshotKind.STANDBY:
        return (virsh("snapshot-revert", guest, name, "--running"),)
    return (virsh("snapshot-revert", guest, name), virsh("start", guest))
