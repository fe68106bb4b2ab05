"""A hypervisor that answers at once and makes nothing, so that what is measured is hypemand alone.

hypemand itself is the real command: it finds this backend by an entry point,
as it finds those of others. Snapshots are remembered, and forgotten at the end.
"""

import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import trio
from attrs import define, field, frozen

from hypemand.backends.base import (
    BackendType,
    Capabilities,
    Captured,
    CaptureRequest,
    Preparation,
    Room,
    Settled,
    Status,
    Surroundings,
)
from hypemand.backends.registry import connection_of
from hypemand.core.model import Freezer, InstanceId, InstanceState, RunStarted, Snapshot, SnapshotKind

ROOM_BYTES = 1 << 20


@frozen
class Settings:
    """Config keys.

    Attributes:
        prefix: What the names of its instances begin with; *count* of them, numbered.
        freezes: Who makes a guest stand still: with the engine, guard and leases are in it.
        hang: Its answer to what state an instance is in never comes.
        record: Where to write, at the end, when each capture was called.
    """

    prefix: str
    count: int
    freezes: str = "hypervisor"
    hang: bool = False
    record: Path | None = None


def instance_name(prefix: str, number: int) -> InstanceId:
    """The instance of that number."""
    return InstanceId(f"{prefix}-{number:06}")


@define(eq=False)
class NoopBackend:
    """Follows `Backend`."""

    name: str
    settings: Settings
    state_dir: Path
    _called: list[tuple[str, float]] = field(init=False, factory=list)
    _made: defaultdict[str, list[Snapshot]] = field(init=False, factory=lambda: defaultdict(list))

    @property
    def capabilities(self) -> Capabilities:
        """As configured."""
        return Capabilities(freezes=Freezer(self.settings.freezes), abortable=True, kinds=frozenset(SnapshotKind))

    @property
    def connection(self) -> Mapping[str, Any]:
        """All of it."""
        return connection_of("noop", self.settings)

    async def open(self, *, first_use: bool) -> None:
        """Nothing to open."""
        del first_use
        await trio.lowlevel.checkpoint()

    async def instances(self) -> frozenset[InstanceId]:
        """As many as configured."""
        await trio.lowlevel.checkpoint()
        return frozenset(instance_name(self.settings.prefix, number) for number in range(self.settings.count))

    async def state(self, instance: InstanceId) -> Status:
        """Running; or no answer."""
        del instance
        if self.settings.hang:
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()
        return Status(InstanceState.RUNNING)

    async def prepare(self, instance: InstanceId, kind: SnapshotKind) -> Preparation:
        """Room is asked for, as a real one does."""
        del instance, kind
        await trio.lowlevel.checkpoint()
        return Preparation((Room(self.state_dir, ROOM_BYTES),))

    async def make_ready(self, instance: InstanceId, request: CaptureRequest) -> None:
        """Nothing to do."""
        del instance, request
        await trio.lowlevel.checkpoint()

    async def pause(self, instance: InstanceId, request: CaptureRequest) -> None:
        """Nothing stands still."""
        del instance, request
        await trio.lowlevel.checkpoint()

    async def resume(self, instance: InstanceId) -> None:
        """Nothing did."""
        del instance
        await trio.lowlevel.checkpoint()

    async def capture(self, instance: InstanceId, request: CaptureRequest) -> Captured:
        """Note the time."""
        self._called.append((instance, time.time()))
        await trio.lowlevel.checkpoint()
        return Captured(
            Snapshot(
                id=request.run_id,
                instance_id=instance,
                name=request.name,
                kind=request.kind,
                created_at=request.created_at,
                size_bytes=0,
                tags=request.tags,
            ),
            0.0,
        )

    async def complete(self, captured: Captured) -> Captured:
        """Nothing is left."""
        await trio.lowlevel.checkpoint()
        return captured

    async def publish(self, snapshot: Snapshot) -> None:
        """Remember it."""
        await trio.lowlevel.checkpoint()
        self._made[snapshot.instance_id].append(snapshot)

    async def list_snapshots(self, instance: InstanceId) -> tuple[Snapshot, ...]:
        """Those remembered."""
        await trio.lowlevel.checkpoint()
        return tuple(self._made.get(instance, ()))

    async def delete_snapshot(self, snapshot: Snapshot) -> None:
        """Forget it."""
        await trio.lowlevel.checkpoint()
        self._made[snapshot.instance_id].remove(snapshot)

    async def settle(self, run: RunStarted, *, ours: bool) -> Settled:
        """There is nothing to be settled."""
        del run, ours
        await trio.lowlevel.checkpoint()
        return Settled()

    async def aclose(self) -> None:
        """Write what was noted."""
        if self.settings.record is not None:
            await trio.Path(self.settings.record).write_text(json.dumps(self._called))


def _build(name: str, settings: Settings, surroundings: Surroundings) -> NoopBackend:
    return NoopBackend(name, settings, surroundings.state_dir)


@frozen
class _Type:
    settings: type[Settings] = Settings
    build: Callable[[str, Settings, Surroundings], NoopBackend] = _build


TYPE: BackendType = _Type()
