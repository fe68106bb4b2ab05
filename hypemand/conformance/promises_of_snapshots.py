"""Promises on making, publishing, listing and deleting snapshots."""

from attrs import evolve

from hypemand.conformance.acts import (
    HOUR,
    THEN,
    captured,
    catalog_tree,
    engine_freezes,
    listed,
    published,
    request_of,
)
from hypemand.conformance.promises import Promises
from hypemand.conformance.subject import Subject, Traits
from hypemand.core.model import Snapshot, SnapshotKind

promise = Promises()


def of_paused_guests(traits: Traits) -> bool:
    """Whether it captures them."""
    return traits.pauses


@promise
async def preparing_tells_what_is_needed_and_changes_nothing(subject: Subject) -> None:
    snapshot = await published(subject)
    before = catalog_tree(subject)
    preparation = await subject.backend.prepare(subject.instance, SnapshotKind.STANDBY)
    assert all(room.needed_bytes > 0 for room in preparation.rooms)
    assert all(room.path.exists() for room in preparation.rooms)
    assert not any(word == "" for word in preparation.warnings)
    assert snapshot.name in preparation.taken_names
    assert catalog_tree(subject) == before
    assert await listed(subject) == (snapshot,)
    assert await subject.guest_runs()


@promise
async def a_snapshot_is_what_was_asked_for_under_the_id_of_its_run(subject: Subject) -> None:
    request = request_of(subject)
    snapshot = await published(subject)
    assert snapshot == Snapshot(
        id=request.run_id,
        instance_id=subject.instance,
        name=request.name,
        kind=request.kind,
        created_at=request.created_at,
        size_bytes=snapshot.size_bytes,
        tags=request.tags,
        restore=snapshot.restore,
    )
    assert snapshot.size_bytes > 0
    assert await listed(subject) == (snapshot,)


@promise
async def the_guest_runs_after_a_capture(subject: Subject) -> None:
    await published(subject)
    assert await subject.guest_runs()


@promise
async def a_capture_tells_the_freeze_where_the_hypervisor_measures_it(subject: Subject) -> None:
    made = await captured(subject)
    whole = await subject.backend.complete(made)
    assert whole.freeze_s is not None or engine_freezes(subject)
    assert made.freeze_s in (None, whole.freeze_s)


@promise.where(of_paused_guests)
async def a_paused_guest_stays_paused_over_a_capture(subject: Subject) -> None:
    await subject.operator_pauses()
    request = request_of(subject)
    await subject.backend.capture(
        subject.instance, evolve(request, freezes=None) if engine_freezes(subject) else request
    )
    assert not await subject.guest_runs()


@promise
async def a_capture_is_not_listed_before_it_is_complete_and_published(subject: Subject) -> None:
    made = await captured(subject)
    assert await listed(subject) == ()
    whole = await subject.backend.complete(made)
    assert await listed(subject) == ()
    await subject.backend.publish(whole.snapshot)
    assert await listed(subject) == (whole.snapshot,)


@promise
async def the_guest_runs_while_a_capture_is_completed_and_after(subject: Subject) -> None:
    made = await captured(subject)
    assert await subject.guest_runs()
    whole = await subject.backend.complete(made)
    assert await subject.guest_runs()
    assert (whole.snapshot.id, whole.snapshot.name) == (made.snapshot.id, made.snapshot.name)


@promise
async def a_snapshot_says_how_to_get_back_to_it(subject: Subject) -> None:
    snapshot = await published(subject)
    (found,) = await listed(subject)
    assert found.restore == snapshot.restore != ()
    assert all(step.command.strip() == step.command != "" for step in found.restore)
    assert any(snapshot.id in step.command or snapshot.name in step.command for step in found.restore)


@promise
async def publishing_twice_is_no_error(subject: Subject) -> None:
    snapshot = await published(subject)
    await subject.backend.publish(snapshot)
    assert await listed(subject) == (snapshot,)


@promise
async def snapshots_are_listed_oldest_first(subject: Subject) -> None:
    newer = await published(subject, "a-newer", THEN + HOUR)
    oldest = await published(subject, "c-oldest", THEN - HOUR)
    older = await published(subject, "b-older", THEN)
    assert await listed(subject) == (oldest, older, newer)


@promise
async def an_instance_without_snapshots_has_an_empty_list(subject: Subject) -> None:
    assert await listed(subject) == ()


@promise
async def deleting_a_snapshot_leaves_the_others(subject: Subject) -> None:
    first, second, third = [await published(subject, f"run-{n}", THEN + n * HOUR) for n in range(3)]
    await subject.backend.delete_snapshot(second)
    assert await listed(subject) == (first, third)
    assert await subject.leftovers() == []
    assert await subject.guest_runs()


@promise
async def deleting_a_snapshot_that_is_gone_is_no_error(subject: Subject) -> None:
    kept, gone = await published(subject, "kept"), await published(subject, "gone", THEN + HOUR)
    for _ in range(2):
        await subject.backend.delete_snapshot(gone)
    assert await listed(subject) == (kept,)


@promise
async def a_run_may_follow_one_whose_snapshot_was_deleted(subject: Subject) -> None:
    await subject.backend.delete_snapshot(await published(subject, "first"))
    second = await published(subject, "second")
    assert await listed(subject) == (second,)
