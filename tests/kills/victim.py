"""The real daemon, which comes to harm at one place: ``KILL_AT=... python -m tests.kills.victim run -c CONFIG``.
Or the real `recover`.

The product knows nothing of it: its seams are wrapped here, in this process alone.
"""

import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import trio
from attrs import define, field

from hypemand import cli
from hypemand.backends.embedded import EmbeddedBackend
from hypemand.backends.qemu.backend import QemuBackend
from hypemand.core.model import RunStarted
from hypemand.state.runlog import RunLog
from hypemand.state.store import Store
from tests.kills.places import GUEST, How, Note, Phase, Trigger

T = TypeVar("T")
BACKENDS: tuple[type[Any], ...] = (EmbeddedBackend, QemuBackend)
SEAMS = {
    "prepare": "prepare",
    "make_ready": "make ready",
    "pause": "pause",
    "capture": "capture",
    "resume": "resume",
    "complete": "complete",
    "publish": "publish",
    "list_snapshots": "list",
    "delete_snapshot": "delete",
    "settle": "settle",
}
"""Methods of a backend, and the steps that they are; `state` is several."""


@define
class Trap:
    """Springs once, at its place."""

    trigger: Trigger
    looks: int = 0
    claimed: bool = False
    recorded: bool = False
    sprung: bool = False
    _lock: threading.Lock = field(factory=threading.Lock)

    async def around(self, step: str, call: Callable[[], Awaitable[T]]) -> T:
        """Do *call*, which is *step* of the guest's run."""
        if self.sprung or step != self.trigger.step:
            return await call()
        token = trio.lowlevel.current_trio_token()
        if self.trigger.phase is Phase.BEFORE:
            self.spring(token)
            return await call()
        if self.trigger.phase is Phase.IN:
            threading.Thread(target=self._later, args=(token,), daemon=True).start()
        try:
            return await call()
        finally:
            self.spring(token, late=self.trigger.phase is Phase.IN)

    def _later(self, token: trio.lowlevel.TrioToken) -> None:
        time.sleep(self.trigger.after_s)
        self.spring(token, in_loop=False)

    def spring(self, token: trio.lowlevel.TrioToken, *, in_loop: bool = True, late: bool = False) -> None:
        """Note it, and come to harm. *in_loop*: called by the event loop's own thread."""
        with self._lock:
            if self.sprung:
                return
            self.sprung = True
            Note(os.getpid(), time.monotonic(), late, _children()).tell(self.trigger.tell)
            if self.trigger.how is How.BLOCKED:
                if in_loop:
                    time.sleep(self.trigger.blocks_s)
            else:
                os.kill(os.getpid(), signal.SIGKILL if self.trigger.how is How.KILLED else signal.SIGSTOP)
        if self.trigger.how is How.BLOCKED and not in_loop:
            token.run_sync_soon(time.sleep, self.trigger.blocks_s)

    def step_of_look(self) -> str:
        """Which step a question for the guest's state is."""
        self.looks += not self.claimed
        return "look" if self.claimed else {1: "inspect"}.get(self.looks, "")  # more only where a slot is waited for


def _children() -> tuple[int, ...]:
    found: list[int] = []
    for path in Path("/proc/self/task").glob("*/children"):
        found += map(int, path.read_text().split())
    return tuple(found)


def wrap_backend(backend: type[Any], trap: Trap) -> None:
    """Have *trap* around the methods of *backend* that concern the guest."""

    def wrapped(method: Callable[..., Awaitable[Any]], step: str | None) -> Callable[..., Awaitable[Any]]:
        async def around(self: Any, subject: Any, *rest: Any, **more: Any) -> Any:
            of = getattr(getattr(subject, "snapshot", subject), "instance_id", subject)
            if of != GUEST:
                return await method(self, subject, *rest, **more)
            return await trap.around(step or trap.step_of_look(), lambda: method(self, subject, *rest, **more))

        return around

    for name, step in SEAMS.items():
        setattr(backend, name, wrapped(getattr(backend, name), step))
    backend.state = wrapped(backend.state, None)


def wrap_records(trap: Trap) -> None:
    """Have *trap* around what is written down of the guest's run."""
    append, put = RunLog.append, Store.put

    async def append_around(self: RunLog, line: Any) -> None:
        if line.instance_id != GUEST:
            return await append(self, line)
        if isinstance(line, RunStarted):
            await trap.around("claim", lambda: append(self, line))
            trap.claimed = True
        else:
            await trap.around("record" if trap.claimed else "settled", lambda: append(self, line))
            trap.recorded = True
        return None

    async def put_around(self: Store, schedule: Any) -> None:
        if schedule.instance_id != GUEST:
            return await put(self, schedule)
        step = ("file" if trap.recorded else "keep") if trap.claimed else "refile"
        return await trap.around(step, lambda: put(self, schedule))

    RunLog.append = append_around  # type: ignore[method-assign]
    Store.put = put_around  # type: ignore[method-assign]


def main() -> None:
    """Run the command line with the trap set."""
    trap = Trap(Trigger.found())
    os.set_inheritable(trap.trigger.tell, False)
    for backend in BACKENDS:
        wrap_backend(backend, trap)
    wrap_records(trap)
    cli.main()


if __name__ == "__main__":
    main()
