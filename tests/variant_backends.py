"""Variants of the example backend: one without a mark, and others, each broken in a way that looks right at first."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from attrs import evolve, frozen
from hypemand_folder import FolderBackend, Settings

from hypemand.backends import base
from hypemand.core.model import InstanceId, InstanceState, RunStarted, Snapshot, SnapshotKind


class Variant(FolderBackend):
    """Known to the registry by the name of its class."""

    @property
    def connection(self) -> Mapping[str, Any]:
        return {**super().connection, "type": type(self).__name__}


class GoesByOursAlone(Variant):
    """As for a hypervisor that has no place for a mark. Not broken."""

    async def pause(self, instance: InstanceId, request: base.CaptureRequest) -> None:
        await self._change(instance, lambda guest: {**guest, "state": "Paused"})

    async def resume(self, instance: InstanceId) -> None:
        await self._change(instance, lambda guest: {**guest, "state": "Running"})

    async def settle(self, run: RunStarted, *, ours: bool) -> base.Settled:
        resumed = ours and (await self.state(run.instance_id)).state is InstanceState.PAUSED
        if resumed:
            await self.resume(run.instance_id)
        return evolve(await super().settle(run, ours=ours), resumed=resumed)


class ResumesNothing(Variant):
    async def resume(self, instance: InstanceId) -> None:
        pass


class ResumesAnyPause(Variant):
    async def resume(self, instance: InstanceId) -> None:
        await self._change(instance, lambda guest: {**guest, "state": "Running"})


class TakesAnyPauseForItsOwn(Variant):
    async def pause(self, instance: InstanceId, request: base.CaptureRequest) -> None:
        mark = {"state": "Paused", "frozen_for": request.run_id, "frozen_at": "2026-01-01T00:00:00+00:00"}
        await self._change(instance, lambda guest: guest | mark)


class RemembersItsPauseInMemoryAlone(Variant):
    """Right in one process, and the next one finds a pause that it does not know."""

    ours: ClassVar[set[str]] = set()

    async def pause(self, instance: InstanceId, request: base.CaptureRequest) -> None:
        if str(self.settings.root) not in self.ours:
            await super().pause(instance, request)
            await self._change(instance, lambda guest: {k: v for k, v in guest.items() if k != "frozen_for"})
        self.ours.add(str(self.settings.root))

    async def resume(self, instance: InstanceId) -> None:
        if str(self.settings.root) in self.ours:
            self.ours.discard(str(self.settings.root))
            await self._change(instance, lambda guest: {**guest, "state": "Running"})

    async def settle(self, run: RunStarted, *, ours: bool) -> base.Settled:
        found = str(self.settings.root) in self.ours
        await self.resume(run.instance_id)
        return evolve(await super().settle(run, ours=ours), resumed=found)


class SettlesWhateverStandsStill(Variant):
    async def settle(self, run: RunStarted, *, ours: bool) -> base.Settled:
        await self._change(run.instance_id, lambda guest: {**guest, "state": "Running"})
        return await super().settle(run, ours=ours)


class SettlesNoGuest(Variant):
    async def settle(self, run: RunStarted, *, ours: bool) -> base.Settled:
        kept = self.catalog.find(run.instance_id, run.run_id)
        self.catalog.discard(run.instance_id, run.run_id)
        return base.Settled(kept.snapshot() if kept else None)


class SettlesNoPartial(Variant):
    async def settle(self, run: RunStarted, *, ours: bool) -> base.Settled:
        await self.resume(run.instance_id)
        kept = self.catalog.find(run.instance_id, run.run_id)
        return base.Settled(kept.snapshot() if kept else None)


class SettlesByDeleting(Variant):
    async def settle(self, run: RunStarted, *, ours: bool) -> base.Settled:
        settled = await super().settle(run, ours=ours)
        self.catalog.delete(run.instance_id, run.run_id)
        return evolve(settled, snapshot=None)


class IsStoppedWhenUnreachable(Variant):
    async def state(self, instance: InstanceId) -> base.Status:
        try:
            return await super().state(instance)
        except base.BackendUnavailable:
            return base.Status(InstanceState.STOPPED)


class IsGoneWhenUnreachable(Variant):
    async def state(self, instance: InstanceId) -> base.Status:
        try:
            return await super().state(instance)
        except base.BackendUnavailable as error:
            raise base.InstanceNotFound(str(error)) from error


class HasNoSnapshotsWhenUnreachable(Variant):
    async def list_snapshots(self, instance: InstanceId) -> tuple[Snapshot, ...]:
        try:
            return await super().list_snapshots(instance)
        except base.BackendUnavailable:
            return ()


class MakesItsFolderAnew(Variant):
    async def open(self, *, first_use: bool) -> None:
        await super().open(first_use=True)


class CapturesAndPublishes(Variant):
    async def capture(self, instance: InstanceId, request: base.CaptureRequest) -> base.Captured:
        captured = await super().capture(instance, request)
        await super().publish(captured.snapshot)
        return captured


class CompletesAndPublishes(Variant):
    async def complete(self, captured: base.Captured) -> base.Captured:
        await super().publish(captured.snapshot)
        return captured


class PublishesOnce(Variant):
    async def publish(self, snapshot: Snapshot) -> None:
        if self.catalog.find(snapshot.instance_id, snapshot.id):
            raise base.BackendUnavailable("there is one already")
        await super().publish(snapshot)


class DeletesOnce(Variant):
    async def delete_snapshot(self, snapshot: Snapshot) -> None:
        if not self.catalog.find(snapshot.instance_id, snapshot.id):
            raise base.CaptureFailed("there is none")
        await super().delete_snapshot(snapshot)


class DeletesAll(Variant):
    async def delete_snapshot(self, snapshot: Snapshot) -> None:
        for other in await self.list_snapshots(snapshot.instance_id):
            await super().delete_snapshot(other)


class ListsNewestFirst(Variant):
    async def list_snapshots(self, instance: InstanceId) -> tuple[Snapshot, ...]:
        return (await super().list_snapshots(instance))[::-1]


class KnowsNoTakenNames(Variant):
    async def prepare(self, instance: InstanceId, kind: SnapshotKind) -> base.Preparation:
        return evolve(await super().prepare(instance, kind), taken_names=())


class NamesSnapshotsByItself(Variant):
    async def capture(self, instance: InstanceId, request: base.CaptureRequest) -> base.Captured:
        return await super().capture(instance, evolve(request, run_id=f"mine-{request.run_id}"))


class ConnectsToAnother(Variant):
    @property
    def connection(self) -> Mapping[str, Any]:
        return {**super().connection, "root": str(self.settings.root / "other")}


@frozen
class _Type:
    build: Callable[[str, Settings, base.Surroundings], FolderBackend]
    settings: type[Settings] = Settings


def __getattr__(name: str) -> Any:
    """The backend type of a class: ``TYPE_<class>``."""
    if name.startswith("TYPE_"):
        backend = globals()[name.removeprefix("TYPE_")]
        return _Type(lambda name, settings, _: backend(name, settings))
    raise AttributeError(name)
