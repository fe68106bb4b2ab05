"""What one VMM does differently from another: its requests, its words, its files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from attrs import frozen

from hypemand.backends.vmm.client import Client
from hypemand.core.model import InstanceState, RestoreStep


@frozen
class Look:
    """How a guest is at the moment.

    Attributes:
        detail: The VMM's own word where ours says less.
    """

    state: InstanceState
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.state} ({self.detail})" if self.detail else str(self.state)


@frozen
class Drive:
    """A disk as the VMM has it.

    Attributes:
        name: The VMM's.
        path: As the VMM was told, which may see it elsewhere than we do; None where it is none of its files.
        read_only: The guest can't write to it.
        may_be_qcow2: Where it looks like one; of any other disk the guest may have written what looks like one.
    """

    name: str
    path: str | None
    read_only: bool = False
    may_be_qcow2: bool = False


@frozen
class Machine:
    """What a guest consists of.

    Attributes:
        memory_bytes: What its saved memory takes at most.
        least_memory_bytes: What it takes at least.
        refusals: Why a snapshot of it could not be restored, or would harm the guest; each says what to do.
        warnings: What a snapshot of it lacks.
        may_write: Directories and files that the VMM may write to, and no others; None: as its user's rights have it.
    """

    drives: tuple[Drive, ...]
    memory_bytes: int
    refusals: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    least_memory_bytes: int = 0
    may_write: tuple[str, ...] | None = None


@frozen
class Identity:
    """Which VMM it is, and which guest, in its own words."""

    version: str = ""
    uuid: str = ""


class Dialect(Protocol):
    """One kind of VMM. No method waits longer than the VMM does."""

    @property
    def type_name(self) -> str:
        """As in the config."""

    @property
    def title(self) -> str:
        """As its makers call it."""

    @property
    def saved(self) -> Sequence[str]:
        """Files that each snapshot by this VMM has."""

    @property
    def memory_file(self) -> str:
        """That of them which has the memory."""

    @property
    def documents(self) -> Sequence[str]:
        """Those of them that are JSON."""

    @property
    def knows_qcow2(self) -> bool:
        """Whether disks of its guests may be images of that kind."""

    def why_no_qcow2(self, version: str) -> str | None:
        """Why a disk of that kind can't be copied while the guest of a VMM of that *version* is paused, or None."""

    async def look(self, client: Client) -> Look:
        """How the guest is."""

    async def inspect(self, client: Client) -> tuple[Look, Machine]:
        """The same, and what the guest consists of."""

    async def identify(self, client: Client) -> Identity:
        """Which VMM it is."""

    async def pause(self, client: Client) -> None:
        """Have the vCPUs stand still."""

    async def resume(self, client: Client) -> None:
        """Have them go on."""

    async def save(self, client: Client, directory: str) -> None:
        """Save memory and devices into the empty *directory*, as the VMM sees it. The guest is paused."""

    def paused_already(self, reason: str) -> bool:
        """Whether the VMM refused to pause for the *reason* that the guest was paused before."""

    def restore(self, socket: Path, directory: str) -> tuple[RestoreStep, ...]:
        """How the guest is started from what was saved into *directory*, as the VMM sees it, once its disks are back.

        Args:
            socket: Its API socket.
        """


def table(value: Any) -> Mapping[str, Any]:
    """*value*, if it is an object; else an empty one: what a VMM leaves out, it may also say with null."""
    return value if isinstance(value, Mapping) else {}


def tables(value: Any) -> Sequence[Mapping[str, Any]]:
    """The objects in the list *value*, if it is one."""
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []
