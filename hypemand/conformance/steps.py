"""The steps of a run, and a backend that has a fault at one of them."""

from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, cast

from attrs import define, field, frozen

from hypemand.backends.base import Backend, BackendUnavailable
from hypemand.conformance.subject import Traits
from hypemand.core.model import Freezer

Call = Callable[[], Awaitable[Any]]
Interfere = Callable[[Call], Awaitable[Any]]
"""What comes of a call, in place of making it."""


@frozen
class Step:
    """A step of a run: a call of the backend.

    Attributes:
        method: The one that is called.
        number: Which of the run's calls of it.
        freezer: With whom to freeze the guest a run has this step; None: with either.
        after_lost: The step whose answer has to be lost for this one to come.
    """

    name: str
    method: str = field()
    number: int = 1
    freezer: Freezer | None = None
    after_lost: str | None = None

    @method.default
    def _same(self) -> str:
        return self.name

    def is_in_runs(self, traits: Traits) -> bool:
        """Whether a run on a backend of *traits* has this step."""
        return self.freezer in (None, traits.freezes)


STEPS = (
    Step("state"),
    Step("prepare"),
    Step("make_ready", freezer=Freezer.ENGINE),
    Step("last-look", "state", number=2, freezer=Freezer.ENGINE),
    Step("pause", freezer=Freezer.ENGINE),
    Step("capture"),
    Step("resume", freezer=Freezer.ENGINE),
    Step("complete"),
    Step("publish"),
    Step("list_snapshots"),
    Step("delete_snapshot"),
    Step("settle", after_lost="capture"),
)
"""In the order of a run that succeeds; settling comes after one that did not."""
_METHODS = frozenset(step.method for step in STEPS)


@define
class Trap:
    """Lies in wait at a step, and interferes with its call once.

    Attributes:
        others: The same for steps that have to go wrong first.
        sprung: Whether it has.
    """

    step: Step
    interfere: Interfere
    others: tuple["Trap", ...] = ()
    sprung: bool = False
    _calls: Counter[str] = field(factory=Counter)

    async def at(self, method: str, call: Call) -> Any:
        """Make *call* of *method*, or what the trap has in its place."""
        self._calls[method] += 1
        for trap in (self, *self.others):
            if method == trap.step.method and self._calls[method] == trap.step.number:
                trap.sprung = True
                return await trap.interfere(call)
        return await call()


class Trapped:
    """A backend that is as another one, but for the trap that is set, if one is."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.trap: Trap | None = None

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._backend, name)
        return partial(self._called, name, found) if name in _METHODS else found

    async def _called(self, name: str, method: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any) -> Any:
        call = partial(method, *args, **kwargs)
        return await (call() if self.trap is None else self.trap.at(name, call))

    def as_backend(self) -> Backend:
        """Itself: what it does not define it takes from the other one."""
        return cast("Backend", self)


async def _lose_answer(call: Call) -> Any:
    """Make *call*, and tell nothing of it."""
    await call()
    raise BackendUnavailable("a fault: the answer is lost, so that the next step is reached")


def trap_of(step: Step, interfere: Interfere) -> Trap:
    """A trap at *step*, and those without which the run does not get there."""
    first = [Trap(other, _lose_answer) for other in STEPS if other.name == step.after_lost]
    return Trap(step, interfere, tuple(first))
