"""The ways of taking a snapshot of one QMP guest: by hand, and through hypemand's qemu backend."""

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import trio
from attrs import define, field, frozen

from benchmarks.ruler import NotMeasuredError, Stage, Way, dial
from hypemand.backends import registry
from hypemand.backends.base import Backend, Captured, CaptureRequest, Surroundings
from hypemand.core.model import Freezer, InstanceId, SnapshotKind
from tests.qemu_guest import Guest

Mode = Literal["internal", "background"]


@define
class Bare:
    """`snapshot-save` and `snapshot-delete` sent by hand: what QEMU itself takes, and the measure for the others.

    Attributes:
        socket: The monitor that hypemand would use.
        disk: QEMU's name for the node of the guest's only disk.
    """

    stage: Stage
    socket: Path
    disk: str
    _tag: str = ""

    async def take(self, tag: str) -> None:
        """Save memory and disk."""
        self._tag = tag
        arguments = {"tag": tag, "vmstate": self.disk, "devices": [self.disk]}
        async with dial(self.socket) as monitor:
            await monitor.run_job("snapshot-save", f"save-{tag}", arguments)

    async def remove(self) -> None:
        """Delete it from the disk."""
        async with dial(self.socket) as monitor:
            await monitor.run_job("snapshot-delete", f"delete-{self._tag}", {"tag": self._tag, "devices": [self.disk]})


@define
class Hypemand:
    """The qemu backend, called as a run of hypemand calls it."""

    stage: Stage
    backend: Backend
    instance: InstanceId
    mode: Mode
    _captured: Captured | None = field(default=None, init=False)

    async def take(self, tag: str) -> float | None:
        """From `prepare` to `publish`."""
        prepared = await self.backend.prepare(self.instance, SnapshotKind.STANDBY)
        freezes = prepared.freezes or self.backend.capabilities.freezes
        # In this mode, QEMU freezes by itself only where the backend falls back to the other.
        if self.mode == "background" and freezes is Freezer.HYPERVISOR:
            raise NotMeasuredError(f"falls back to internal here: {'; '.join(prepared.warnings) or 'no reason given'}")
        request = CaptureRequest(
            run_id=f"r{secrets.token_hex(12)[1:]}",  # as hypemand makes them
            name=tag,
            kind=SnapshotKind.STANDBY,
            tags={},
            created_at=datetime.now(UTC),
            freezes=freezes,
        )
        self._captured = await self.backend.complete(await self._capture(request))
        await self.backend.publish(self._captured.snapshot)
        return self._captured.freeze_s

    async def _capture(self, request: CaptureRequest) -> Captured:
        if request.freezes is not Freezer.ENGINE:
            return await self.backend.capture(self.instance, request)
        try:
            await self.backend.pause(self.instance, request)
            return await self.backend.capture(self.instance, request)
        finally:
            with trio.CancelScope(shield=True):
                await self.backend.resume(self.instance)

    async def remove(self) -> None:
        """Delete it as pruning does."""
        assert self._captured is not None
        await self.backend.delete_snapshot(self._captured.snapshot)


@frozen
class QmpGuest:
    """The one guest that all these ways share."""

    guest: Guest
    stage: Stage
    directory: Path

    @asynccontextmanager
    async def bare(self) -> AsyncIterator[Way]:
        """The way by hand."""
        blocks = await self.stage.monitor.ask("query-block")
        yield Bare(self.stage, self.guest.socket, blocks[0]["inserted"]["node-name"])

    @asynccontextmanager
    async def hypemand(self, mode: Mode) -> AsyncIterator[Way]:
        """The way through the backend."""
        connection = {
            "type": "qemu",
            "socket": str(self.guest.socket_template),
            "snapshot_dir": str(self.directory / f"catalog-{mode}"),
            "mode": mode,
        }
        backend = registry.connect("vms", connection, Surroundings(self.directory / f"state-{mode}"))
        try:
            await backend.open(first_use=True)
            yield Hypemand(self.stage, backend, self.guest.instance_id, mode)
        finally:
            with trio.CancelScope(shield=True):
                await backend.aclose()
