"""What the kit needs to know of a backend under test: a guest, an operator's hand on it, and what it is able to do."""

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from attrs import frozen

from hypemand.backends.base import Backend, Surroundings
from hypemand.core.model import Freezer, InstanceId


class Subject(ABC):
    """A backend, already opened for the first time, and one guest of it that runs.

    Whatever is not the backend's own doing goes past it: straight to the
    hypervisor, as an operator or another program would do it.

    Attributes:
        backend: The backend under test. Its type is known to `registry.connect`: built in, or by an installed entry
            point; others are made from its `Backend.connection`, in other processes, too.
        surroundings: What *backend* was built with.
        instance: The guest.
        catalog: The directory of its `hypemand.backends.catalog.Catalog`; None where it keeps its snapshots otherwise.
        slow_backend: The same backend with captures that take seconds, where it can be had; cancellations are tried
            on it. None: *backend* itself.
    """

    backend: Backend
    surroundings: Surroundings
    instance: InstanceId
    catalog: Path | None = None
    slow_backend: Backend | None = None

    @abstractmethod
    async def guest_runs(self) -> bool:
        """Whether the guest's vCPUs run."""

    @abstractmethod
    async def operator_pauses(self) -> None:
        """Pause the guest. It may be paused already."""

    @abstractmethod
    async def operator_resumes(self) -> None:
        """Let it run again."""

    @abstractmethod
    async def go_away(self) -> None:
        """Make the hypervisor unreachable."""

    @abstractmethod
    async def come_back(self) -> None:
        """Make it reachable again, the guest as it was."""

    async def leftovers(self) -> list[str]:
        """Names of what there is of snapshots that are not whole, wherever the backend may have left it."""
        if self.catalog is None:
            raise NotImplementedError("a backend without a catalog tells here what it may leave behind")
        return [path.name for path in self.catalog.glob("*/*") if path.name.startswith(".")]


SubjectMaker = Callable[[Path], AbstractAsyncContextManager[Subject]]
"""From an empty directory to a `Subject`, until the end of the block."""


@frozen
class Traits:
    """What a backend does differently from others, by which some cases don't apply to it.

    They are left out then, and do not pass in silence; one case checks that
    these are what the backend itself says.

    Attributes:
        freezes: As in its `Capabilities`.
        catalog: Whether it keeps its snapshots in a `hypemand.backends.catalog.Catalog`.
        marks: Whether it can tell a pause of its own from an operator's.
        pauses: Whether `pause` makes a guest stand still, and a paused one can be captured. A hypervisor that freezes
            by itself may do so within a capture alone.
    """

    freezes: Freezer = Freezer.ENGINE
    catalog: bool = False
    marks: bool = True
    pauses: bool = True


@frozen
class Case:
    """One test.

    Attributes:
        check: Raises where the subject does not keep what *name* says. Its own directory is the second argument.
        applies: Whether it applies to a backend of such traits.
    """

    name: str
    check: Callable[[Subject, Path], Awaitable[None]]
    applies: Callable[[Traits], bool] = lambda _: True
