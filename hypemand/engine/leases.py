"""Freeze leases: before a guest is paused, somebody else knows of it who will have it thawed if this process can't."""

from typing import Protocol

import trio

from hypemand.core.errors import HypemandError


class NoGuardError(HypemandError):
    """There is no guard, and nothing is frozen without one."""


class Leases(Protocol):
    """Leases on guests that are about to stand still, by the runs that freeze them."""

    async def check(self) -> None:
        """Look whether a lease can be had now.

        Raises:
            NoGuardError: It can't.
        """

    async def open(self, run_id: str, within_s: float) -> None:
        """Return once the lease of *run_id* is acknowledged; only then may its guest be paused.

        Args:
            within_s: The freeze budget, from now on.

        Raises:
            NoGuardError: Nobody acknowledged it; there is no lease then.
        """

    def close(self, run_id: str) -> None:
        """The guest of *run_id* runs again. Without such a lease: no-op."""


class NoLeases:
    """``runs.guard = false``: a guest that is frozen when hypemand is killed stays so until the next start."""

    async def check(self) -> None:
        """See `Leases.check`."""
        await trio.lowlevel.checkpoint()

    async def open(self, run_id: str, within_s: float) -> None:
        """See `Leases.open`."""
        del run_id, within_s
        await trio.lowlevel.checkpoint()

    def close(self, run_id: str) -> None:
        """See `Leases.close`."""
