"""The hypeman backend: a Hypeman server captures its guests itself, and keeps the snapshots.

What it has no place for is in a catalog: under which run's id a snapshot is
listed, and whether a guest may be down because it was asked for one.
"""

from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import structlog
import trio
from attrs import Factory, evolve, field, frozen

from hypemand.backends.base import (
    BackendError,
    BackendUnavailable,
    Capabilities,
    Captured,
    CaptureFailed,
    CaptureRequest,
    InstanceNotFound,
    InvalidState,
    Preparation,
    Settled,
    Status,
    Surroundings,
    Unsupported,
)
from hypemand.backends.catalog import Catalog, Manifest
from hypemand.backends.hypeman import drafts as writing
from hypemand.backends.hypeman.documents import RUN_TAG, Guest, Kept, StrangeAnswerError, guests_of, kept_of
from hypemand.backends.hypeman.drafts import Drafts
from hypemand.backends.hypeman.guests import ON_ITS_WAY_S, Guests, NotRestoredError
from hypemand.backends.hypeman.listing import Listing
from hypemand.backends.hypeman.server import Answer, NotSentError, Server
from hypemand.backends.hypeman.settings import HypemanSettings
from hypemand.backends.hypeman.uncut import Uncut
from hypemand.backends.ids import checked
from hypemand.backends.registry import connection_of
from hypemand.core.errors import RuleBroken
from hypemand.core.model import Freezer, InstanceId, InstanceState, RunStarted, Snapshot, SnapshotKind
from hypemand.core.naming import TAGS_MAX, check_instance_id, scheduled_tags

_log = structlog.get_logger()
_OWN_TAGS = len(scheduled_tags(InstanceId("any"), {})) + 1
_NOT_SUPPORTED = "not_supported"
_EXPECTED = {
    SnapshotKind.STANDBY: (InstanceState.RUNNING, InstanceState.STANDBY),
    SnapshotKind.STOPPED: (InstanceState.STOPPED,),
}


