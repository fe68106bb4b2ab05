"""When Python may look for garbage: seldom, not while a start loads what stays, and never among that."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_NEW_OBJECTS = 10_000
"""So many are looked through at a time; more garbage than these would be does not pile up."""


def look_seldom() -> None:
    """Neither what many runs need that begin at one moment is garbage, nor what a command shows."""
    gc.set_threshold(_NEW_OBJECTS)


@contextmanager
def lasting() -> Iterator[None]:
    """What is made in the block stays for good: looking through it again and again would hold up runs."""
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()
