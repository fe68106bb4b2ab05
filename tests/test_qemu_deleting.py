"""Snapshots of QEMU guests whose deletion is cut short by a crash: finished later, or not begun."""

from pathlib import Path

import pytest

from hypemand.backends import catalog
from hypemand.backends.base import Backend, BackendError
from hypemand.backends.catalog import Catalog
from hypemand.backends.qemu import deleting
from hypemand.core.model import Snapshot
from tests.qemu_backend import (
    TAG,
    WEB,
    backend_of,
    captured,
    drafts_in,
    new_request,
    opened,
    operator_job,
    settle,
    tags_on,
    take,
)
from tests.qemu_guest import Guest, running_guest

pytestmark = pytest.mark.qemu

OTHER = "nightly-20261122-020000"


class Crash(BaseException):
    """Stands for the end of the process: nothing of ours runs after it."""


async def crash_while_deleting(backend: Backend, snapshot: Snapshot, where: object, method: str) -> None:
    def crash(*args: object) -> None:
        raise Crash

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, method, crash)
        with pytest.raises(Crash):
            await backend.delete_snapshot(snapshot)


def in_catalog(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.glob("catalog/web-1/*"))


async def test_a_deletion_that_a_crash_cut_short_is_finished_when_the_run_is_settled(tmp_path: Path) -> None:
    async with running_guest(tmp_path) as guest:
        backend = await opened(guest, tmp_path, mode="background")
        made, kept = await take(backend), await take(backend, OTHER)
        await crash_while_deleting(backend, made, Catalog, "delete")
        assert in_catalog(tmp_path) == sorted([made.id, kept.id])
        assert await tags_on(guest) == {"disk0": [OTHER]}
        await leave_job(guest, made)

        await settle(backend_of(guest, tmp_path, mode="background"), new_request())

        assert in_catalog(tmp_path) == [kept.id]
        assert await guest.qmp("query-jobs") == []


async def test_what_a_deletion_left_goes_with_the_settling_of_the_run_that_was_whole(tmp_path: Path) -> None:
    async with running_guest(tmp_path) as guest:
        backend, request = await opened(guest, tmp_path), new_request(OTHER)
        made = await take(backend)
        await backend.publish((await captured(backend, request)).snapshot)
        await crash_while_deleting(backend, made, catalog, "_remove")
        assert drafts_in(tmp_path) == [tmp_path / "catalog" / WEB / f".{made.id}.deleted"]
        assert (await settle(backend_of(guest, tmp_path), request)).snapshot is not None
        assert drafts_in(tmp_path) == []


async def leave_job(guest: Guest, snapshot: Snapshot) -> None:
    """The job of a deletion whose end nobody has heard of."""
    await operator_job(guest, "snapshot-delete", "none", "disk0", job_id=f"hypemand-delete-{snapshot.id}")


async def test_it_is_finished_before_the_next_deletion_as_well(tmp_path: Path) -> None:
    async with running_guest(tmp_path) as guest:
        backend = await opened(guest, tmp_path)
        made, other = await take(backend), await take(backend, OTHER)
        await crash_while_deleting(backend, made, Catalog, "delete")
        await backend_of(guest, tmp_path).delete_snapshot(other)
        assert in_catalog(tmp_path) == []


async def test_it_is_finished_for_a_guest_that_has_ended_meanwhile(tmp_path: Path) -> None:
    async with running_guest(tmp_path) as guest:
        backend = await opened(guest, tmp_path, disks=[str(tmp_path / "{instance}.qcow2")])
        made = await take(backend)
        await crash_while_deleting(backend, made, Catalog, "delete")
    await settle(backend_of(guest, tmp_path, disks=[str(tmp_path / "{instance}.qcow2")]), new_request())
    assert in_catalog(tmp_path) == []


async def test_a_deletion_that_had_only_been_decided_on_is_decided_anew(tmp_path: Path) -> None:
    async with running_guest(tmp_path) as guest:
        backend = await opened(guest, tmp_path)
        made = await take(backend)
        await crash_while_deleting(backend, made, deleting.Deleting, "_delete_from_disks")
        again = backend_of(guest, tmp_path)
        await settle(again, new_request())
        assert await again.list_snapshots(WEB) == (made,)
        # An operator deletes it now: from here on that is none of ours.
        await operator_job(guest, "snapshot-delete", TAG, "disk0")
        await settle(again, new_request())
        assert in_catalog(tmp_path) == [made.id]


async def test_a_deletion_that_qemu_refuses_is_not_taken_for_one_that_was_cut_short(tmp_path: Path) -> None:
    async with running_guest(tmp_path) as guest:
        backend = await opened(guest, tmp_path)
        made = await take(backend)

        async def refuse(*args: object) -> None:
            raise BackendError("no")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(deleting, "delete", refuse)
            with pytest.raises(BackendError, match="no"):
                await backend.delete_snapshot(made)
        await operator_job(guest, "snapshot-delete", TAG, "disk0")
        await settle(backend, new_request())
        assert in_catalog(tmp_path) == [made.id]


async def test_a_deletion_that_cannot_be_finished_keeps_no_run_open(tmp_path: Path) -> None:
    async with running_guest(tmp_path) as guest:
        backend = await opened(guest, tmp_path)
        made = await take(backend)
        await crash_while_deleting(backend, made, Catalog, "delete")

        async def fail(*args: object) -> None:
            raise BackendError("no")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(deleting, "finished", fail)
            settled = await settle(backend, new_request())
        assert settled.snapshot is None
        assert in_catalog(tmp_path) == [made.id]
