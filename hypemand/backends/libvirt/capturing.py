"""A capture: libvirt stops the guest, has QEMU save it, and lets it go on; and what is done where it does not."""

import threading
import time
from collections.abc import Mapping
from functools import partial

import libvirt
import structlog
import trio
from attrs import Factory, evolve, frozen

from hypemand.backends.base import (
    BackendError,
    BackendUnavailable,
    Captured,
    CaptureFailed,
    CaptureRequest,
    InstanceNotFound,
)
from hypemand.backends.libvirt import snapshots
from hypemand.backends.libvirt.connections import ConnectionLost, Connections, Turn, is_lost, text_of, translated
from hypemand.backends.libvirt.disks import check_capturable, parts_of, read_disks
from hypemand.backends.libvirt.documents import new_document, new_note, read_xml, snapshot_of
from hypemand.backends.libvirt.domains import LEFT_PAUSED, Pause, find_domain, is_busy, pause_of, word_for
from hypemand.backends.libvirt.preparing import memory_in_use
from hypemand.core.model import InstanceId, Snapshot, SnapshotKind

AGAIN_S = 0.25
"""After that it is tried again to reach a libvirt whose daemon has ended while a guest may stand still."""
STUCK_LOOK_S = 0.25
"""How long to look after a capture whether the guest's next writes go well."""
_LOOK_S = 0.05
_log = structlog.get_logger()


class StillAtWork(BackendUnavailable):
    """libvirt is at something longer with this guest; it can't be told how that ends."""


@frozen(eq=False)
class Capturing:
    """Captures the guests of one backend.

    Attributes:
        uri: For the way back.
        nothing_made: Runs whose capture libvirt refused or undid: there is nothing of them on a disk.
    """

    connections: Connections
    uri: str
    nothing_made: set[str] = Factory(set)

    async def capture(self, instance: InstanceId, request: CaptureRequest) -> Captured:
        """Have libvirt make the snapshot.

        Where its daemon ends meanwhile, the guest is left paused, for QEMU
        knows nothing of libvirt's intention to let it go on: this waits for
        the daemon for as long as it may, and lets it go on then.
        """
        begun = threading.Event()
        try:
            return await self.connections.change(instance, lambda turn: self._capture(turn, instance, request, begun))
        except ConnectionLost as lost:
            if not begun.is_set():
                self.nothing_made.add(request.run_id)
                raise CaptureFailed(f"the capture was not begun: {lost}") from lost
            _log.error(
                "libvirt can't be reached in the middle of a capture; its guest may stand still until it can",
                instance_id=instance,
                run_id=request.run_id,
                error=str(lost),
            )
            outcome = await self._thaw_when_possible(instance)
            raise CaptureFailed(
                f"libvirt could not be reached any more during the capture ({lost}); {outcome}"
            ) from lost

    async def _thaw_when_possible(self, instance: InstanceId) -> str:
        while True:
            try:
                resumed = await self.connections.change(instance, lambda turn: thaw(turn, instance))
            except InstanceNotFound:
                return "it is not there any more"
            except BackendUnavailable:
                await trio.sleep(AGAIN_S)
            else:
                return "the guest was found paused and was resumed" if resumed else "the guest was not left paused"

    def _capture(self, turn: Turn, instance: InstanceId, request: CaptureRequest, begun: threading.Event) -> Captured:
        domain = find_domain(turn.connection, instance)
        disks = read_disks(read_xml(domain.XMLDesc()))
        check_capturable(disks)
        standby = request.kind is SnapshotKind.STANDBY
        if bool(domain.isActive()) != standby:
            raise CaptureFailed(f"the guest was {'shut off' if standby else 'started'} since its run began")
        note = new_note(request, memory_in_use(domain) if standby else 0)
        document = new_document(request, note, parts_of(disks))
        paused = pause_of(domain) is not None
        turn.check_wanted()
        begun.set()
        began = time.monotonic()
        try:
            domain.snapshotCreateXML(document, libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC)
        except libvirt.libvirtError as error:
            if is_lost(error):
                raise
            if bool(domain.isActive()) == standby:  # a QEMU that has crashed may have made it, and told nobody
                self.nothing_made.add(request.run_id)
            outcome = None if paused else _thaw_after(domain, f"libvirt: {text_of(error)}")
            raise CaptureFailed("; ".join(filter(None, (f"libvirt: {text_of(error)}", outcome)))) from error
        # libvirt calls a snapshot made also where its resume after that has failed.
        outcome = None if paused or not standby else _thaw_after(domain, "the snapshot is made")
        took_s = time.monotonic() - began
        freeze_s = (0.0 if paused else took_s) if standby else None
        snapshot = snapshot_of(instance, request.name, note, uri=self.uri, word=word_for(domain))
        return Captured(snapshot, freeze_s, (outcome,) if outcome else ())

    async def complete(self, captured: Captured) -> Captured:
        """Look whether the guest goes on: the snapshot may have left no room for its next write."""
        snapshot = captured.snapshot
        if snapshot.kind is SnapshotKind.STANDBY and captured.freeze_s:
            until = trio.current_time() + STUCK_LOOK_S
            while trio.current_time() < until:
                instance = snapshot.instance_id
                errors = await self.connections.ask(partial(_disk_errors, instance=instance), about=instance)
                if libvirt.VIR_DOMAIN_DISK_ERROR_NO_SPACE in errors.values():
                    await self._make_room(snapshot)
                if errors:
                    disks = ", ".join(errors)
                    warning = f"QEMU has stopped the guest at a write that failed, on {disks}; it is left so"
                    return evolve(captured, warnings=(*captured.warnings, warning))
                await trio.sleep(_LOOK_S)
        return captured

    async def _make_room(self, snapshot: Snapshot) -> None:
        outcome = await self.connections.change(snapshot.instance_id, partial(_delete_and_go_on, snapshot=snapshot))
        self.nothing_made.add(snapshot.id)
        raise CaptureFailed(f"the snapshot left no room for the guest's writes, and was deleted; {outcome}")


