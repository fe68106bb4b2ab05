"""The built-in backends as subjects of the conformance kit."""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypemand.backends import registry
from hypemand.backends.base import Backend, Surroundings
from hypemand.conformance import Subject
from hypemand.core.model import InstanceId
from tests import vmm_guest
from tests.hypeman_server.answers import SLOW
from tests.hypeman_site import WEB, Site, running_server
from tests.qemu_guest import Guest, running_guest

if TYPE_CHECKING:
    from tests.libvirt_guest import LibvirtGuest


class EmbeddedSubject(Subject):
    """Directories; an operator is an editor of ``instance.json``, and unreachable is what is not mounted."""

    def __init__(self, directory: Path) -> None:
        self.instance = InstanceId("web-1")
        self._root = directory / "embedded"
        self._state_file = self._root / "instances" / self.instance / "instance.json"
        self.catalog = self._root / "snapshots"
        self.surroundings = Surroundings(directory)
        self.backend = self._build({"instances": {self.instance: {"memory": "1MiB", "disk": "3MiB"}}})
        self.slow_backend = self._build({"copy_rate": "1MiB"})

    def _build(self, settings: Mapping[str, Any]) -> Backend:
        connection = {"type": "embedded", "root": str(self._root), **settings}
        return registry.connect("lab", connection, self.surroundings)

    async def guest_runs(self) -> bool:
        return bool(json.loads(self._state_file.read_text())["state"] == "Running")

    async def operator_pauses(self) -> None:
        self._state_file.write_text('{"state": "Paused"}')

    async def operator_resumes(self) -> None:
        self._state_file.write_text('{"state": "Running"}')

    async def go_away(self) -> None:
        self._root.rename(self._root.with_name("unmounted"))
        self._root.mkdir()

    async def come_back(self) -> None:
        self._root.rmdir()
        self._root.with_name("unmounted").rename(self._root)


@asynccontextmanager
async def embedded_subject(directory: Path) -> AsyncIterator[Subject]:
    subject = EmbeddedSubject(directory)
    await subject.backend.open(first_use=True)
    yield subject


class QemuSubject(Subject):
    """A real QEMU; the operator has a monitor of their own, and unreachable is one whose socket file is missing."""

    def __init__(self, directory: Path, guest: Guest, mode: str) -> None:
        self._guest = guest
        self.instance = guest.instance_id
        self.catalog = directory / "catalog"
        self.surroundings = Surroundings(directory / "state")
        connection = {"type": "qemu", "socket": str(guest.socket_template), "snapshot_dir": str(self.catalog)}
        connection["mode"] = mode
        self.backend = registry.connect("vms", connection, self.surroundings)

    async def guest_runs(self) -> bool:
        return bool((await self._guest.qmp("query-status"))["running"])

    async def operator_pauses(self) -> None:
        await self._guest.qmp("stop")

    async def operator_resumes(self) -> None:
        await self._guest.qmp("cont")

    async def go_away(self) -> None:
        self._guest.socket.rename(self._guest.socket.with_suffix(".away"))

    async def come_back(self) -> None:
        self._guest.socket.with_suffix(".away").rename(self._guest.socket)


@asynccontextmanager
async def qemu_subject(directory: Path, mode: str = "internal") -> AsyncIterator[Subject]:
    async with running_guest(directory, memory_mb=16, tick_ms=200, wait=False) as guest:
        subject = QemuSubject(directory, guest, mode)
        await subject.backend.open(first_use=True)
        yield subject


class LibvirtSubject(Subject):
    """A real libvirtd; the operator is another client of it, and unreachable is one that has been killed."""

    def __init__(self, directory: Path, guest: "LibvirtGuest") -> None:
        self._guest = guest
        self.instance = guest.instance_id
        self.surroundings = Surroundings(directory / "state")
        self.backend = registry.connect("vms", {"type": "libvirt", "uri": guest.libvirtd.uri}, self.surroundings)

    async def guest_runs(self) -> bool:
        return self._guest.runs()

    async def operator_pauses(self) -> None:
        with self._guest.domain() as domain:
            domain.suspend()

    async def operator_resumes(self) -> None:
        with self._guest.domain() as domain:
            domain.resume()

    async def go_away(self) -> None:
        self._guest.libvirtd.kill()

    async def come_back(self) -> None:
        self._guest.libvirtd.start()

    async def leftovers(self) -> list[str]:
        listed = {snapshot.name for snapshot in await self.backend.list_snapshots(self.instance)}
        return sorted({*self._guest.names(), *self._guest.tags()} - listed)


