"""Two questions at a time, while a guest stands still for both."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

A = TypeVar("A")
B = TypeVar("B")


async def both(first: Callable[[], Awaitable[A]], second: Callable[[], Awaitable[B]]) -> tuple[A, B]:
    """What both return. Where one fails the other is cancelled, and its error raised as it is."""
    firsts, seconds, failures = list[A](), list[B](), list[Exception]()

    async def beside() -> None:
        try:
            seconds.append(await second())
        except Exception as error:  # noqa: BLE001 - raised below, and not as a part of a group
            failures.append(error)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(beside)
        try:
            firsts.append(await first())
        except Exception as error:  # noqa: BLE001 - the same
            failures.append(error)
            nursery.cancel_scope.cancel()
    if failures:
        raise failures[0]
    return firsts[0], seconds[0]
