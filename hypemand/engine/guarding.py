"""The daemon's end of the guard: starts it, starts another when it dies, and keeps freeze leases with it."""

import fcntl
import math
import os
import secrets
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import structlog
import trio
from attrs import define, field, frozen

from hypemand.engine import guard
from hypemand.engine.children import watched
from hypemand.engine.leases import NoGuardError

START_S = 10.0
"""How long a guard may take to say hello."""
ACKNOWLEDGE_S = 5.0
"""How long it may take to acknowledge a lease, before another one is asked."""
SILENT_S = 5.0
"""In so long it pings, when a guest is frozen."""
GOODBYE_S = 2.0
"""How long it may take to end."""
AGAIN_S = 1.0
"""From the start of one to that of the next, at least."""
_INBOX, _OUTBOX = 3, 4
"""What the guard's ends of the pipes are numbered there."""
_log = structlog.get_logger()


@define
class _Lease:
    deadline: float
    acknowledged: trio.Event = field(factory=trio.Event)


@frozen(eq=False)
class _Link:
    """A guard process and the pipes to it. Not a `trio.Process`: that one minds being left behind."""

    pid: int
    pidfd: int
    inbox: trio.lowlevel.FdStream
    outbox: int

    def tell(self, line: str) -> None:
        """Send a line. Never waits: a guard that does not read is killed, and replaced."""
        try:
            os.write(self.outbox, f"{line}\n".encode())
        except BrokenPipeError:
            pass  # it has died, which is noticed elsewhere
        except BlockingIOError:
            self.kill()

    def kill(self) -> None:
        """End it, if it has not ended yet."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    async def ended(self, within_s: float) -> bool:
        """Whether it ends within so many seconds; then nothing is left of it."""
        with trio.move_on_after(within_s):
            await trio.lowlevel.wait_readable(self.pidfd)
            with suppress(ChildProcessError):
                os.waitpid(self.pid, 0)  # noqa: ASYNC222 - it has ended
            return True
        return False

    async def close(self) -> None:
        """Close the pipes: one that lives acts on that."""
        os.close(self.outbox)
        await self.inbox.aclose()
        os.close(self.pidfd)


@define(eq=False)
class Guarding:
    """Follows `Leases` with a guard process. Leases work while `serve` runs.

    Attributes:
        wanted: Whether there is to be a guard; without one, leases are had for nothing.
        settle_command: What the guard has settle open runs, with absolute paths.
    """

    settle_command: Sequence[str]
    wanted: bool = True
    _leases: dict[str, _Lease] = field(init=False, factory=dict)
    _link: _Link | None = field(init=False, default=None)
    _ready: trio.Event = field(init=False, factory=trio.Event)
    _changed: trio.Event = field(init=False, factory=trio.Event)
    _heard: bool = field(init=False, default=False)
    _trouble: str = field(init=False, default="it has not started")

    @property
    def pid(self) -> int | None:
        """The guard's process id, while there is one that answers."""
        return self._link.pid if self._link is not None and self._ready.is_set() else None

    def want(self, wanted: bool) -> None:  # noqa: FBT001 - its one argument
        """Have a guard, or none; one that goes is waited for by the leases that it has."""
        self.wanted = wanted
        self._changed.set()

    @property
    def _is_needed(self) -> bool:
        return self.wanted or bool(self._leases)

    async def check(self) -> None:
        """See `Leases.check`: waits for one that starts."""
        if self.wanted and not await _comes(self._ready):
            raise self._missing()

    async def open(self, run_id: str, within_s: float) -> None:
        """See `Leases.open`."""
        if not self.wanted:
            return
        lease = self._leases[run_id] = _Lease(time.monotonic() + within_s)
        try:
            self._tell_of(run_id, lease)
            await self._acknowledged(lease)
        except BaseException:
            self.close(run_id)
            raise

    async def _acknowledged(self, lease: _Lease) -> None:
        for _ in range(2):
            asked = self._link
            if await _comes(lease.acknowledged):
                return
            if asked is not None and asked is self._link:
                asked.kill()  # it does not answer; the next one may, and is told of all leases
        raise self._missing()

    def _missing(self) -> NoGuardError:
        return NoGuardError(
            f"nothing is frozen without a guard, and there is none that answers: {self._trouble}; see the log"
            " (runs.guard = false does without)"
        )

    def close(self, run_id: str) -> None:
        """See `Leases.close`."""
        if self._leases.pop(run_id, None) is not None and self._link is not None:
            self._link.tell(f"thawed {run_id}")
        self._changed.set()

    def _tell_of(self, run_id: str, lease: _Lease) -> None:
        if self._link is not None:
            self._link.tell(f"freeze {run_id} {lease.deadline:.6f}")

    async def serve(self) -> None:
        """Keep a guard alive while one is wanted. Cancelled, it is dismissed, unless a lease is still open."""
        os.environ[guard.OWNER] = token = f"{os.getpid()}-{secrets.token_hex(8)}"
        try:
            while True:
                while not self._is_needed:
                    await self._next_change()
                await self._serve_one(token)
        finally:
            os.environ.pop(guard.OWNER, None)

    async def _serve_one(self, token: str) -> None:
        """One guard, from its start to its end."""
        began = time.monotonic()
        try:
            link = self._start(token)
        except OSError as error:
            self._trouble = f"it can't be started: {error}"
        else:
            await self._keep(link)
        if self._is_needed:
            _log.error("the guard is gone; another one is started", why=self._trouble, leases=len(self._leases))
            await trio.sleep(max(0.0, began + AGAIN_S - time.monotonic()))

    async def _keep(self, link: _Link) -> None:
        """Listen to the guard until it is gone, or not wanted any more."""
        self._link = link
        gone = False
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._dismiss_unwanted, link, nursery.cancel_scope)
                nursery.start_soon(self._kill_silent, link)
                await self._listen(link)
                gone = True
                nursery.cancel_scope.cancel()
        finally:
            self._link = None
            if self._ready.is_set():
                self._ready = trio.Event()
            with trio.CancelScope(shield=True):
                await (self._bury(link) if gone else self._part_from(link))

    async def _part_from(self, link: _Link) -> None:
        """Without a goodbye it acts when its pipe is closed: right while a guest may be frozen."""
        if not self._leases:
            link.tell("goodbye")
            if not await link.ended(GOODBYE_S):
                link.kill()
                await link.ended(GOODBYE_S)
        await link.close()

    @staticmethod
    async def _bury(link: _Link) -> None:
        link.kill()
        await link.ended(GOODBYE_S)
        await link.close()

    def _start(self, token: str) -> _Link:
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        os.set_blocking(ours_out, False)
        try:
            arguments = [str(_INBOX), str(_OUTBOX), str(os.getpid()), token]
            pid = _spawn(
                [sys.executable, "-I", "-S", guard.__file__, *arguments, *self.settle_command],
                {_INBOX: theirs_in, _OUTBOX: theirs_out},
            )
            pidfd = watched(pid)
        except BaseException:
            os.close(ours_in)
            os.close(ours_out)
            raise
        finally:
            os.close(theirs_in)
            os.close(theirs_out)
        return _Link(pid, pidfd, trio.lowlevel.FdStream(ours_in), ours_out)

    async def _listen(self, link: _Link) -> None:
        """Do what the guard says, until it ends or does not say hello."""
        starting = trio.CancelScope(deadline=trio.current_time() + START_S)
        self._trouble = f"it did not start within {START_S:g} s"
        with starting:
            rest = b""
            async for data in link.inbox:
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    starting.deadline = math.inf
                    self._obey(link, *line.decode().split())
            self._trouble = "it has ended"
        if starting.cancelled_caught:
            link.kill()

    def _obey(self, link: _Link, word: str, subject: str = "") -> None:
        self._heard = True
        if word == "hello":
            self._trouble = "it has not answered"
            for run, lease in self._leases.items():
                self._tell_of(run, lease)
            self._ready.set()
            _log.debug("guard in place", pid=link.pid)
        elif word == "ping":
            link.tell(f"pong {subject}")
        elif word == "ack" and subject in self._leases:
            self._leases[subject].acknowledged.set()

    async def _dismiss_unwanted(self, link: _Link, listening: trio.CancelScope) -> None:
        while self._is_needed:
            await self._next_change()
        _log.info("the guard is switched off", pid=link.pid)
        listening.cancel()

    async def _kill_silent(self, link: _Link) -> None:
        """Have a guard replaced that hangs while a guest is frozen: it would ask whether we are there, else."""
        while True:
            self._heard = False
            await trio.sleep(SILENT_S)
            if not self._heard and any(lease.acknowledged.is_set() for lease in self._leases.values()):
                link.kill()

    async def _next_change(self) -> None:
        self._changed = trio.Event()
        await self._changed.wait()


