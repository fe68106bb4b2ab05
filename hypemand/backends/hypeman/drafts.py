"""What the catalog holds of a snapshot that the server keeps: a manifest alone, and in it what only hypemand knows."""

import json
import re
import shlex
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, TypeVar

import trio
from attrs import define, evolve, field

from hypemand.backends.base import BackendUnavailable, CaptureRequest
from hypemand.backends.catalog import Catalog, Manifest, sync_tree
from hypemand.backends.hypeman.documents import Kept
from hypemand.backends.hypeman.settings import HypemanSettings
from hypemand.backends.hypeman.tokens import CREDENTIAL
from hypemand.core.errors import RuleBroken
from hypemand.core.fields import check_instant, format_instant
from hypemand.core.model import Freezer, InstanceId, RestoreAction, RestoreStep, SnapshotKind

T = TypeVar("T")
_PLAIN = re.compile(r"[A-Za-z0-9._-]+")
_SERVER_ID = "server_id"
_ASKED_AT = "asked_at"
_UNSURE = "guest_may_be_down"


def new_draft(instance: InstanceId, request: CaptureRequest) -> Manifest:
    """The manifest of a snapshot that is about to be asked for."""
    return Manifest(
        id=request.run_id,
        instance_id=instance,
        name=request.name,
        kind=request.kind,
        tags=request.tags,
        created_at=request.created_at,
        size_bytes=0,
        hypervisor={"name": "hypeman"},
        details={
            _SERVER_ID: None,
            _ASKED_AT: format_instant(datetime.now(UTC)),
            _UNSURE: request.freezes is Freezer.HYPERVISOR,
        },
    )


def completed(draft: Manifest, kept: Kept, settings: HypemanSettings) -> Manifest:
    """*draft*, now that the server has the snapshot: it has brought the guest back before it said so."""
    return evolve(
        draft,
        size_bytes=kept.size_bytes,
        hypervisor={"name": "hypeman", "guest": kept.hypervisor},
        restore=way_back(kept, settings),
        details={**draft.details, _SERVER_ID: kept.id, _UNSURE: False},
    )


def runs_again(draft: Manifest) -> Manifest:
    """*draft*, now that the guest is known to run."""
    return evolve(draft, details={**draft.details, _UNSURE: False})


def may_be_down(draft: Manifest) -> bool:
    """Whether the guest may stand still for the request of *draft*: the mark that tells it from an operator's doing."""
    return draft.details.get(_UNSURE) is True


def server_id(manifest: Manifest) -> str | None:
    """By what the server knows the snapshot."""
    found = manifest.details.get(_SERVER_ID)
    return found if isinstance(found, str) else None


def down_for_s(draft: Manifest) -> float | None:
    """How long it is since the server was asked; negative where the clock was set back."""
    try:
        return (datetime.now(UTC) - check_instant(draft.details.get(_ASKED_AT))).total_seconds()
    except RuleBroken:
        return None


def way_back(kept: Kept, settings: HypemanSettings) -> tuple[RestoreStep, ...]:
    """One call of the server's API, by curl; the token comes from its file, and shows in no list of processes."""
    token_file = settings.token_file or f"/etc/hypemand/{CREDENTIAL}"
    wanted = "Running" if kept.kind is SnapshotKind.STANDBY else "Stopped"
    target = f"{settings.url}/instances/{kept.instance_id}/snapshots/{kept.id}/restore"
    trust = ["--cacert", str(settings.ca_file)] if settings.ca_file is not None else []
    content = ["-H", "Content-Type: application/json", "-d", json.dumps({"target_state": wanted})]
    call = shlex.join(["curl", "-sS", "--fail-with-body", *trust, "-H", "@-", *content, target])
    header = f'printf "Authorization: Bearer %s" "$(cat {shlex.quote(str(token_file))})"'
    # The name says more than the ids; it is the server's word, so it has to be harmless.
    remark = f" # {kept.name}" if _PLAIN.fullmatch(kept.name) else ""
    return (RestoreStep(RestoreAction.RUN, f"{header} | {call}{remark}"),)


@define(eq=False)
class Drafts:
    """The catalog, from the event loop: blocking work in threads of its own, abandoned on cancellation."""

    catalog: Catalog
    _threads: trio.CapacityLimiter | None = field(init=False, default=None)

    async def do(self, work: Callable[..., T], *args: Any) -> T:
        """Do *work* in a thread.

        Raises:
            BackendUnavailable: In place of an `OSError`.
        """
        self._threads = self._threads or trio.CapacityLimiter(8)
        try:
            return await trio.to_thread.run_sync(work, *args, abandon_on_cancel=True, limiter=self._threads)
        except OSError as error:
            place = error.filename or self.catalog.root
            raise BackendUnavailable(f"{place} can't be used: {error.strerror}") from error

    async def begin(self, draft: Manifest) -> None:
        """Have *draft* written, durably: whoever comes after a crash has to know what was asked for."""
        await self.do(self._begin, draft)

    def _begin(self, draft: Manifest) -> None:
        partial = self.catalog.begin(draft.instance_id, draft.id)
        self.catalog.write_manifest(draft)
        sync_tree(partial)
        sync_tree(partial.parent, deep=False)
        sync_tree(self.catalog.root, deep=False)

    async def rewrite(self, draft: Manifest) -> None:
        """Replace what `begin` wrote, if it is still there."""
        await self.do(self._rewrite, draft)

    def _rewrite(self, draft: Manifest) -> None:
        if self.catalog.partial(draft.instance_id, draft.id).is_dir():
            self.catalog.write_manifest(draft)

    async def known(self, instance: InstanceId, run_ids: Mapping[str, Any]) -> tuple[frozenset[str], list[Manifest]]:
        """Which of *run_ids* are drafts, and the manifests of complete snapshots.

        In this order: what was a draft on the first look and is none on the
        second has been published in between.
        """

        def look() -> tuple[frozenset[str], list[Manifest]]:
            drafts = frozenset(run for run in run_ids if _is_there(self.catalog, instance, run))
            return drafts, self.catalog.manifests(instance)

        return await self.do(look)


def _is_there(catalog: Catalog, instance: InstanceId, run_id: str) -> bool:
    return catalog.partial(instance, run_id).exists()
