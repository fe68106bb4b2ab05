"""The job that APScheduler runs, which it finds by this module's name. Imports nothing that takes time."""

import time

BEGUN: list[float] = []


def note() -> None:
    """Note when it began."""
    BEGUN.append(time.time())