async def _comes(event: trio.Event) -> bool:
    with trio.move_on_after(ACKNOWLEDGE_S):
        await event.wait()
    return event.is_set()


def _spawn(command: list[str], descriptors: Mapping[int, int]) -> int:
    """Start *command* in a session of its own with *descriptors* (there: here) and our stderr; its process id."""
    # Away from the low numbers first: one must not be overwritten before it is copied itself.
    high = {there: fcntl.fcntl(here, fcntl.F_DUPFD_CLOEXEC, 64) for there, here in descriptors.items()}
    try:
        return os.posix_spawn(
            command[0],
            command,
            {name: value for name, value in os.environ.items() if name != guard.OWNER},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDWR, 0),
                (os.POSIX_SPAWN_DUP2, 0, 1),
                *((os.POSIX_SPAWN_DUP2, here, there) for there, here in high.items()),
            ],
            setsid=True,
        )
    finally:
        for descriptor in high.values():
            os.close(descriptor)


def settle_command(state_dir: Path, log_level: str, log_format: str, config: Path) -> list[str]:
    """The command that settles all open runs in *state_dir*, in a fresh process of this same hypemand.

    Args:
        config: The config file, which has the hooks; nothing else in it counts.
    """
    package = Path(__file__).parents[1]
    # Behind the standard library, before whatever else is called hypemand.
    where = "next((i for i, p in enumerate(sys.path) if p.endswith('lib-dynload')), -1) + 1"
    bootstrap = (
        f"import sys; sys.path.insert({where}, {str(package.parent)!r}); from hypemand.settle import main; main()"
    )
    options = ["--log-level", log_level, "--log-format", log_format, "--config", str(config.absolute())]
    return [sys.executable, "-P", "-c", bootstrap, str(state_dir.absolute()), *options]
