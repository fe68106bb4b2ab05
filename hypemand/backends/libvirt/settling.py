"""What an interrupted run left behind: the guest goes on, its snapshot is listed or gone. Blocking."""

from attrs import frozen

from hypemand.backends.libvirt import snapshots
from hypemand.backends.libvirt.capturing import StillAtWork, thaw
from hypemand.backends.libvirt.connections import Turn
from hypemand.backends.libvirt.documents import Stage, snapshot_of
from hypemand.backends.libvirt.domains import Pause, find_domain, is_busy, mark, marked_run, pause_of, word_for
from hypemand.core.model import InstanceState, RunStarted, Snapshot

PATIENCE_S = 30.0
"""How long to wait for libvirt's own work on the guest."""


@frozen
class Settling:
    """Settles *run*.

    Attributes:
        uri: For the way back.
        nothing_made: It is known that there is nothing of it on a disk.
    """

    run: RunStarted
    uri: str
    nothing_made: bool

    def thaw(self, turn: Turn) -> bool:
        """Let the guest go on, if it stands still for this run; it ran before that. Returns whether it was found so."""
        found = self.run.state_before is InstanceState.RUNNING and thaw(turn, self.run.instance_id)
        domain = find_domain(turn.connection, self.run.instance_id)
        if pause_of(domain) is Pause.USER and marked_run(domain) == self.run.run_id:
            domain.resume()
            mark(domain, None)
            return True
        return found

    def settle_snapshot(self, turn: Turn) -> Snapshot | None:
        """Have a complete snapshot of the run listed, and anything else removed.

        Raises:
            StillAtWork: libvirt is at work on it, perhaps at this very snapshot.
        """
        run = self.run
        domain = find_domain(turn.connection, run.instance_id)
        if is_busy(domain):
            raise StillAtWork("libvirt is at work on this guest")
        found = snapshots.find(domain, run.snapshot_name, run.run_id)
        turn.check_wanted()
        if found is not None and found.note.stage is not Stage.LOST:
            note = snapshots.publish(domain, found)
            return snapshot_of(run.instance_id, found.name, note, uri=self.uri, word=word_for(domain))
        if found is not None:
            snapshots.delete_remains(found)
        elif not self.nothing_made:
            snapshots.delete_lost(domain, run)
        return None
