"""Blocking work on the catalog, away from the event loop."""

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import trio

from hypemand.backends.base import BackendUnavailable
from hypemand.backends.catalog import Catalog
from hypemand.backends.qemu.settings import QemuSettings

T = TypeVar("T")


async def in_thread(function: Callable[..., T], *args: Any) -> T:
    """Run *function*. Abandoned on cancellation: a filesystem that hangs must not hold up what has to go on.

    Raises:
        BackendUnavailable: In place of an `OSError`.
    """
    try:
        return await trio.to_thread.run_sync(
            function, *args, abandon_on_cancel=True, limiter=_threads(_place(function))
        )
    except OSError as error:
        raise BackendUnavailable(f"{error.filename or 'the catalog'} can't be used: {error.strerror}") from error


@cache
def limiter_of(file: str) -> trio.CapacityLimiter:  # noqa: ARG001 - the cache goes by it
    """Threads for work on *file* alone: if it hangs, it stops no other."""
    return trio.CapacityLimiter(4)


def _place(function: Callable[..., Any]) -> str:
    """Whose files *function* works on, as far as that shows."""
    owner = getattr(function, "__self__", None)
    return repr(owner) if isinstance(owner, (Catalog, QemuSettings)) else ""


@cache
def _threads(place: str) -> trio.CapacityLimiter:  # noqa: ARG001 - the cache goes by it
    """Threads of their own for each catalog: those that hang there leave the others to other work, and to others."""
    return trio.CapacityLimiter(40)
