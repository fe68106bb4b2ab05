"""When Python may look for garbage: not while a start loads what stays, and never among that."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lasting() -> Iterator[None]:
    """What is made in the block stays for good: looking through it again and again would hold up runs."""
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()
