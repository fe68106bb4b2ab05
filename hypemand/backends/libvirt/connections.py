"""Calls to libvirt, in threads: each on a connection of its own, and at one guest's state one at a time.

Connections are kept for the next call. One that was lost meanwhile is found
out before anything is asked over it, and made anew. A call that nobody waits
for any more comes to its end in its thread: no call of libvirt can be cut short.
"""

import threading
import traceback
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from typing import TypeVar

import libvirt
import trio
from attrs import Factory, define, field, frozen

from hypemand.backends.base import BackendError, BackendUnavailable, InstanceNotFound
from hypemand.backends.libvirt import events
from hypemand.backends.libvirt.settings import LibvirtSettings
from hypemand.core.model import InstanceId

T = TypeVar("T")
MOST_IDLE = 4
LOOK_S = 0.05
CLOSE_S = 1.0
KEEPALIVE_S, KEEPALIVE_COUNT = 5, 3
"""A daemon on another machine that sends nothing for so long, times so many, is not there any more."""
THREADS = 40
THREADS_OF_ONE = 4
"""A guest whose QEMU hangs takes no more threads than that from us, however often it is asked."""


class ConnectionLost(BackendUnavailable):
    """libvirt could not be reached, or not any more; what was asked may have been done all the same."""


class GivenUp(BackendUnavailable):
    """Nobody waits for this any more, so it is not begun."""


@frozen
class Turn:
    """A thread's turn at a guest: nobody else of this process changes its state meanwhile."""

    connection: libvirt.virConnect
    _given_up: threading.Event

    def check_wanted(self) -> None:
        """Raise `GivenUp` if nobody waits for what is to be done next."""
        if self._given_up.is_set():
            raise GivenUp("it was given up before it began")


@define(eq=False)
class Connections:
    """Connections to the daemon of one URI."""

    settings: LibvirtSettings
    _idle: list[libvirt.virConnect] = Factory(list)
    _idle_lock: threading.Lock = Factory(threading.Lock)
    _is_closed: bool = False
    _turns: defaultdict[InstanceId, threading.Lock] = field(factory=lambda: defaultdict(threading.Lock))
    _limiters: dict[InstanceId | None, trio.CapacityLimiter] = Factory(dict)

    async def ask(self, work: Callable[[libvirt.virConnect], T], about: InstanceId | None = None) -> T:
        """What *work* returns, called with a connection in a thread. It changes nothing.

        Args:
            about: The guest whose QEMU has to answer for it; None where libvirt itself knows.

        Raises:
            BackendError: In place of libvirt's own errors.
        """
        return await self._in_thread(partial(self._connected, work), about)

    async def change(self, instance: InstanceId, work: Callable[[Turn], T]) -> T:
        """The same with what changes the state of *instance*, once all that began earlier is over.

        What was given up by then is not begun at all: it would take hold after what follows.
        """
        given_up = threading.Event()

        def in_turn(connection: libvirt.virConnect) -> T:
            turn = Turn(connection, given_up)
            while not self._turns[instance].acquire(timeout=LOOK_S):
                turn.check_wanted()
            try:
                turn.check_wanted()
                return work(turn)
            finally:
                self._turns[instance].release()

        try:
            return await self._in_thread(partial(self._connected, in_turn), instance)
        finally:
            given_up.set()

    async def aclose(self) -> None:
        """Close connections that are not in use; one whose daemon hangs is left to itself."""
        with trio.move_on_after(CLOSE_S):
            await self._in_thread(self._close_idle, None)

    async def _in_thread(self, work: Callable[[], T], about: InstanceId | None) -> T:
        limiter = self._limiters.get(about)
        if limiter is None:
            limiter = trio.CapacityLimiter(THREADS if about is None else THREADS_OF_ONE)
            self._limiters[about] = limiter
        return await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=limiter)

    # From here on: in a worker thread.

    def _connected(self, work: Callable[[libvirt.virConnect], T]) -> T:
        connection = self._take()
        try:
            return work(connection)
        except BaseException as error:
            _let_go(error)
            if isinstance(error, libvirt.libvirtError):
                raise translated(error) from error
            raise
        finally:
            self._give_back(connection)

    def _take(self) -> libvirt.virConnect:
        while True:
            with self._idle_lock:
                if not self._idle:
                    break
                connection = self._idle.pop()
            with suppress(libvirt.libvirtError):
                connection.getLibVersion()
                return connection
            _close(connection)
        return _opened(self.settings)

    def _give_back(self, connection: libvirt.virConnect) -> None:
        with self._idle_lock, suppress(libvirt.libvirtError):
            # What a call that was given up gives back late would be closed by whoever collects garbage then.
            if not self._is_closed and len(self._idle) < MOST_IDLE and connection.isAlive():
                self._idle.append(connection)
                return
        _close(connection)

    def _close_idle(self) -> None:
        with self._idle_lock:
            idle, self._idle, self._is_closed = self._idle, [], True
        for connection in idle:
            _close(connection)


def _let_go(error: BaseException | None) -> None:
    """Let go of what the frames of *error* hold.

    Guests and snapshots hold their connection: the last of them closes it,
    which may take as long as libvirt likes, and must not be done by the event
    loop, to which the error goes.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _close(connection: libvirt.virConnect) -> None:
    with suppress(libvirt.libvirtError):
        connection.close()


def _opened(settings: LibvirtSettings) -> libvirt.virConnect:
    _silence()
    if not settings.is_here:
        events.SERVED.begin()
    try:
        connection = libvirt.open(settings.uri)
        if not settings.is_here:
            connection.setKeepAlive(KEEPALIVE_S, KEEPALIVE_COUNT)
    except libvirt.libvirtError as error:
        raise ConnectionLost(f"libvirt at {settings.uri} can't be reached: {text_of(error)}") from error
    return connection


@cache
def _silence() -> None:
    """Else libvirt writes each error to stderr, beside raising it."""
    libvirt.registerErrorHandler(lambda _context, _error: None, None)


def translated(error: libvirt.libvirtError, otherwise: type[BackendError] = BackendUnavailable) -> BackendError:
    """An error of libvirt as one of ours; *otherwise*: where it is about what was asked, and not about being asked."""
    text = text_of(error)
    if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
        return InstanceNotFound(text)
    if is_lost(error):
        return ConnectionLost(f"libvirt can't be reached: {text}")
    if error.get_error_code() == libvirt.VIR_ERR_OPERATION_TIMEOUT:
        return BackendUnavailable(f"libvirt is busy with this guest: {text}")
    return otherwise(f"libvirt: {text}")


def text_of(error: libvirt.libvirtError) -> str:
    """What libvirt says, in one line: QEMU's own words may be several."""
    return "; ".join(line for line in str(error).splitlines() if line.strip())


def is_lost(error: libvirt.libvirtError) -> bool:
    """Whether the connection could not be made, or broke: nothing is known of what was asked then."""
    return error.get_error_domain() == libvirt.VIR_FROM_RPC or error.get_error_code() is None
