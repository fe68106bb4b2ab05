"""Guests to be captured by the bare calls of their hypervisors and by a daemon; each tells how long it stood still."""

import os
import shutil
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import ClassVar

import trio
from attrs import define, field

from benchmarks.freeze_ways import Bare
from benchmarks.ruler import RefusedError, Stage, dial
from hypemand.backends.copying import copy_file
from hypemand.backends.embedded_guests import DISK, MEMORY, STATE_FILE, paused, read_state, resumed, write_state
from tests.qemu_guest import running_guest

Freeze = Callable[[], Awaitable[float]]
"""For how many seconds the guest has stood still since it is watched."""


class Subject(ABC):
    """A guest of one backend.

    Attributes:
        settings: The backend's table in the config.
        who: Who makes it stand still.
    """

    name: ClassVar[str]
    who: ClassVar[str]
    instance: ClassVar[str]
    settings: str

    @abstractmethod
    async def bare(self, tag: str) -> None:
        """Capture it with as few calls as the hypervisor needs for what hypemand captures, and nothing beside them."""

    @abstractmethod
    def watched(self) -> AbstractAsyncContextManager[Freeze]:
        """Have it watched, by whatever sees best when it stands still."""

    async def tidy(self) -> None:
        """Remove what `bare` has made, where that is something."""
        await trio.lowlevel.checkpoint()


@define(eq=False)
class EmbeddedSubject(Subject):
    """Directories. A thread looks at the state file all the time: it sees a freeze to some tenths of a millisecond."""

    name = "embedded"
    who = "engine"
    instance = "embedded-1"
    directory: Path
    settings: str = field(init=False)

    @classmethod
    @asynccontextmanager
    async def running(cls, directory: Path) -> AsyncIterator[Subject]:
        """A guest; the daemon makes its directories."""
        yield cls(directory / "embedded")

    @settings.default
    def _settings(self) -> str:
        guest = f'{self.instance} = {{ memory = "1MiB", disk = "4MiB" }}'
        return f'type = "embedded"\nroot = "{self.directory}"\ninstances = {{ {guest} }}\n'

    @property
    def _home(self) -> Path:
        return self.directory / "instances" / self.instance

    @property
    def _copies(self) -> Path:
        return self.directory / "bare"

    async def bare(self, tag: str) -> None:
        """Two writes of the state, with the copies in between."""
        del tag
        self._copies.mkdir()
        await trio.to_thread.run_sync(lambda: write_state(self._home, paused(read_state(self._home / STATE_FILE))))
        for name in (MEMORY, DISK):
            await copy_file(self._home / name, self._copies / name)
        await trio.to_thread.run_sync(lambda: write_state(self._home, resumed(read_state(self._home / STATE_FILE))))

    async def tidy(self) -> None:
        """Remove the copies."""
        shutil.rmtree(self._copies, ignore_errors=True)

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[Freeze]:
        """Look all the time."""
        changes: list[float] = []
        over = threading.Event()
        path = str(self._home / STATE_FILE)

        def look() -> None:
            seen = os.stat(path).st_ino  # noqa: PTH116 - as little work as can be
            while not over.wait(0.0001):
                there = os.stat(path).st_ino  # noqa: PTH116
                if there != seen:
                    seen = there
                    changes.append(time.perf_counter())

        watcher = threading.Thread(target=look)
        watcher.start()

        async def freeze() -> float:
            await trio.sleep(0.01)
            if len(changes) != 2:
                raise RefusedError(f"the state changed {len(changes)} times, and not twice")
            return changes[1] - changes[0]

        try:
            yield freeze
        finally:
            over.set()
            watcher.join()


@define(eq=False)
class StagedSubject(Subject):
    """A QEMU that stops its guest itself, by its own STOP and RESUME events."""

    who = "hypervisor"
    settings: str
    stage: Stage

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[Freeze]:
        """Take the events of a monitor that nobody else uses. Those of deletions come after that of the save."""
        first = len(self.stage.monitor.events)

        async def freeze() -> float:
            return (await self.stage.standstills_since(first))[0]

        yield freeze


@define(eq=False)
class QemuSubject(StagedSubject):
    """A QEMU in software emulation."""

    name = "qemu"
    instance = "qemu-1"
    _bare: Bare

    @classmethod
    @asynccontextmanager
    async def running(cls, directory: Path) -> AsyncIterator[Subject]:
        """A guest, until the end of the block."""
        async with (
            running_guest(directory, instance_id=cls.instance) as guest,
            dial(guest.test_socket) as monitor,
        ):
            stage = Stage(monitor, guest.log, guest.process.pid)
            blocks = await monitor.ask("query-block")
            settings = (
                f'type = "qemu"\nsocket = "{guest.socket_template}"\nsnapshot_dir = "{directory / "catalog-qemu"}"\n'
            )
            yield cls(settings, stage, Bare(stage, guest.socket, blocks[0]["inserted"]["node-name"]))

    async def bare(self, tag: str) -> None:
        """One `snapshot-save`."""
        await self._bare.take(tag)
        await self._bare.remove()


SUBJECTS: Sequence[Callable[[Path], AbstractAsyncContextManager[Subject]]] = (
    EmbeddedSubject.running,
    QemuSubject.running,
)
"""From an empty directory to a subject, until the end of the block."""
