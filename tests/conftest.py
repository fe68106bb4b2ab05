"""Set up for every test."""

from collections.abc import Iterator

import pytest
import structlog
from hypothesis import settings

settings.register_profile("hypemand", deadline=None, max_examples=60)
settings.load_profile("hypemand")


@pytest.fixture(autouse=True)
def quiet_log() -> Iterator[None]:
    """Nothing is logged, unless the test sets the log up or captures it; rendering would take most of the time."""
    structlog.configure(processors=[_drop], wrapper_class=structlog.make_filtering_bound_logger(0))
    yield
    structlog.reset_defaults()


def _drop(*_: object) -> str:
    raise structlog.DropEvent
