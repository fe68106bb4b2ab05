"""When Python may look for garbage: not while a start loads what stays, and never among that."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_NEW_OBJECTS = 10_000
"""So many are looked through at a time; more garbage than these would be does not pile up."""


@contextmanager
def lasting() -> Iterator[None]:
    """What is made in the block stays for good: looking through it again and again would hold up runs.

    Nor is a run garbage before it is over: what begins at one moment is not looked through as it comes.
    """
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.set_threshold(_NEW_OBJECTS)
        gc.enable()
