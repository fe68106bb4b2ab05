"""The daemon as its service manager sees it: sd_notify(3)'s protocol, which is a line or two in a datagram.

Started by hand, or by something that does not ask for it, nobody is told anything.
"""

import os
import time
from collections.abc import AsyncIterator, Callable, MutableMapping
from contextlib import asynccontextmanager

import structlog
import trio
from attrs import define, field, frozen

from hypemand.engine.scheduler import Scheduler
from hypemand.surface.lasting import keep_up

EXTEND_S = 30.0
"""How much longer a start or a stop may take, told anew every `BEAT_S`."""
BEAT_S = 5.0
LONGEST_START_S = 900.0
"""After so long without an end a start is left to the service manager's own time limit."""
LONGEST_END_S = 900.0
"""The same for a stop whose grace is over: on a disk that hangs it has no end, and nor would the machine's."""
STATUS_S = 1.0
"""From one status to the next, at least."""
READY_TRIES = 10
_SEND_S = 5.0
_log = structlog.get_logger()


@frozen
class Notifier:
    """Where the service manager listens, and how often it wants to hear that the daemon is alive.

    Attributes:
        address: A path, or ``@`` and a name; None: nowhere.
        watchdog_s: Within so many seconds it wants to hear; None: never.
    """

    address: str | None = None
    watchdog_s: float | None = None

    async def tell(self, *lines: str) -> bool:
        """Send *lines*, such as ``READY=1``. What can't be sent is logged, and hypemand goes on.

        Returns:
            False where somebody is to be told, and was not.
        """
        if self.address is None:
            return True
        address = "\0" + self.address[1:] if self.address.startswith("@") else self.address
        try:
            with trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_DGRAM) as sender, trio.fail_after(_SEND_S):
                await sender.sendto("\n".join(lines).encode(), address)
        except (OSError, trio.TooSlowError) as error:
            _log.warning("the service manager does not hear", told=lines[0], error=str(error) or "it takes no message")
            return False
        return True


def take_notifier(environ: MutableMapping[str, str]) -> Notifier:
    """What *environ* says of the service manager, taken out of it: no child is to speak for the daemon."""
    address = environ.pop("NOTIFY_SOCKET", None)
    pid, usec = environ.pop("WATCHDOG_PID", None), environ.pop("WATCHDOG_USEC", "")
    if address is not None and address[:1] not in ("/", "@"):
        _log.warning("NOTIFY_SOCKET is no unix socket; the service manager is not told anything", address=address)
        address = None
    is_ours = pid is None or pid == str(os.getpid())
    return Notifier(address, int(usec) / 1e6 if is_ours and usec.isdecimal() and int(usec) else None)


@define(eq=False)
class Service:
    """Tells the service manager how the daemon is, phase by phase: `starting`, `running`, `stopping`.

    Each of these goes on until it is cancelled, or nobody would wait any longer; the first also until `ready`.
    """

    notifier: Notifier = Notifier()
    _starting: trio.CancelScope = field(init=False, factory=trio.CancelScope)
    _is_ready: bool = field(init=False, default=False)
    _is_stopping: bool = field(init=False, default=False)
    _reloads: int = field(init=False, default=0)

    async def starting(self) -> None:
        """Have the manager wait for a start that takes its time: there may be much to settle."""
        until = trio.current_time() + LONGEST_START_S
        with self._starting:
            while trio.current_time() < until:
                await self.notifier.tell(_extend())
                await trio.sleep(BEAT_S)

    async def ready(self) -> None:
        """Schedules are kept from now on, and clients answered. Where it stops already, that is not told any more."""
        self._starting.cancel()
        self._is_ready = True
        await self._say_ready()

    async def _say_ready(self) -> None:
        """Also a second time: who waits for it would end hypemand for want of that one message."""
        for _ in range(READY_TRIES):
            if not self._may_say_ready or self._reloads or await self.notifier.tell("READY=1"):
                return
            await trio.sleep(BEAT_S)

    async def running(self, scheduler: Scheduler, status: Callable[[], str]) -> None:
        """Keep the watchdog from barking as long as *scheduler* goes its rounds, and tell *status* when it changes."""
        if self.notifier.address is None:
            return
        async with trio.open_nursery() as nursery:
            # A bug in what is only looked at must not pass for a scheduler that is stuck.
            nursery.start_soon(keep_up, "status line", lambda: self._tell_status(scheduler, status))
            if self.notifier.watchdog_s is not None:
                nursery.start_soon(self._show_life, scheduler, self.notifier.watchdog_s / 3)

    async def _show_life(self, scheduler: Scheduler, every_s: float) -> None:
        while True:
            await scheduler.take_turn()
            await self.notifier.tell("WATCHDOG=1")
            await trio.sleep(every_s)

    async def _tell_status(self, scheduler: Scheduler, status: Callable[[], str]) -> None:
        told = ""
        while True:
            text = status()
            if text != told and not self._is_stopping:
                await self.notifier.tell(f"STATUS={text}")
                told = text
                await trio.sleep(STATUS_S)
            await scheduler.next_turn()

    @asynccontextmanager
    async def reloading(self) -> AsyncIterator[None]:
        """Within the block the daemon takes in files anew."""
        self._reloads += 1
        if self._reloads == 1 and self._may_say_ready:
            await self.notifier.tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            yield
        finally:
            self._reloads -= 1
            await self._say_ready()

    @property
    def _may_say_ready(self) -> bool:
        """Before it is ready and once it stops, a ``READY=1`` would say what is not so."""
        return self._is_ready and not self._is_stopping

    async def stopping(self, grace_s: float) -> None:
        """The daemon is about to end, and has the manager wait for captures that are under way."""
        self._is_stopping = True
        self._starting.cancel()
        await self.notifier.tell("STOPPING=1", f"STATUS=Stopping: what is under way gets {grace_s:.0f} s to finish")
        until = trio.current_time() + grace_s + LONGEST_END_S
        while trio.current_time() < until:
            await self.notifier.tell(_extend())
            await trio.sleep(BEAT_S)


def _extend() -> str:
    return f"EXTEND_TIMEOUT_USEC={EXTEND_S * 1e6:.0f}"
