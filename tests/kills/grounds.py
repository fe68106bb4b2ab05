"""Where daemons are killed: a backend with two guests, one of them paused by an operator. And what is seen there."""

import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

from attrs import frozen

from tests.kills.places import GUEST, OF_THE_ENGINE, OPERATORS, STEPS
from tests.processes import Lab
from tests.qemu_guest import Guest, running_guest
from tests.qemu_site import tags_of

KEPT = 1
TICK_MS = 50
GUESTS = (GUEST, OPERATORS)
_SCHEDULES = "".join(
    f"""
[[schedules]]
instance = "{instance}"
backend = "vms"
interval = "1h"
retention = {{ max_count = {KEPT} }}
"""
    for instance in GUESTS
)


@frozen
class Ground(ABC):
    """A site for many kills. What it tells, it tells without hypemand: from the hypervisor and from files."""

    name: str
    lab: Lab

    @property
    @abstractmethod
    def engine_freezes(self) -> bool:
        """Whether hypemand pauses and resumes, and so can thaw at any time."""

    @property
    def steps(self) -> tuple[str, ...]:
        """The steps that a run has here."""
        return tuple(step for step in STEPS if self.engine_freezes or step not in OF_THE_ENGINE)

    @property
    @abstractmethod
    def catalog(self) -> Path:
        """Where the backend's catalog is."""

    @abstractmethod
    def backend_table(self) -> str:
        """The backend's table of the config."""

    @abstractmethod
    async def state(self, instance: str = GUEST) -> str:
        """The hypervisor's word for the state of a guest: ``running``, ``paused``, ..."""

    @abstractmethod
    async def pause_as_operator(self, instance: str = GUEST) -> None:
        """What an operator does who wants the guest to stand still."""

    @abstractmethod
    async def resume_as_operator(self, instance: str = GUEST) -> None:
        """And to go on."""

    async def ticks(self) -> bool:
        """Whether the guest, said to run, gets on."""
        return True

    async def leftovers(self) -> list[str]:
        """What an unfinished capture left, in words; none of it may stay."""
        return [f"{path} is left in the catalog" for path in self.catalog.glob("*/.*")]

    def write_config(self, *, guard: bool, max_freeze: str) -> None:
        """Write the config; no daemon runs now."""
        self.lab.replace(f"""
state_dir = "state"
[log]
level = "debug"
[runs]
min_free = "1MiB"
max_freeze = "{max_freeze}"
guard = {str(guard).lower()}
[backends.vms]
{self.backend_table()}
{_SCHEDULES}
""")

    def listed(self) -> Mapping[str, str]:
        """Names of the guest's complete snapshots, by id."""
        paths = sorted((self.catalog / GUEST).glob("[!.]*/manifest.json"))
        manifests = [json.loads(path.read_text()) for path in paths]
        return {manifest["id"]: manifest["name"] for manifest in manifests}


@frozen
class EmbeddedGround(Ground):
    """Guests that are files; a capture takes a while."""

    @property
    def engine_freezes(self) -> bool:
        return True

    @property
    def catalog(self) -> Path:
        return self.lab.root / "snapshots"

    def backend_table(self) -> str:
        size = 'memory = "64KiB", disk = "256KiB"'
        return f"""
type = "embedded"
root = "lab"
copy_rate = "2MiB"
instances = {{ {GUEST} = {{ {size} }}, {OPERATORS} = {{ state = "Paused", {size} }} }}
"""

    async def state(self, instance: str = GUEST) -> str:
        if not self.lab.instance_file(instance).exists():
            return "not made yet"
        told = json.loads(self.lab.instance_file(instance).read_text())
        return f"{told['state'].lower()}{' by hypemand' if told.get('paused_by') else ''}"

    async def pause_as_operator(self, instance: str = GUEST) -> None:
        self.lab.set_guest_state("Paused", instance)

    async def resume_as_operator(self, instance: str = GUEST) -> None:
        self.lab.set_guest_state("Running", instance)


@frozen
class QemuGround(Ground):
    """Real QEMUs, in either mode."""

    mode: str
    guests: Mapping[str, Guest]

    @property
    def engine_freezes(self) -> bool:
        return self.mode == "background"

    @property
    def catalog(self) -> Path:
        return self.lab.state / "catalog" / "vms"

    def backend_table(self) -> str:
        template = self.guests[GUEST].socket_template
        return f'type = "qemu"\nsocket = "{template}"\nmode = "{self.mode}"\n'

    async def state(self, instance: str = GUEST) -> str:
        return str((await self.guests[instance].qmp("query-status"))["status"])

    async def pause_as_operator(self, instance: str = GUEST) -> None:
        await self.guests[instance].qmp("stop")

    async def resume_as_operator(self, instance: str = GUEST) -> None:
        await self.guests[instance].qmp("cont")

    async def ticks(self) -> bool:
        await self.guests[GUEST].next_ticks()
        return True

    async def leftovers(self) -> list[str]:
        found = await super().leftovers()
        guest = self.guests[GUEST]
        objects: list[dict[str, Any]] = await guest.qmp("qom-list", path="/objects")
        found += [f"QEMU has object {o['name']}" for o in objects if o["name"].startswith("hypemand")]
        found += [f"QEMU has job {job['id']}" for job in await guest.qmp("query-jobs")]
        names = sorted(self.listed().values())
        for node, tags in (await tags_of(guest)).items():
            if sorted(tags) != names:
                found.append(f"disk {node} has {sorted(tags)}, but {names} are listed")
        return found


@asynccontextmanager
async def embedded_ground(directory: Path) -> AsyncIterator[Ground]:
    """An embedded backend below *directory*."""
    yield EmbeddedGround("embedded", Lab(directory))


@asynccontextmanager
async def _qemu_ground(directory: Path, mode: str) -> AsyncIterator[Ground]:
    with tempfile.TemporaryDirectory(prefix="hypemand-") as short:
        sockets = Path(short)
        async with (
            running_guest(directory, instance_id=GUEST, sockets_in=sockets, tick_ms=TICK_MS) as guest,
            running_guest(directory, instance_id=OPERATORS, sockets_in=sockets, tick_ms=TICK_MS) as operators,
        ):
            ground = QemuGround(f"qemu-{mode}", Lab(directory), mode, {GUEST: guest, OPERATORS: operators})
            await ground.pause_as_operator(OPERATORS)
            yield ground


NAMES = ("embedded", "qemu-background", "qemu-internal")


def opened(name: str, directory: Path) -> AbstractAsyncContextManager[Ground]:
    """The ground called *name*, below *directory*, until the end of the block."""
    if name == "embedded":
        return embedded_ground(directory)
    return _qemu_ground(directory, name.removeprefix("qemu-"))
