"""A guest as libvirt tells it: its state and why it is paused, what is under way with it, and a mark of ours on it.

All that takes a domain is blocking, and asks libvirt alone, which answers also
while the guest's QEMU hangs; but for the mark, which waits for its turn.
"""

import re
from enum import IntEnum

import libvirt

from hypemand.backends.base import BackendUnavailable, InstanceNotFound, Status
from hypemand.backends.libvirt.documents import read_xml
from hypemand.core.errors import RuleBroken
from hypemand.core.model import InstanceId, InstanceState
from hypemand.core.naming import check_instance_id

NAMESPACE = "urn:hypemand:paused:1"
"""Of the mark in the guest's metadata; a name, no page."""
_PREFIX = "hypemand"
_MISTAKEN = re.compile("[0-9]+|[0-9A-Fa-f-]{36}|-.*")
"""Names that virsh takes for the number of a running guest, for a UUID, or for an option."""


class Pause(IntEnum):
    """libvirt's reasons for a pause (``virDomainPausedReason``); bindings of older versions do not name them all."""

    UNKNOWN = 0
    USER = 1
    MIGRATION = 2
    SAVE = 3
    DUMP = 4
    IO_ERROR = 5
    WATCHDOG = 6
    FROM_SNAPSHOT = 7
    SHUTTING_DOWN = 8
    SNAPSHOT = 9
    CRASHED = 10
    STARTING_UP = 11
    POSTCOPY = 12
    POSTCOPY_FAILED = 13
    API_ERROR = 14


OF_A_SNAPSHOT = frozenset({Pause.SAVE, Pause.SNAPSHOT})
"""A snapshot is being made; or, where nothing is under way any more, libvirt's daemon ended in the middle of one."""
LEFT_PAUSED = OF_A_SNAPSHOT | {Pause.API_ERROR}
"""Where nothing is under way: libvirt meant to let the guest go on, and its daemon ended, or the resume failed.

Older versions do not change the reason when it fails; later ones, and all after a failed save, tell API_ERROR.
"""
_OF_A_JOB = LEFT_PAUSED | {Pause.MIGRATION, Pause.DUMP, Pause.STARTING_UP, Pause.POSTCOPY}
_IN_TROUBLE = frozenset({Pause.IO_ERROR, Pause.WATCHDOG, Pause.CRASHED, Pause.SHUTTING_DOWN, Pause.POSTCOPY_FAILED})


def find_domain(connection: libvirt.virConnect, instance: InstanceId) -> libvirt.virDomain:
    """The domain called *instance*; that there is none is libvirt's own error ``VIR_ERR_NO_DOMAIN``."""
    try:
        return connection.lookupByName(check_instance_id(instance))
    except RuleBroken as error:
        raise InstanceNotFound(f"no instance can have this id: {error}") from error


def word_for(domain: libvirt.virDomain) -> str:
    """What it is called in a virsh command: by its name, or by its UUID where virsh would act on another guest."""
    name = domain.name()
    return domain.UUIDString() if _MISTAKEN.fullmatch(name) else name


def pause_of(domain: libvirt.virDomain) -> Pause | None:
    """Why it is paused; None when it is not."""
    state, reason = domain.state()
    if state != libvirt.VIR_DOMAIN_PAUSED:
        return None
    return _reason(reason)


def _reason(number: int) -> Pause:
    try:
        return Pause(number)
    except ValueError:
        return Pause.UNKNOWN


def is_busy(domain: libvirt.virDomain) -> bool:
    """Whether libvirt is at something longer with it while it runs: a snapshot, a save, a migration."""
    return control_of(domain) == libvirt.VIR_DOMAIN_CONTROL_JOB


def control_of(domain: libvirt.virDomain) -> int | None:
    """What libvirt has to do with its QEMU at the moment; None where there is no QEMU."""
    return domain.controlInfo()[0] if domain.isActive() else None


def status_of(domain: libvirt.virDomain) -> Status:
    """Its state.

    Raises:
        BackendUnavailable: It is paused for what libvirt is doing at the moment.
    """
    state, reason = domain.state()
    if state == libvirt.VIR_DOMAIN_PAUSED:
        return _paused(domain, _reason(reason))
    known = {
        libvirt.VIR_DOMAIN_RUNNING: Status(InstanceState.RUNNING),
        libvirt.VIR_DOMAIN_BLOCKED: Status(InstanceState.RUNNING),
        libvirt.VIR_DOMAIN_SHUTDOWN: Status(InstanceState.SHUTDOWN),
        libvirt.VIR_DOMAIN_SHUTOFF: Status(InstanceState.STOPPED),
        libvirt.VIR_DOMAIN_CRASHED: Status(InstanceState.UNKNOWN, "crashed"),
        libvirt.VIR_DOMAIN_PMSUSPENDED: Status(InstanceState.UNKNOWN, "suspended by the guest itself"),
    }
    return known.get(state, Status(InstanceState.UNKNOWN, f"state {state}"))


def _paused(domain: libvirt.virDomain, why: Pause) -> Status:
    word = why.name.lower().replace("_", " ")
    if why in _IN_TROUBLE:
        return Status(InstanceState.UNKNOWN, f"paused: {word}")
    if why in _OF_A_JOB:
        if control_of(domain) in (libvirt.VIR_DOMAIN_CONTROL_JOB, libvirt.VIR_DOMAIN_CONTROL_OCCUPIED):
            raise BackendUnavailable(f"libvirt is at work on this guest, which is paused for it: {word}")
        return Status(
            InstanceState.PAUSED, f"{word}, and libvirt is not at it any more: virsh resume {word_for(domain)}"
        )
    return Status(InstanceState.PAUSED, "" if why is Pause.USER else word)


def marked_run(domain: libvirt.virDomain) -> str | None:
    """The run by whose pause it stands still, as our mark has it."""
    try:
        mark = domain.metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, NAMESPACE, libvirt.VIR_DOMAIN_AFFECT_LIVE)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_METADATA:
            return None
        raise
    return read_xml(mark).get("run")


def mark(domain: libvirt.virDomain, run_id: str | None) -> None:
    """Mark it as paused for *run_id*, until it ends; None takes the mark away."""
    element = None if run_id is None else f"<paused run='{run_id}'/>"
    domain.setMetadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, element, _PREFIX, NAMESPACE, libvirt.VIR_DOMAIN_AFFECT_LIVE)