@frozen(eq=False)
class HypemanBackend:
    """Guests of a Hypeman server. See `hypemand.backends.base.Backend` for every method's promise."""

    name: str
    settings: HypemanSettings
    catalog: Catalog
    server: Server = field(init=False, default=Factory(lambda self: Server(self.settings), takes_self=True))
    _uncut: Uncut = field(init=False, factory=Uncut)
    _drafts: Drafts = field(init=False, default=Factory(lambda self: Drafts(self.catalog), takes_self=True))
    _guests: Guests = field(init=False, default=Factory(lambda self: Guests(self.server, self._uncut), takes_self=True))
    _listing: Listing = field(
        init=False, default=Factory(lambda self: Listing(self.server, self._drafts, self._guests), takes_self=True)
    )
    _asked: dict[str, Manifest | None] = field(init=False, factory=dict)
    """By run: what this process has asked for, should the catalog be lost meanwhile; None: nothing yet."""
    _brought_back: dict[str, float | None] = field(init=False, factory=dict)

    @property
    def capabilities(self) -> Capabilities:
        """The server pauses and resumes by itself, and its captures can't be ended."""
        return Capabilities(Freezer.HYPERVISOR, abortable=False, kinds=frozenset(SnapshotKind))

    @property
    def connection(self) -> Mapping[str, Any]:
        """Settings with absolute paths; where the token is, and never the token."""
        return connection_of("hypeman", self.settings)

    async def open(self, *, first_use: bool) -> None:
        """Open the catalog."""
        await self._drafts.do(partial(self.catalog.open, first_use=first_use))

    async def instances(self) -> frozenset[InstanceId]:
        """Ids of the server's instances; it says so where it has none."""
        answer = await self.server.ask("GET", "/instances")
        if answer.status != 200:
            raise BackendUnavailable(f"{self.settings.url}: {answer}")
        found = set()
        for guest in guests_of(answer.document, _pass_over):
            with suppress(RuleBroken):
                found.add(check_instance_id(guest.id))
        return frozenset(found)

    async def state(self, instance: InstanceId) -> Status:
        """The state, in the server's own words."""
        return (await self._guests.look(instance)).status

    async def prepare(self, instance: InstanceId, kind: SnapshotKind) -> Preparation:  # noqa: ARG002 - both alike
        """Which names are taken. Where the snapshots go, and how much room there is, the server alone knows."""
        await self._drafts.do(self.catalog.check)
        there = await self._listing.on_server(checked(instance))
        await self._listing.forget_gone(instance, there)
        warning = await self._listing.schedule_warning(instance)
        return Preparation(taken_names=frozenset(kept.name for kept in there), warnings=(warning,) if warning else ())

    async def make_ready(self, instance: InstanceId, request: CaptureRequest) -> None:
        """Nothing has to be made ready, but that it is known to have been asked for nothing yet."""
        del instance
        self._asked[request.run_id] = None
        await trio.lowlevel.checkpoint()

    async def pause(self, instance: InstanceId, request: CaptureRequest) -> None:
        """Refuse: Hypeman's API has no pause; the server pauses by itself, within `capture`."""
        del request
        state = (await self.state(instance)).state
        raise InvalidState(f"a Hypeman server can't be asked to pause a guest; it is {state}")

    async def resume(self, instance: InstanceId) -> None:
        """Leave the guest as it is: a pause outside of a capture is somebody else's."""
        await self.state(instance)

    async def capture(self, instance: InstanceId, request: CaptureRequest) -> Captured:
        """Have the server make the snapshot. Cancelled, it is made nevertheless, for `settle` to find."""
        tags = {**request.tags, RUN_TAG: request.run_id}
        if len(tags) > TAGS_MAX:
            most = TAGS_MAX - _OWN_TAGS
            raise Unsupported(
                f"the schedule's metadata has {len(tags) - _OWN_TAGS} tags: a Hypeman server takes {TAGS_MAX} with a"
                f" snapshot, {_OWN_TAGS} of which are hypemand's, so take {most} at most"
            )
        self._asked.setdefault(request.run_id)
        await self._check_state(instance, request)
        draft = writing.new_draft(instance, request)
        await self._drafts.begin(draft)
        body = {"kind": request.kind.value, "name": request.name, "tags": tags}
        began = trio.current_time()
        self._asked[draft.id] = draft
        try:
            answer = await self._uncut.do(
                instance,
                partial(self.server.have_done, f"/instances/{instance}/snapshots", body),
                on_its_way_s=ON_ITS_WAY_S,
            )
        except NotSentError:
            self._asked[draft.id] = None
            await self._drafts.do(self.catalog.discard, instance, request.run_id)
            raise
        took_s = trio.current_time() - began
        whole = writing.completed(draft, await self._kept(answer, draft), self.settings)
        await self._drafts.rewrite(whole)
        del self._asked[draft.id]
        return Captured(whole.snapshot(), took_s if request.freezes is Freezer.HYPERVISOR else None)

    async def _check_state(self, instance: InstanceId, request: CaptureRequest) -> None:
        """Look once more: a guest that somebody has put to standby meanwhile would be taken for one to be restored."""
        state = (await self._guests.after(instance)).status.state
        expected = (InstanceState.RUNNING,) if request.freezes is not None else _EXPECTED[request.kind]
        if state not in expected or (request.freezes is None and state is InstanceState.RUNNING):
            was = " or ".join(expected if request.freezes else [one for one in expected if one != "Running"])
            raise CaptureFailed(f"instance is {state} now, it was {was} when its run began")

    async def _kept(self, answer: Answer, draft: Manifest) -> Kept:
        """The snapshot that *answer* tells of.

        Raises:
            CaptureFailed: The server says that there is none, and why. The guest runs, or the text says that it
                does not.
            BackendUnavailable: It says nothing that can be relied on: `settle` looks what became of it.
        """
        if answer.status == 201:
            with suppress(StrangeAnswerError):
                return kept_of(answer.document)
        if answer.code is None:
            raise BackendUnavailable(f"what became of the snapshot is not known: {self.settings.url}: {answer}")
        if answer.not_found:
            raise InstanceNotFound(f"{self.settings.url}: {answer}")
        said = f"the Hypeman server refuses: {answer}"
        if answer.status >= 500 and answer.code != _NOT_SUPPORTED:
            said = f"the Hypeman server failed: {answer}; its own log says more"
        if writing.may_be_down(draft):
            said += await self._brought_back_note(draft)
        raise Unsupported(said) if answer.code == _NOT_SUPPORTED else CaptureFailed(said)

    async def _brought_back_note(self, draft: Manifest) -> str:
        """Look after the guest at once, and tell of it; `settle` does so again where it is in vain."""
        try:
            was_down = await self._guests.bring_back(draft.instance_id)
        except BackendError as error:
            return f"; and {error}"
        await self._note_that_it_runs(draft)
        return "; the guest was left in standby, and was restored" if was_down else ""

    async def complete(self, captured: Captured) -> Captured:
        """All is done while the guest stands still."""
        await trio.lowlevel.checkpoint()
        return captured

    async def publish(self, snapshot: Snapshot) -> None:
        """List it in the catalog."""
        await self._drafts.do(self.catalog.publish, checked(snapshot.instance_id), snapshot.id)

    async def list_snapshots(self, instance: InstanceId) -> tuple[Snapshot, ...]:
        """What is in the catalog and on the server; and what the server's own schedules have left there."""
        return tuple(snapshot for snapshot, _ in await self._listing.by_id(checked(instance)))

    async def delete_snapshot(self, snapshot: Snapshot) -> None:
        """Delete it on the server, then in the catalog."""
        checked(snapshot.instance_id)
        await self._drafts.do(self.catalog.check)
        await self._listing.delete(snapshot)

    async def settle(self, run: RunStarted, *, ours: bool) -> Settled:
        """Adopt what the server has made; else bring the guest back if the draft says that it may be down."""
        instance, run_id = checked(run.instance_id), run.run_id
        guest = None
        with suppress(InstanceNotFound):
            guest = await self._guests.after(instance)  # the server is sure to be done with it
        draft, lost = await self._draft(instance, run_id)
        try:
            kept = await self._listing.of_run(instance, run_id)
        except BackendUnavailable:
            if draft is not None:  # a guest does not wait for a list that may never come
                await self._bring_back(draft)
            raise
        # The server keeps a snapshot only once it has brought the guest back: down now, it is so for somebody else.
        if draft is not None and kept is None:
            await self._bring_back(draft)
            kept = await self._listing.of_run(instance, run_id)  # the server may just have been about to be done
        doubt = self._doubt(run, guest) if draft is None and kept is None else ""
        if lost is not None or (doubt and ours):
            raise BackendUnavailable("; ".join(filter(None, [str(lost or ""), doubt]))) from lost
        snapshot = await self._settle_snapshot(run, draft, kept)
        if doubt:
            _log.critical("look whether a guest was left in standby", instance_id=instance, run_id=run_id, error=doubt)
        self._asked.pop(run_id, None)
        resumed, down_s = run_id in self._brought_back, self._brought_back.pop(run_id, None)
        return Settled(snapshot, resumed=resumed, freeze_s=down_s, notes=(doubt,) if doubt else ())

    async def _draft(self, instance: InstanceId, run_id: str) -> tuple[Manifest | None, BackendUnavailable | None]:
        """The run's draft, and why the catalog does not tell. What it has lost is written anew."""
        asked = self._asked.get(run_id)
        try:
            draft = await self._drafts.do(self.catalog.draft, instance, run_id)
            if draft is None and asked is not None:
                await self._drafts.begin(asked)
        except BackendUnavailable as error:
            return asked, error
        return asked or draft, None

    def _doubt(self, run: RunStarted, guest: Guest | None) -> str:
        """What to look after where nothing tells whether the server was asked for a snapshot.

        The catalog was lost, or this run was ended before it asked for one, and somebody else did it.
        """
        if run.freezes is None or run.run_id in self._asked or guest is None or not guest.stands_still:
            return ""
        return (
            f"the guest is {guest.state}, and the catalog does not tell whether it is so for this run: if nobody wants"
            f" it so, have it restored (POST /instances/{guest.id}/restore)"
        )

    async def _bring_back(self, draft: Manifest) -> None:
        with suppress(InstanceNotFound):  # then there is nothing to bring back
            if writing.may_be_down(draft):
                await self._restored(draft)
        await self._note_that_it_runs(draft)

    async def _restored(self, draft: Manifest) -> None:
        if await self._guests.is_down(draft.instance_id):
            # It may take longer than anybody waits, and what follows may fail: the next settling has to know.
            self._brought_back[draft.id] = None
            try:
                if not await self._guests.restore(draft.instance_id):
                    del self._brought_back[draft.id]
            except NotRestoredError:
                del self._brought_back[draft.id]
                raise
        if draft.id in self._brought_back:
            self._brought_back[draft.id] = writing.down_for_s(draft)

    async def _note_that_it_runs(self, draft: Manifest) -> None:
        """From here on a standby is somebody else's doing."""
        runs = writing.runs_again(draft)
        if draft.id in self._asked:
            self._asked[draft.id] = runs
        await self._drafts.rewrite(runs)

    async def _settle_snapshot(self, run: RunStarted, draft: Manifest | None, kept: Kept | None) -> Snapshot | None:
        instance, run_id = run.instance_id, run.run_id
        if draft is not None and kept is not None:
            await self._drafts.rewrite(writing.completed(draft, kept, self.settings))
            await self._drafts.do(self.catalog.publish, instance, run_id)
        # What is published is not touched by this; but what a deletion left that was cut short goes, too.
        await self._drafts.do(self.catalog.discard, instance, run_id)
        if kept is None:
            return None
        published = await self._drafts.do(self.catalog.find, instance, run_id)
        return None if published is None else published.snapshot()

    async def aclose(self) -> None:
        """Let go of connections."""
        await self.server.aclose()


def _pass_over(entry: str, why: str) -> None:
    _log.error("entry of the server's instances passed over", entry=entry, error=why)


def build(name: str, settings: HypemanSettings, surroundings: Surroundings) -> HypemanBackend:
    """Make the backend. Does no I/O."""
    settings = settings.absolute()
    catalog = settings.snapshot_dir or (surroundings.state_dir / "catalog" / name).absolute()
    return HypemanBackend(name, evolve(settings, snapshot_dir=catalog), Catalog(catalog))
