"""How the guests of one backend are reached, and where their files are."""

from pathlib import Path
from typing import TypeVar

from attrs import field, frozen

from hypemand.backends.base import BackendUnavailable
from hypemand.backends.catalog import Catalog
from hypemand.backends.ids import checked
from hypemand.backends.own_threads import OwnThreads
from hypemand.backends.templates import filled
from hypemand.backends.vmm.client import Client, SocketAbsent
from hypemand.backends.vmm.dialect import Dialect
from hypemand.backends.vmm.disks import locked
from hypemand.backends.vmm.leftovers import PREFIX, remove
from hypemand.backends.vmm.rights import Writer, group_id
from hypemand.backends.vmm.settings import VmmSettings
from hypemand.backends.vmm.using import use_of
from hypemand.backends.vmm.views import View
from hypemand.core.model import InstanceId

T = TypeVar("T")
SAVED = "vmm"
"""Directory in a snapshot of what the VMM has written."""


@frozen(eq=False)
class Guests:
    """The guests of one backend.

    Attributes:
        chroot: Where each VMM has its root directory, with ``{instance}``; None: where we have ours.
    """

    dialect: Dialect
    settings: VmmSettings
    catalog: Catalog
    chroot: Path | None = None
    threads: OwnThreads = field(init=False)
    _clients: dict[InstanceId, Client] = field(init=False, factory=dict)

    @threads.default
    def _threads(self) -> OwnThreads:
        return OwnThreads(self.catalog.root)

    def client(self, instance: InstanceId) -> Client:
        """What asks the VMM of *instance*."""
        if instance not in self._clients:
            self._clients[instance] = Client(self.settings.socket_of(checked(instance)), self.chroot_of(instance))
        return self._clients[instance]

    def chroot_of(self, instance: InstanceId) -> Path | None:
        """The root directory of its VMM, where that is not ours."""
        return None if self.chroot is None else filled(self.chroot, instance)

    def view(self, instance: InstanceId) -> View:
        """How its VMM, which has given an answer, sees files."""
        return View(self.chroot_of(instance), self.client(instance).peer)

    def writer(self, instance: InstanceId) -> Writer:
        """The user of its VMM, which has given an answer. Blocking."""
        return Writer(self.client(instance).peer, group_id(self.settings.snapshot_group))

    def saving(self, instance: InstanceId, run_id: str) -> Path:
        """The directory that the VMM writes into for a run: in the snapshot, or where it can get to."""
        chroot = self.chroot_of(instance)
        return self.catalog.partial(instance, run_id) / SAVED if chroot is None else chroot / f"{PREFIX}{run_id}"

    def drop_saving(self, instance: InstanceId, run_id: str) -> None:
        """Remove that directory where it is no part of the snapshot. Blocking.

        Raises:
            OSError: It is still there, with the guest's memory in it.
        """
        if self.chroot is not None:
            remove(self.saving(instance, run_id))

    async def files_of_stopped(self, instance: InstanceId, absent: SocketAbsent) -> list[Path]:
        """The disks of a guest at whose socket nobody listens. Without any, nothing is known of it.

        Raises:
            BackendUnavailable: There are none, or its VMM runs all the same, or may do so.
        """
        client = self.client(instance)
        if client.peer is not None and client.is_alive():
            raise BackendUnavailable(f"{absent}; but its VMM runs (process {client.peer.pid})") from absent
        files = await self.threads.do(self.settings.disks_of, instance)
        if used := await self.threads.do(locked, files):
            raise BackendUnavailable(f"{absent}; but a process has locked {', '.join(used)}") from absent
        if files:
            await self._check_unused(files, absent)
            return files
        if not self.settings.disks:
            raise absent
        patterns = ", ".join(map(str, self.settings.disks))
        raise BackendUnavailable(f"{absent}; and no disk fits {patterns}: is a filesystem not mounted?") from absent

    async def _check_unused(self, files: list[Path], absent: SocketAbsent) -> None:
        """No answer is no proof that a guest is stopped: its socket may have been removed."""
        use = await self.threads.do(use_of, files)
        if use.written:
            raise BackendUnavailable(f"{absent}; but a process has {', '.join(use.written)} open for writing")
        if use.untold:
            raise BackendUnavailable(
                f"{absent}; whether a process has {', '.join(use.untold)} open for writing can't be told: the kernel"
                " tells it the owner of the file, and root (CAP_LEASE; for block devices CAP_SYS_PTRACE)"
            )

    def close(self) -> None:
        """Let go of what is held."""
        for client in self._clients.values():
            client.let_go()
        self._clients.clear()
