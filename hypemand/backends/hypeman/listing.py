"""Which of a server's snapshots are hypemand's to list and to delete."""

from collections.abc import Collection, Mapping, Sequence

from attrs import frozen

from hypemand.backends.base import BackendError, BackendUnavailable, InstanceNotFound
from hypemand.backends.catalog import Manifest
from hypemand.backends.hypeman.documents import RUN_TAG, Kept, all_kept_of, is_id
from hypemand.backends.hypeman.drafts import Drafts, server_id, way_back
from hypemand.backends.hypeman.guests import Guests
from hypemand.backends.hypeman.server import Server
from hypemand.core.model import InstanceId, Snapshot
from hypemand.core.naming import is_scheduled

OWN_SCHEDULE = (
    "the Hypeman server has a schedule of its own for {}: it takes snapshots, too, and its retention deletes"
    " hypemand's; have it taken over: hypemand import-hypeman --take-over"
)


class NotOursError(BackendError):
    """The snapshot on the server is not what the catalog says it is."""


class NoSuchPathError(BackendUnavailable):
    """The server, or whoever stands before it, knows nothing of what it was asked for."""


@frozen(eq=False)
class Listing:
    """Snapshots that hypemand made, by the catalog; and those that the server's own schedules have left behind.

    The latter count once the server has no schedule for their guest any more:
    until then they are its business. So are those of a guest that is gone, for
    then the server does not tell whether it has.
    """

    server: Server
    drafts: Drafts
    guests: Guests

    async def on_server(self, instance: InstanceId) -> list[Kept]:
        """Every snapshot that the server has of *instance*, whoever made it."""
        answer = await self.server.ask("GET", "/snapshots", source_instance_id=instance)
        if answer.status != 200:
            raise BackendUnavailable(f"{self.server.settings.url}: {answer}")
        return [kept for kept in all_kept_of(answer.document) if kept.instance_id == instance]

    async def of_run(self, instance: InstanceId, run_id: str) -> Kept | None:
        """What the server has that *run_id* has made."""
        return next((kept for kept in await self.on_server(instance) if kept.run_id == run_id), None)

    async def by_id(self, instance: InstanceId) -> list[tuple[Snapshot, Kept]]:
        """What is hypemand's, each with what the server has of it; oldest first."""
        there = {kept.id: kept for kept in await self.on_server(instance) if is_id(kept.id)}
        runs = {kept.run_id: kept for kept in there.values() if kept.run_id is not None}
        drafts, manifests = await self.drafts.known(instance, runs)
        ours = [
            (manifest.snapshot(), there[found]) for manifest in manifests if (found := server_id(manifest)) in there
        ]
        others = _others(instance, there.values(), manifests, drafts)
        if any(kept.run_id is None for kept in others) and await self._are_the_servers(instance):
            others = [kept for kept in others if kept.run_id is not None]
        taken = {manifest.id for manifest in manifests}
        ours += [(self._adopted(instance, kept, taken), kept) for kept in others]
        return sorted(ours, key=lambda pair: (pair[0].created_at, pair[0].id))

    async def _are_the_servers(self, instance: InstanceId) -> bool:
        try:
            await self.guests.look(instance)
        except InstanceNotFound:
            return True
        return await self.has_own_schedule(instance)

    async def schedule_warning(self, instance: InstanceId) -> str:
        """What to say of a schedule of the server's own, as far as it tells: a capture needs none of this."""
        try:
            return OWN_SCHEDULE.format(instance) if await self.has_own_schedule(instance) else ""
        except NoSuchPathError:
            return ""  # it has no schedules at all
        except BackendUnavailable as error:
            return f"whether the Hypeman server has a schedule of its own for {instance} can't be told: {error}"

    async def has_own_schedule(self, instance: InstanceId) -> bool:
        """Whether the server itself takes snapshots of *instance*, and prunes all that are tagged as scheduled."""
        answer = await self.server.ask("GET", f"/instances/{instance}/snapshot-schedule")
        if answer.status == 404 and not answer.not_found:
            raise NoSuchPathError(f"{self.server.settings.url}: {answer}")
        if answer.status != 200 and not answer.not_found:
            raise BackendUnavailable(f"{self.server.settings.url}: {answer}")
        return answer.status == 200

    def _adopted(self, instance: InstanceId, kept: Kept, taken: Collection[str]) -> Snapshot:
        assert kept.kind is not None
        assert kept.created_at is not None
        run_id = kept.run_id
        return Snapshot(
            id=run_id if run_id is not None and run_id not in taken else kept.id,
            instance_id=instance,
            name=kept.name,
            kind=kept.kind,
            created_at=kept.created_at,
            size_bytes=kept.size_bytes,
            tags=_without_run(kept.tags),
            restore=way_back(kept, self.server.settings),
        )

    async def delete(self, snapshot: Snapshot) -> None:
        """Delete *snapshot* on the server, then its manifest. Already gone: no error.

        Raises:
            BackendError: The server refuses, or has something else by that id.
        """
        catalog, instance = self.drafts.catalog, snapshot.instance_id
        manifest = await self.drafts.do(catalog.find, instance, snapshot.id)
        if manifest is not None:
            found = server_id(manifest)
            there = {kept.id: kept for kept in await self.on_server(instance)}
            doomed = [there[found]] if found in there else []
        else:
            doomed = [kept for listed, kept in await self.by_id(instance) if listed.id == snapshot.id]
        for kept in doomed:
            if not is_scheduled(instance, kept.tags):
                raise NotOursError(f"snapshot {kept.id} on the server is not tagged as a schedule's: not deleted")
            answer = await self.server.ask("DELETE", f"/snapshots/{kept.id}")
            if answer.status != 204 and not answer.not_found:
                raise BackendUnavailable(f"{self.server.settings.url}: {answer}")
        await self.drafts.do(catalog.delete, instance, snapshot.id)


def _others(
    instance: InstanceId, there: Collection[Kept], manifests: Sequence[Manifest], drafts: Collection[str]
) -> list[Kept]:
    """Scheduled snapshots that the catalog does not know, nor is about to."""
    known = {server_id(manifest) for manifest in manifests}
    return [
        kept
        for kept in there
        if kept.id not in known
        and kept.run_id not in drafts
        and is_scheduled(instance, kept.tags)
        and kept.kind is not None
        and kept.created_at is not None
    ]


def _without_run(tags: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in tags.items() if key != RUN_TAG}