@asynccontextmanager
async def libvirt_subject(directory: Path) -> AsyncIterator[Subject]:
    from tests.libvirt_guest import shared_guest  # noqa: PLC0415 - libvirt's binding may not be there

    with shared_guest() as guest:
        subject = LibvirtSubject(directory, guest)
        await subject.backend.open(first_use=True)
        yield subject


class HypemanSubject(Subject):
    """A Hypeman server; the operator is at its VMM's own socket, and unreachable is a server that is down."""

    def __init__(self, directory: Path, site: Site) -> None:
        self._site = site
        self.instance = WEB
        self.catalog = directory / "catalog"
        self.surroundings = Surroundings(directory / "state")
        self.backend = registry.connect("cloud", site.connection(directory), self.surroundings)
        slow = site.connection(directory, prefix=SLOW)
        self.slow_backend = registry.connect("cloud", slow, self.surroundings)

    async def guest_runs(self) -> bool:
        return self._site.state() == "Running"

    async def operator_pauses(self) -> None:
        self._site.set_state("Paused")

    async def operator_resumes(self) -> None:
        self._site.set_state("Running")

    async def go_away(self) -> None:
        await self._site.kill()

    async def come_back(self) -> None:
        await self._site.start()

    async def leftovers(self) -> list[str]:
        """Also what the server keeps for a run, and hypemand does not list."""
        assert self.catalog is not None
        catalogued = {manifest.parent.name for manifest in self.catalog.glob("*/[!.]*/manifest.json")}
        made = [str(one["tags"]["hypemand.run_id"]) for one in self._site.snapshots()]
        return [*await super().leftovers(), *(run for run in made if run not in catalogued)]


@asynccontextmanager
async def hypeman_subject(directory: Path) -> AsyncIterator[Subject]:
    async with running_server(directory) as site:
        subject = HypemanSubject(directory, site)
        await subject.backend.open(first_use=True)
        yield subject


class VmmSubject(Subject):
    """A stand-in for a VMM; unreachable is one whose socket is missing, and a catalog that is not mounted."""

    def __init__(self, directory: Path, guest: vmm_guest.Guest) -> None:
        self._guest = guest
        self._snapshots, self._unmounted = directory / "catalog", directory / "unmounted"
        self.instance = guest.instance_id
        self.catalog = self._snapshots
        self.surroundings = Surroundings(directory / "state")
        template = guest.socket.with_name(guest.socket.name.replace(self.instance, "{instance}"))
        connection = {"type": guest.kind, "socket": str(template), "snapshot_dir": str(self.catalog)}
        if guest.root is not None:
            connection["chroot"] = str(guest.root).replace(self.instance, "{instance}")
        self.backend = registry.connect("vms", connection, self.surroundings)

    async def guest_runs(self) -> bool:
        return self._guest.state() == "Running"

    async def operator_pauses(self) -> None:
        self._guest.pause()

    async def operator_resumes(self) -> None:
        self._guest.resume()

    async def go_away(self) -> None:
        self._guest.socket.rename(self._guest.away)
        self._snapshots.rename(self._unmounted)
        self._snapshots.mkdir()

    async def come_back(self) -> None:
        self._snapshots.rmdir()
        self._unmounted.rename(self._snapshots)
        self._guest.away.rename(self._guest.socket)

    async def leftovers(self) -> list[str]:
        inside = self._guest.root.glob(".*") if self._guest.root is not None else ()
        return [*await super().leftovers(), *(path.name for path in inside)]


@asynccontextmanager
async def vmm_subject(directory: Path, kind: str, *, jailed: bool = False) -> AsyncIterator[Subject]:
    chroot = directory / "jailer" / "web-1" / "root" if jailed else None
    async with vmm_guest.running_guest(kind, directory, chroot=chroot, wait=False) as guest:
        subject = VmmSubject(directory, guest)
        await subject.backend.open(first_use=True)
        yield subject
