"""Whose turn it is at a guest's monitor. It serves one client, so hypemand's own calls must wait for each other."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio
from attrs import Factory, define

from hypemand.backends import qmp
from hypemand.backends.base import BackendUnavailable
from hypemand.core.model import InstanceId


@define(eq=False)
class _Line:
    turn: trio.Semaphore = Factory(lambda: trio.Semaphore(1))
    held: qmp.Monitor | None = None


@define(eq=False)
class Monitors:
    """Connections to the guests of a backend: made for one operation and closed, or held from a pause to its resume.

    Attributes:
        patience_s: How long to wait for a monitor before it counts as busy.
    """

    socket_of: Callable[[InstanceId], Path]
    patience_s: float = qmp.GREETING_PATIENCE_S
    _lines: dict[InstanceId, _Line] = Factory(dict)

    @asynccontextmanager
    async def use(
        self, instance: InstanceId, *, patience_s: float | None = None, hold: bool = False
    ) -> AsyncIterator[qmp.Monitor]:
        """The monitor of *instance*, by the connection that is held, or a new one.

        Args:
            hold: Keep it for the calls that follow, until `let_go`. An error ends that too.

        Raises:
            MonitorAbsent: Nobody listens.
            BackendUnavailable: It is in use, by hypemand itself or somebody else.
        """
        patience_s = patience_s or self.patience_s
        line = self._lines.setdefault(instance, _Line())
        await self._turn(instance, line, patience_s)
        try:
            monitor, line.held = line.held, None
            if monitor is None:
                monitor = await qmp.open_monitor(self.socket_of(instance), patience_s=patience_s)
            else:
                hold = True
            try:
                yield monitor
                if hold:
                    line.held, monitor = monitor, None
            finally:
                if monitor is not None:
                    monitor.close()
        finally:
            line.turn.release()

    async def _turn(self, instance: InstanceId, line: _Line, patience_s: float) -> None:
        with trio.move_on_after(patience_s):
            await line.turn.acquire()
            return
        raise BackendUnavailable(
            f"the monitor of {instance} was in use by hypemand itself for {patience_s:g} s:"
            " for a capture or a deletion, or QEMU does not answer"
        )

    def holds(self, instance: InstanceId) -> bool:
        """Whether a connection to *instance* is held."""
        return instance in self._lines and self._lines[instance].held is not None

    def let_go(self, instance: InstanceId) -> None:
        """Close what is held of *instance*."""
        line = self._lines.get(instance)
        if line is not None and line.held is not None:
            line.held.close()
            line.held = None

    def close(self) -> None:
        """Close all that is held."""
        for instance in self._lines:
            self.let_go(instance)
