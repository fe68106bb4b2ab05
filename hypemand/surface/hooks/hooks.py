"""Hooks: commands that an operator has run after runs, a pager after a failure, a sign of life after a success.

They are other people's programs, so each is taken for one that hangs, fails or
writes without end: a few run at once, some more wait, and the daemon neither
waits for them nor, when it stops, leaves one behind.
"""

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import structlog
import trio
from attrs import define, field

from hypemand.config import HooksConfig
from hypemand.core.duration import format_duration
from hypemand.core.model import Outcome, RunFinished
from hypemand.engine.events import Event, RunEnded
from hypemand.engine.guard import OWNER
from hypemand.state.codec import encode_run
from hypemand.surface.hooks.process import HookProcess, harmless, start

AT_ONCE = 4
"""So many of each kind run at once."""
MOST_WAITING = 200
"""So many of each kind wait; then the oldest is dropped for the newest."""
MOST_LEFT = 16
"""So many may have left something in the background that goes on until its time limit."""
GRACE_S = 5.0
"""What those under way, and those that wait, get when the daemon stops."""
_KILLED_S = 1.0
"""How long the end of what was killed is waited for, before it is told."""
_LOOK_S = 1.0
_LONGEST_ERROR = 4000
_NOT_THEIRS = frozenset(
    {
        OWNER,  # by it the guard finds what has to end with the daemon
        "CREDENTIALS_DIRECTORY",
        "FDSTORE",
        "JOURNAL_STREAM",
        "LISTEN_FDNAMES",
        "LISTEN_FDS",
        "LISTEN_PID",
        "LISTEN_PIDFDID",
        "MAINPID",
        "NOTIFY_SOCKET",
        "SYSTEMD_EXEC_PID",
        "WATCHDOG_PID",
        "WATCHDOG_USEC",
    }
)
"""What the environment says about the daemon, and isn't true of a child, or not its business."""
_log = structlog.get_logger()


@define(eq=False)
class _Lane:
    """Hooks of one kind: neither waits for the other's."""

    name: str
    command_of: Callable[[HooksConfig], tuple[str, ...]]
    wants: Callable[[RunFinished], bool]
    waiting: deque[RunFinished] = field(factory=deque)
    busy: int = 0
    dropped: int = 0

    def put(self, run: RunFinished) -> None:
        if len(self.waiting) >= MOST_WAITING:
            self.waiting.popleft()
            if not self.dropped:
                _log.error("hooks take too long: the oldest that wait are dropped", hook=self.name, wait=MOST_WAITING)
            self.dropped += 1
        self.waiting.append(run)

    def take(self) -> RunFinished | None:
        """The next one, for which there is a place; it has that until `busy` is brought down."""
        if not self.waiting or self.busy >= AT_ONCE:
            return None
        if self.dropped:
            _log.error("hooks were dropped", hook=self.name, dropped=self.dropped)
            self.dropped = 0
        self.busy += 1
        return self.waiting.popleft()


@define(eq=False)
class _Place:
    """A hook's place among those that run at once; given back early when only its background goes on."""

    give: Callable[[], None]
    is_held: bool = True

    def give_back(self) -> None:
        if self.is_held:
            self.is_held = False
            self.give()


