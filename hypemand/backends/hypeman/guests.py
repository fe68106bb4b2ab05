"""How a guest is that may be down for a snapshot, and bringing it back."""

from functools import partial

import structlog
from attrs import frozen

from hypemand.backends.base import BackendUnavailable, InstanceNotFound
from hypemand.backends.hypeman.documents import Guest, guest_of
from hypemand.backends.hypeman.server import Server
from hypemand.backends.hypeman.uncut import Uncut
from hypemand.backends.ids import checked
from hypemand.core.model import InstanceId, InstanceState

_RUNS = (InstanceState.RUNNING, InstanceState.INITIALIZING)
_OFF = (InstanceState.STOPPED, InstanceState.SHUTDOWN)
HEARD_S = 1.0
"""How long an answer may take after the server has done what was asked."""
ON_ITS_WAY_S = 120.0
"""How long a request for a snapshot may take until the server begins with it."""
_log = structlog.get_logger()


class NotRestoredError(BackendUnavailable):
    """The server says that it could not have the guest run again."""


@frozen(eq=False)
class Guests:
    """The guests of *server*."""

    server: Server
    uncut: Uncut

    async def look(self, instance: InstanceId) -> Guest:
        """The guest, asked anew. The server answers when it is done with what it just does to it.

        Raises:
            InstanceNotFound: The server says so.
            BackendUnavailable: It says nothing that can be relied on.
        """
        answer = await self.server.ask("GET", f"/instances/{checked(instance)}")
        if answer.not_found:
            raise InstanceNotFound(f"{self.server.settings.url} has no instance {instance}")
        if answer.status == 409 and answer.code == "ambiguous":  # it is the beginning of several others' ids
            raise InstanceNotFound(f"{self.server.settings.url} has no instance of just this id: {answer}")
        if answer.status != 200:
            raise BackendUnavailable(f"{self.server.settings.url}: {answer}")
        guest = guest_of(answer.document)
        if guest.id != instance:
            # It looks for names, too, and for the beginnings of ids; so there is none of this very id.
            raise InstanceNotFound(
                f"{self.server.settings.url} has no instance {instance}; it is a name, or the beginning of the id,"
                f" of {guest.id}: schedules take ids"
            )
        return guest

    async def after(self, instance: InstanceId) -> Guest:
        """The guest, once the server is done with what it was asked to do to it.

        The server holds a lock of the instance meanwhile. So its word counts,
        and not our connection for the request, which may have gone silent: the
        answer to a request that it is done with is waited for a moment only.
        Where the guest runs, a request for a snapshot may be still on its way.

        Raises:
            InstanceNotFound: As `look`.
            BackendUnavailable: As `look`.
        """
        guest = await self.look(instance)
        waited = await self.uncut.let_go(instance, begun=guest.status.state not in _RUNS, wait_s=HEARD_S)
        return await self.look(instance) if waited else guest

    async def bring_back(self, instance: InstanceId) -> bool:
        """Have a guest that a capture has left in standby run again. Whether it was found there.

        A guest that is off, or gone, is left so.

        Raises:
            BackendUnavailable: It does not run yet, or that can't be told.
        """
        return await self.is_down(instance) and await self.restore(instance)

    async def is_down(self, instance: InstanceId) -> bool:
        """Whether the guest is in standby.

        Raises:
            BackendUnavailable: It is not, and neither does it run nor is it off.
        """
        guest = await self.after(instance)
        state = guest.status.state
        if state in _RUNS or state in _OFF:
            return False
        if state is not InstanceState.STANDBY:
            raise BackendUnavailable(_why_not_brought_back(guest))
        return True

    async def restore(self, instance: InstanceId) -> bool:
        """Have a guest in standby run again. False: somebody else did it.

        Raises:
            NotRestoredError: It does not run.
            BackendUnavailable: Whether it does can't be told.
        """
        _log.warning("guest left in standby by a capture; having it restored", instance_id=instance)
        path = f"/instances/{instance}/restore"
        answer = await self.uncut.do(instance, partial(self.server.have_done, path, {}), on_its_way_s=0)
        state = (await self.look(instance)).status.state
        if answer.status == 409 and state in (*_RUNS, *_OFF):
            return False  # somebody else was faster: the server itself, most likely
        if state in _RUNS:
            return True
        raise NotRestoredError(f"the guest is {state}, it could not be restored: {answer}")


def _why_not_brought_back(guest: Guest) -> str:
    said = f"the guest may stand still since a capture that was cut short: it is {guest.state}"
    if guest.status.state is InstanceState.PAUSED:
        return f"{said}, which Hypeman's API can't resume; resume it at its hypervisor (docs/hypeman.md)"
    return said + (f" ({guest.detail})" if guest.detail else "")