def thaw(turn: Turn, instance: InstanceId) -> bool:
    """Resume a guest that libvirt has left paused: its daemon ended in the middle of a snapshot, or its resume failed.

    Returns whether it was found so. An operator's pause is none such, nor is one for an I/O error.

    Raises:
        StillAtWork: libvirt is at work on it.
    """
    domain = find_domain(turn.connection, instance)
    if is_busy(domain):
        raise StillAtWork("libvirt is at work on this guest")
    why = pause_of(domain)
    if why is None or why not in LEFT_PAUSED:
        return False
    turn.check_wanted()
    domain.resume()
    _log.warning("the guest was found left paused by libvirt; resumed", instance_id=instance, reason=why.name)
    return True


def _thaw_after(domain: libvirt.virDomain, what: str) -> str | None:
    """See to it that the guest goes on once libvirt is through with its snapshot. It ran when that began.

    Args:
        what: Became of the snapshot.

    Returns:
        What was found and done; None where the guest goes on already.

    Raises:
        CaptureFailed: It can't be resumed. Settling tries it again, and keeps the run open until it holds.
    """
    try:
        if pause_of(domain) not in LEFT_PAUSED:
            return None
        domain.resume()
    except libvirt.libvirtError as error:
        why = translated(error, BackendError)
        raise CaptureFailed(f"{what}; the guest is still paused, and could not be resumed: {why}") from error
    return "libvirt left the guest paused, it was resumed"


def _disk_errors(connection: libvirt.virConnect, instance: InstanceId) -> Mapping[str, int]:
    """The disks at whose errors QEMU has stopped the guest; empty where it has not."""
    domain = find_domain(connection, instance)
    return domain.diskErrors() if pause_of(domain) is Pause.IO_ERROR else {}


def _delete_and_go_on(turn: Turn, snapshot: Snapshot) -> str:
    domain = find_domain(turn.connection, snapshot.instance_id)
    snapshots.delete(domain, snapshot.name, snapshot.id)
    domain.resume()
    time.sleep(STUCK_LOOK_S)
    if pause_of(domain) is None:
        return "the guest goes on"
    return f"the guest still stands still for lack of room: free some, then virsh resume {word_for(domain)}"