class Hooks:
    """Runs the hooks of the config in force.

    Args:
        config: Tells the config in force, each time that a hook is about to start.
        grace_s: What hooks get, those under way and those that wait, when `serve` is cancelled.
    """

    def __init__(self, config: Callable[[], HooksConfig], grace_s: float | None = None) -> None:
        self._config = config
        self._grace_s = grace_s
        self._lanes = (
            _Lane("on_failure", lambda hooks: hooks.on_failure, has_trouble),
            _Lane("on_success", lambda hooks: hooks.on_success, lambda run: run.outcome is Outcome.SUCCEEDED),
        )
        self._running: trio.Nursery | None = None
        self._life = trio.CancelScope(shield=True)
        self._left = 0

    def heard(self, event: Event) -> None:
        """A listener of the engine. Returns at once."""
        if not isinstance(event, RunEnded):
            return
        for lane in self._lanes:
            if lane.wants(event.run) and lane.command_of(self._config()):
                lane.put(event.run)
        self._start_waiting()

    async def serve(self) -> None:
        """Run hooks until cancelled; then those that run or wait get their grace, and what still runs is killed."""
        stopping = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._serve_until, stopping)
            try:
                await trio.sleep_forever()
            finally:
                stopping.set()

    async def _serve_until(self, stopping: trio.Event) -> None:
        self._life = trio.CancelScope(shield=True)
        try:
            with self._life:
                async with trio.open_nursery() as self._running:
                    self._start_waiting()
                    await stopping.wait()
                    self._life.deadline = trio.current_time() + (GRACE_S if self._grace_s is None else self._grace_s)
        finally:
            self._running = None
        for lane in self._lanes:
            if lane.waiting:
                _log.error("hooks not run: hypemand stops", hook=lane.name, hooks=len(lane.waiting))

    def _start_waiting(self) -> None:
        if self._running is None or self._life.cancel_called:
            return
        for lane in self._lanes:
            while (run := lane.take()) is not None:
                self._running.start_soon(self._run, lane, run)

    async def _run(self, lane: _Lane, run: RunFinished) -> None:
        log = _log.bind(hook=lane.name, instance_id=run.instance_id, run_id=run.run_id)

        def give_place() -> None:
            lane.busy -= 1
            self._start_waiting()

        place = _Place(give_place)
        try:
            await self._do(lane, run, place, log)
        except OSError as error:
            log.error("hook can't be started", error=str(error))
        except Exception:
            log.exception("internal error of a hook")
        finally:
            place.give_back()

    async def _do(self, lane: _Lane, run: RunFinished, place: _Place, log: Any) -> None:
        hooks = self._config()
        command = lane.command_of(hooks)
        if not command:
            return  # it was taken out of the config meanwhile
        log = log.bind(command=command[0])
        process = start([word.encode() for word in command], _environment(lane.name, run))
        try:
            async with trio.open_nursery() as streams:
                streams.start_soon(process.feed, encode_run(run))
                streams.start_soon(process.listen)
                await self._attend(process, hooks.timeout, place, log)
                await process.over()  # one that hangs in the kernel keeps its place: more of them would hang, too
                streams.cancel_scope.cancel()
        finally:
            process.close()

    async def _attend(self, process: HookProcess, limit: timedelta, place: _Place, log: Any) -> None:
        """Wait for the end of *process*, and of what it leaves in the background, for *limit* at most; then kill it."""
        began = trio.current_time()
        status, why = None, "hypemand stops"
        try:
            with trio.move_on_after(limit.total_seconds()) as limited:
                status = await process.ended()
                _tell_end(log, process, status, trio.current_time() - began)
                why = await self._outlast(process, place)
            if limited.cancelled_caught:
                why = f"it took longer than {format_duration(limit)}"
        finally:
            left = status is not None and process.has_left_others()
            process.kill()
            with trio.CancelScope(deadline=trio.current_time() + _KILLED_S, shield=True):
                await process.ended()
            if left:
                log.warning("what a hook left running was killed", why=why)
            elif status is None:
                log.error("hook killed", why=why)
                _tell_output(log.error, process)

    async def _outlast(self, process: HookProcess, place: _Place) -> str:
        """Let what *process* has left go on, beside other hooks, until it is over or there is too much of that."""
        if self._left >= MOST_LEFT:
            return "too many hooks have left something running"
        self._left += 1
        try:
            while process.has_left_others():
                place.give_back()
                await trio.sleep(_LOOK_S)
        finally:
            self._left -= 1
        return "it is over"


async def run_hooks(config: HooksConfig, runs: Iterable[RunFinished], within_s: float) -> None:
    """Run the hooks of runs that ended where no daemon serves, and wait for them for so long."""
    hooks = Hooks(lambda: config, within_s)
    for run in runs:
        hooks.heard(RunEnded(run))
    with trio.CancelScope() as at_once:
        at_once.cancel()
        await hooks.serve()


def has_trouble(run: RunFinished) -> bool:
    """Whether *run* is one for ``on_failure``: it made no snapshot, or could not clear away old ones."""
    return run.outcome is not Outcome.SUCCEEDED or run.error is not None


def _tell_end(log: Any, process: HookProcess, status: int, took_s: float) -> None:
    tell = log.error if status else log.info
    facts = {"signal": signal.Signals(-status).name} if status < 0 else {"status": status}
    tell("hook failed" if status else "hook done", **facts, took_s=round(took_s, 3))
    _tell_output(tell, process)


def _tell_output(tell: Callable[..., None], process: HookProcess) -> None:
    for line in process.output.lines():
        tell("hook output", line=line)


def _environment(name: str, run: RunFinished) -> dict[bytes, bytes]:
    """The daemon's own, without what is the daemon's alone, and with what the hook is about."""
    facts = {
        "HYPEMAND_HOOK": name,
        "HYPEMAND_INSTANCE_ID": run.instance_id,
        "HYPEMAND_RUN_ID": run.run_id,
        "HYPEMAND_OUTCOME": str(run.outcome),
        "HYPEMAND_ERROR": None if run.error is None else harmless(run.error)[:_LONGEST_ERROR],
    }
    inherited = {key: value for key, value in os.environ.items() if key not in _NOT_THEIRS | facts.keys()}
    told = {key.encode(): value.encode() for key, value in facts.items() if value is not None}
    return {os.fsencode(key): os.fsencode(value) for key, value in inherited.items()} | told


def command_trouble(command: tuple[str, ...]) -> str | None:
    """Why *command* can't be started as things are; None when nothing is seen to be wrong."""
    path = Path(command[0])
    if not path.exists():
        return f"{path} is not there"
    if not path.is_file() or not os.access(path, os.X_OK):
        return f"{path} can't be executed"
    return None
