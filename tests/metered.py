"""A world with metrics. A helper for tests."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import trio

from hypemand.config import ScheduleEntry
from hypemand.surface.metrics.page import Metrics
from tests.world import World, entry, world

HOUR = timedelta(hours=1)
SOON = 7.0
"""Until what begins at once is over."""


@asynccontextmanager
async def metered(tmp_path: Path, *entries: ScheduleEntry, **more: Any) -> AsyncIterator[tuple[World, Metrics]]:
    """A world with metrics, as the daemon has them."""
    async with world(tmp_path, *entries, serve=False, **more) as made:
        metrics = Metrics(made.engine)
        with made.engine.events.heard_by(metrics.heard):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(made.engine.serve)
                nursery.start_soon(metrics.keep_counting)
                yield made, metrics
                nursery.cancel_scope.cancel()


def now_and_then(instance: str = "web-1", **more: Any) -> ScheduleEntry:
    """An entry whose first run is at once, and the next in an hour."""
    return entry(instance, HOUR, first_run="now", **more)
