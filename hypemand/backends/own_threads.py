"""Blocking work of one backend, in threads of its own: a hung filesystem below its files stops no other backend."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import trio
from attrs import field, frozen

from hypemand.backends.base import BackendUnavailable
from hypemand.backends.questions import Questions

T = TypeVar("T")
MOST = 40


@frozen(eq=False)
class OwnThreads:
    """The threads of one backend.

    Attributes:
        root: Its files; named where an error names none.
    """

    root: Path
    _questions: Questions = field(init=False, factory=Questions)
    _limiter: trio.CapacityLimiter = field(init=False, factory=lambda: trio.CapacityLimiter(MOST))

    async def do(self, work: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """What blocking *work* returns; it is left behind on cancellation.

        Raises:
            BackendUnavailable: In place of an `OSError`.
        """
        with self._as_unavailable():
            return await trio.to_thread.run_sync(
                partial(work, *args, **kwargs), abandon_on_cancel=True, limiter=self._limiter
            )

    async def ask(self, work: Callable[..., T], *args: Any) -> T:
        """As `do`, for what only reads little."""
        with self._as_unavailable():
            return await self._questions.ask(work, *args)

    @contextmanager
    def _as_unavailable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise BackendUnavailable(f"{error.filename or self.root}: {error.strerror}") from error
