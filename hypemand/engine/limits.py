"""Time limits on what a hypervisor is asked, and on how failures before a freeze are tried again."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio
from attrs import frozen

from hypemand.backends.base import BackendUnavailable

T = TypeVar("T")


@frozen
class Patience:
    """How long to wait for a hypervisor, in seconds.

    Attributes:
        answer_s: For a question that takes no work.
        settle_s: For clearing up after a run, before that is left to the recovery.
        thaw_first_s, thaw_most_s: First and longest wait between tries to resume a guest.
    """

    answer_s: float = 10.0
    settle_s: float = 10.0
    thaw_first_s: float = 0.1
    thaw_most_s: float = 0.5


async def answer(what: str, within_s: float, ask: Callable[[], Awaitable[T]]) -> T:
    """What *ask* returns.

    Raises:
        BackendUnavailable: It took longer than *within_s*.
    """
    with trio.move_on_after(within_s):
        return await ask()
    raise no_answer(what, within_s)


def no_answer(what: str, within_s: float) -> BackendUnavailable:
    """That a hypervisor was asked *what*, and has not answered."""
    return BackendUnavailable(f"the hypervisor did not answer within {within_s:g} s ({what})")
