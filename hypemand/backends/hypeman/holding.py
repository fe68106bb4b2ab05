"""A process that keeps a connection open should hypemand be killed, until its answer comes.

Hypeman ends what it does for a request together with the request's connection:
a guest whose capture ends so stays down, or paused, and is not brought back.
"""

import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import structlog
import trio
from attrs import define, field, frozen

LONGEST_S = 6 * 3600
"""A server that is gone for good is waited for no longer."""
_PROGRAM = f"""
import os, select
if os.read(0, 1) == b"":
    connection = select.poll()
    connection.register(3, select.POLLIN | select.POLLRDHUP)
    connection.poll({LONGEST_S} * 1000)
"""
_log = structlog.get_logger()


@frozen
class _Holder:
    """A child of ours. Once *pipe* ends it holds on until something comes over the connection."""

    pid: int
    pidfd: int
    pipe: int

    async def end(self) -> None:
        """Have it end now."""
        with suppress(ProcessLookupError, ChildProcessError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            await trio.lowlevel.wait_readable(self.pidfd)
            self._reap()
        self.let_go()

    def _reap(self) -> None:
        os.waitpid(self.pid, os.WNOHANG)

    def let_go(self) -> None:
        """Leave it to itself."""
        os.close(self.pidfd)
        os.close(self.pipe)


@define(eq=False)
class Held:
    """Within the block, a connection that `trace` sees made is held by a process of its own, too."""

    _holder: _Holder | None = field(init=False, default=None)

    async def __aenter__(self) -> Self:
        return self

    async def trace(self, event: str, facts: Mapping[str, Any]) -> None:
        """Have a new connection held before anything is sent over it. Called as httpcore's extension ``trace``."""
        if event != "connection.connect_tcp.complete":
            return
        await self._end()  # that of a connection that was closed before anything was done
        try:
            self._holder = _start(facts["return_value"].get_extra_info("socket").fileno())
        except OSError as error:  # then it is open for as long as hypemand lives
            _log.warning("a connection has no holder", error=str(error))

    async def __aexit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _where: TracebackType | None
    ) -> None:
        """End the holder; but where this process ends in the midst of the block, that is what it is there for."""
        if not isinstance(error, trio.Cancelled):
            await self._end()
        elif self._holder is not None:
            self._holder.let_go()

    async def _end(self) -> None:
        if self._holder is not None:
            holder, self._holder = self._holder, None
            with trio.CancelScope(shield=True):
                await holder.end()


def _start(connection: int) -> _Holder:
    theirs, ours = os.pipe()
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        # Nothing in its environment tells whose it is: who ends hypemand with all its children leaves it alone.
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-I", "-S", "-c", _PROGRAM],
            {},
            file_actions=[
                (os.POSIX_SPAWN_DUP2, *pair) for pair in ((theirs, 0), (null, 1), (null, 2), (connection, 3))
            ],
            setsid=True,
        )
        return _Holder(pid, os.pidfd_open(pid), ours)
    except BaseException:
        os.close(ours)
        raise
    finally:
        os.close(theirs)
        os.close(null)
