"""Guests of Cloud Hypervisor and Firecracker, to be captured by the bare calls and by a daemon.

The VMM is the one that stands in for both in the tests, and tells when its guest stood still.
"""

import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path

import trio
from attrs import define

from benchmarks.engine_subjects import Freeze, Subject
from benchmarks.ruler import RefusedError
from hypemand.backends.copying import copy_file
from tests.vmm_guest import CLOUD_HYPERVISOR, FIRECRACKER, Guest, running_guest

MEMORY, DISK = 4 << 20, 16 << 20


@define(eq=False)
class VmmSubject(Subject):
    """By the times that the VMM itself writes down."""

    name: str  # type: ignore[misc] # of two kinds
    instance: str  # type: ignore[misc]
    settings: str
    directory: Path
    _guest: Guest
    who = "engine"

    async def bare(self, tag: str) -> None:
        """Four calls, with a copy of the disk before the last."""
        del tag
        saved = self.directory / "bare"
        saved.mkdir()
        if self._guest.kind == CLOUD_HYPERVISOR:
            await self._ask("PUT", "/api/v1/vm.pause")
            await self._ask("PUT", "/api/v1/vm.snapshot", {"destination_url": f"file://{saved}"})
        else:
            await self._ask("PATCH", "/vm", {"state": "Paused"})
            files = {"snapshot_path": f"{saved}/state", "mem_file_path": f"{saved}/memory"}
            await self._ask("PUT", "/snapshot/create", {"snapshot_type": "Full", **files})
        await copy_file(self._guest.disks[0], saved / "disk")
        if self._guest.kind == CLOUD_HYPERVISOR:
            await self._ask("PUT", "/api/v1/vm.resume")
        else:
            await self._ask("PATCH", "/vm", {"state": "Resumed"})

    async def _ask(self, method: str, path: str, body: object = None) -> None:
        status, said = await trio.to_thread.run_sync(self._guest.ask, method, path, body)
        if status != 204:
            raise RefusedError(f"{method} {path}: {status} {said}")

    async def tidy(self) -> None:
        """Remove the copies."""
        shutil.rmtree(self.directory / "bare", ignore_errors=True)
        await trio.lowlevel.checkpoint()

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[Freeze]:
        """Take what it writes down from here on."""
        log = self._guest.home / "standstills.log"
        before = log.read_text() if log.exists() else ""

        async def freeze() -> float:
            await trio.lowlevel.checkpoint()
            stood = [float(line) for line in log.read_text().removeprefix(before).splitlines()]
            if len(stood) != 1:
                raise RefusedError(f"the guest stood still {len(stood)} times, and not once")
            return stood[0]

        yield freeze


@asynccontextmanager
async def _running(kind: str, directory: Path) -> AsyncIterator[Subject]:
    home, instance = directory / kind, f"{kind}-1"
    async with running_guest(kind, home, instance_id=instance, memory=MEMORY, tick_s=0.01) as guest:
        with guest.disks[0].open("r+b") as disk:
            disk.seek(8)
            disk.write(b"D" * (DISK - 8))
        template = guest.socket.with_name("{instance}.sock")
        settings = f'type = "{kind}"\nsocket = "{template}"\nsnapshot_dir = "{home / "catalog"}"\n'
        yield VmmSubject(kind, instance, settings, home, guest)


VMM_SUBJECTS: tuple[Callable[[Path], AbstractAsyncContextManager[Subject]], ...] = (
    partial(_running, CLOUD_HYPERVISOR),
    partial(_running, FIRECRACKER),
)
"""From an empty directory to a subject, until the end of the block."""
