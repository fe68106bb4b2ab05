"""Whether a guest still stands still for a run that nobody is in charge of any more, and having it go on then."""

from contextlib import suppress

import structlog
import trio
from attrs import frozen

from hypemand.backends.base import BackendUnavailable
from hypemand.backends.vmm import origin
from hypemand.backends.vmm.capturing import Capturing
from hypemand.backends.vmm.client import Peer, SocketAbsent
from hypemand.backends.vmm.guests import Guests
from hypemand.core.model import InstanceState, RunStarted

READ_S = 1.0
"""A note is read for so long: its filesystem may hang, and the guest stands still meanwhile."""
_log = structlog.get_logger()


@frozen
class Thawed:
    """What was found of a guest, and done for it."""

    resumed: bool = False
    notes: tuple[str, ...] = ()


async def thaw(guests: Guests, capturing: Capturing, run: RunStarted, *, ours: bool) -> Thawed:
    """Have the guest of *run* go on, where it stands still for it. The VMM is done with what the run asked of it then.

    Args:
        ours: A pause by the process that the guest had when the run began can only be the run's.

    Raises:
        BackendUnavailable: That can't be told now, or that process can't be asked.
    """
    client = guests.client(run.instance_id)
    known = await _process_of(guests, capturing, run)
    try:
        look = await guests.dialect.look(client)
    except SocketAbsent as absent:
        await _check_ended(guests, run, known, absent)
        return Thawed()
    if not ours:
        return Thawed()
    if known is not None and client.peer is not None and not known.is_same(client.peer):
        if known.lives():
            raise BackendUnavailable(
                f"the guest may stand still in process {known.pid}, which can't be asked: {client.socket} belongs to"
                f" process {client.peer.pid} now. Look whether it runs; the run is settled once process {known.pid} has"
                " ended, or listens there again"
            )
        return _left_alone(run, look.state)
    if look.state is not InstanceState.PAUSED:
        return Thawed()
    if known is None and origin.is_later(client.peer, run):
        return _left_alone(run, look.state)
    await capturing.resume(run.instance_id)
    return Thawed(resumed=True)


def _left_alone(run: RunStarted, state: InstanceState) -> Thawed:
    if state is not InstanceState.PAUSED:
        return Thawed()
    note = (
        "the guest is Paused, in a process that began after the run: that is somebody else's pause, and was left alone"
    )
    _log.warning(note, instance_id=run.instance_id)
    return Thawed(notes=(note,))


async def _process_of(guests: Guests, capturing: Capturing, run: RunStarted) -> Peer | None:
    """The process that the guest had when the run made ready for its pause, where that is known."""
    paused = capturing.paused.get(run.instance_id)
    if paused is not None and paused.run_id == run.run_id:
        return paused.peer if paused.peer is not None and paused.peer.is_known else None
    with trio.move_on_after(READ_S), suppress(BackendUnavailable):
        return await guests.threads.do(origin.read_note, guests.catalog.partial(run.instance_id, run.run_id))
    return None


async def _check_ended(guests: Guests, run: RunStarted, known: Peer | None, absent: SocketAbsent) -> None:
    """Make sure that the VMM, whose socket is gone, is gone itself."""
    if known is not None:
        if known.lives():
            raise BackendUnavailable(f"{absent}; but its VMM runs (process {known.pid})") from absent
    elif not guests.client(run.instance_id).has_ended():
        await guests.files_of_stopped(run.instance_id, absent)
