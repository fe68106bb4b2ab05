"""The smallest backend: a guest is a file, ``<root>/guests/<id>.json``, with its state and its memory in it."""

import json
import shutil
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import trio
from attrs import evolve, frozen

from hypemand.backends import base
from hypemand.backends.catalog import Catalog, Manifest
from hypemand.backends.registry import connection_of
from hypemand.core.model import (
    Freezer,
    InstanceId,
    InstanceState,
    RestoreAction,
    RestoreStep,
    RunStarted,
    Snapshot,
    SnapshotKind,
)

T = TypeVar("T")


@frozen
class Settings:
    """The keys of ``[backends.<name>]`` beside ``type``."""

    root: Path


@frozen
class FolderBackend:
    """Follows `hypemand.backends.base.Backend`: see there for what each method promises."""

    name: str
    settings: Settings

    @property
    def capabilities(self) -> base.Capabilities:
        return base.Capabilities(Freezer.ENGINE, abortable=True, kinds=frozenset({SnapshotKind.STANDBY}))

    @property
    def connection(self) -> Mapping[str, Any]:
        return connection_of("folder", self.settings)

    @property
    def catalog(self) -> Catalog:
        return Catalog(self.settings.root / "snapshots")

    async def open(self, *, first_use: bool) -> None:
        await _in_thread(lambda: self.catalog.open(first_use=first_use))

    async def instances(self) -> frozenset[InstanceId]:
        names = await _in_thread(lambda: [file.stem for file in (self.settings.root / "guests").glob("*.json")])
        if not names:  # no guests at all: rather is the disk not mounted
            raise base.BackendUnavailable(f"nothing in {self.settings.root}/guests: is it mounted?")
        return frozenset(InstanceId(name) for name in names if not name.startswith("."))

    async def state(self, instance: InstanceId) -> base.Status:
        guest = await self._change(instance, lambda guest: guest)
        return base.Status(InstanceState(guest["state"]))

    async def prepare(self, instance: InstanceId, kind: SnapshotKind) -> base.Preparation:
        await self.state(instance)
        needed = await _in_thread(lambda: self._file(instance).stat().st_size)
        names = {snapshot.name for snapshot in await self.list_snapshots(instance)}
        return base.Preparation((base.Room(self.catalog.root, needed),), taken_names=names)

    async def make_ready(self, instance: InstanceId, request: base.CaptureRequest) -> None:
        await trio.lowlevel.checkpoint()  # a copy needs nothing beforehand

    async def pause(self, instance: InstanceId, request: base.CaptureRequest) -> None:
        def paused(guest: dict[str, Any]) -> dict[str, Any]:
            if guest.get("frozen_for") == request.run_id:
                return guest
            if guest["state"] != "Running":
                raise base.InvalidState(f"the guest is {guest['state']}, and not by this run")
            # State and mark in one stroke: after a crash they are both there, or none.
            return {
                **guest,
                "state": "Paused",
                "frozen_for": request.run_id,
                "frozen_at": datetime.now(UTC).isoformat(),
            }

        await self._change(instance, paused)

    async def resume(self, instance: InstanceId) -> None:
        await self._change(instance, lambda guest: _running(guest) if "frozen_for" in guest else guest)

    async def capture(self, instance: InstanceId, request: base.CaptureRequest) -> base.Captured:
        def copy() -> Snapshot:
            partial = self.catalog.begin(instance, request.run_id)  # not listed before it is published
            copied = shutil.copyfile(self._file(instance), partial / "guest.json")
            back = f"cp {self.catalog.home(instance, request.run_id)}/guest.json {self._file(instance)}"
            manifest = Manifest(
                id=request.run_id,
                instance_id=instance,
                name=request.name,
                kind=request.kind,
                tags=request.tags,
                created_at=request.created_at,
                size_bytes=copied.stat().st_size,
                files={copied.name: copied.stat().st_size},
                restore=(RestoreStep(RestoreAction.RUN, back),),
            )
            self.catalog.write_manifest(manifest)
            return manifest.snapshot()

        return base.Captured(await _in_thread(copy, base.CaptureFailed))  # what is partial, `settle` removes

    async def complete(self, captured: base.Captured) -> base.Captured:
        await trio.lowlevel.checkpoint()
        return captured  # all was done while the guest stood still

    async def publish(self, snapshot: Snapshot) -> None:
        await _in_thread(lambda: self.catalog.publish(snapshot.instance_id, snapshot.id))

    async def list_snapshots(self, instance: InstanceId) -> tuple[Snapshot, ...]:
        return tuple(found.snapshot() for found in await _in_thread(lambda: self.catalog.manifests(instance)))

    async def delete_snapshot(self, snapshot: Snapshot) -> None:
        await _in_thread(lambda: self.catalog.delete(snapshot.instance_id, snapshot.id))

    async def settle(self, run: RunStarted, *, ours: bool) -> base.Settled:
        found: dict[str, Any] = {}

        def thawed(guest: dict[str, Any]) -> dict[str, Any]:
            found.update(guest)  # the mark tells whose pause it is, so `ours` is not needed
            return _running(guest) if guest.get("frozen_for") == run.run_id else guest

        def whole_or_gone() -> Manifest | None:
            self.catalog.discard(run.instance_id, run.run_id)
            return self.catalog.find(run.instance_id, run.run_id)

        try:
            await self._change(run.instance_id, thawed)  # the guest comes first
        except base.InstanceNotFound:
            pass  # then there is nothing to resume
        resumed = found.get("frozen_for") == run.run_id
        frozen_s = (datetime.now(UTC) - datetime.fromisoformat(found["frozen_at"])).total_seconds() if resumed else None
        kept = await _in_thread(whole_or_gone)
        return base.Settled(kept.snapshot() if kept else None, resumed=resumed, freeze_s=frozen_s)

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()

    def _file(self, instance: InstanceId) -> Path:
        return self.settings.root / "guests" / f"{instance}.json"

    async def _change(self, instance: InstanceId, change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
        """Read the guest, and write what *change* makes of it. As a thread is not cut short, no pause comes late."""
        if instance not in await self.instances():
            raise base.InstanceNotFound(f"{self.settings.root}/guests has no {instance}")

        def work() -> dict[str, Any]:
            before: dict[str, Any] = json.loads(self._file(instance).read_text())
            if (after := change(before)) != before:
                new = self._file(instance).with_suffix(".new")
                new.write_text(json.dumps(after))
                new.replace(self._file(instance))
            return after

        return await _in_thread(work)


def _running(guest: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in guest.items() if not key.startswith("frozen_")} | {"state": "Running"}


async def _in_thread(work: Callable[[], T], error: type[base.BackendError] = base.BackendUnavailable) -> T:
    try:
        return await trio.to_thread.run_sync(work)
    except OSError as failed:
        raise error(f"{failed.filename}: {failed.strerror}") from failed


@frozen
class _Type:
    settings: type[Settings] = Settings

    def build(self, name: str, settings: Settings, surroundings: base.Surroundings) -> FolderBackend:
        return FolderBackend(name, evolve(settings, root=settings.root.absolute()))


TYPE = _Type()
