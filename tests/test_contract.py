"""The promises of `Backend`, kept by every backend."""

import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio
from attrs import evolve

from hypemand.backends import registry
from hypemand.backends.base import BackendUnavailable, Captured, CaptureRequest, InstanceNotFound, InvalidState
from hypemand.backends.catalog import MARKER
from hypemand.core.model import (
    Freezer,
    InstanceId,
    InstanceState,
    RunStarted,
    Snapshot,
    SnapshotKind,
    Trigger,
)
from hypemand.core.naming import scheduled_tags, snapshot_name
from tests.contract import SUBJECTS, Subject, SubjectMaker

THEN = datetime(2025, 1, 1, tzinfo=UTC)
"""Before any snapshot that a hypervisor dates by its own clock."""


@pytest.fixture(params=SUBJECTS)
async def subject(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Subject]:
    make: SubjectMaker = request.param
    async with make(tmp_path) as made:
        yield made
        await made.slow_backend.aclose()
        await made.backend.aclose()


def engine_freezes(subject: Subject) -> bool:
    return subject.backend.capabilities.freezes is Freezer.ENGINE


def request_of(subject: Subject, run_id: str = "run-1", at: datetime = THEN) -> CaptureRequest:
    return CaptureRequest(
        run_id=run_id,
        name=snapshot_name("nightly", at),
        kind=SnapshotKind.STANDBY,
        tags=scheduled_tags(subject.instance, {"team": "back end"}),
        created_at=at,
        freezes=subject.backend.capabilities.freezes,
    )


def run_of(subject: Subject, run_id: str = "run-1", at: datetime = THEN) -> RunStarted:
    request = request_of(subject, run_id, at)
    return RunStarted(
        run_id=run_id,
        instance_id=subject.instance,
        backend=subject.backend.name,
        trigger=Trigger.SCHEDULE,
        kind=request.kind,
        state_before=InstanceState.RUNNING,
        due_at=at,
        next_run_at=at + timedelta(hours=1),
        started_at=at,
        snapshot_name=request.name,
        tags=request.tags,
        max_freeze_s=30,
        freezes=request.freezes,
        boot_id="this-boot",
        connection=subject.backend.connection,
    )


async def captured(subject: Subject, run_id: str = "run-1", at: datetime = THEN) -> Captured:
    """A capture made as the engine makes it, up to where the guest runs again."""
    request = request_of(subject, run_id, at)
    if engine_freezes(subject):
        await subject.backend.pause(subject.instance, request)
    made = await subject.backend.capture(subject.instance, request)
    if engine_freezes(subject):
        await subject.backend.resume(subject.instance)
    return made


async def completed(subject: Subject, run_id: str = "run-1", at: datetime = THEN) -> Snapshot:
    """A whole snapshot, not yet published."""
    return (await subject.backend.complete(await captured(subject, run_id, at))).snapshot


async def published(subject: Subject, run_id: str = "run-1", at: datetime = THEN) -> Snapshot:
    snapshot = await completed(subject, run_id, at)
    await subject.backend.publish(snapshot)
    return snapshot


def leftovers(subject: Subject) -> list[str]:
    """What stands in the catalog beside complete snapshots."""
    if subject.catalog is None:
        return []
    return [path.name for path in subject.catalog.glob("*/*") if path.name.startswith(".")]


def catalog_tree(subject: Subject) -> set[Path]:
    return set(subject.catalog.rglob("*")) if subject.catalog is not None else set()


# What it knows


async def test_a_guest_that_runs_is_running(subject: Subject) -> None:
    assert (await subject.backend.state(subject.instance)).state is InstanceState.RUNNING
    assert await subject.guest_runs()


async def test_the_state_is_asked_anew_each_time(subject: Subject) -> None:
    await subject.operator_pauses()
    assert (await subject.backend.state(subject.instance)).state is InstanceState.PAUSED
    await subject.operator_resumes()
    assert (await subject.backend.state(subject.instance)).state is InstanceState.RUNNING


async def test_the_instance_is_among_the_instances(subject: Subject) -> None:
    assert subject.instance in await subject.backend.instances()


async def test_an_instance_that_never_was_has_no_state(subject: Subject) -> None:
    with pytest.raises((InstanceNotFound, BackendUnavailable)):
        await subject.backend.state(InstanceId("never-was"))


@pytest.mark.parametrize("bad", ["", "..", "../web-1", ".hidden", "a/b", "x" * 129, "nul\0"])
async def test_an_id_that_is_no_file_name_leads_nowhere(subject: Subject, bad: str) -> None:
    with pytest.raises((InstanceNotFound, BackendUnavailable)):
        await subject.backend.state(InstanceId(bad))


async def test_opening_again_changes_nothing(subject: Subject) -> None:
    snapshot = await published(subject)
    for first_use in (True, False):
        await subject.backend.open(first_use=first_use)
    assert await subject.backend.list_snapshots(subject.instance) == (snapshot,)
    assert await subject.guest_runs()


async def test_the_connection_leads_to_the_same_hypervisor_from_another_process(subject: Subject) -> None:
    snapshot = await published(subject)
    for backend in (subject.backend, subject.slow_backend):
        connection = json.loads(json.dumps(dict(backend.connection)))
        other = registry.connect(backend.name, connection, subject.surroundings)
        await other.open(first_use=False)
        assert other.connection == connection
        assert other.capabilities == backend.capabilities
        assert await other.list_snapshots(subject.instance) == (snapshot,)
        assert (await other.state(subject.instance)).state is InstanceState.RUNNING
        await other.aclose()


# No answer


async def test_an_unreachable_hypervisor_is_unavailable_and_never_an_empty_answer(subject: Subject) -> None:
    await published(subject)
    await subject.go_away()
    backend, instance = subject.backend, subject.instance
    with pytest.raises(BackendUnavailable):
        await backend.instances()
    with pytest.raises(BackendUnavailable):
        await backend.state(instance)
    with pytest.raises(BackendUnavailable):
        await backend.prepare(instance, SnapshotKind.STANDBY)
    with pytest.raises(BackendUnavailable):
        await backend.pause(instance, request_of(subject))
    with pytest.raises(BackendUnavailable):
        await backend.resume(instance)
    with pytest.raises(BackendUnavailable):
        await backend.list_snapshots(instance)


async def test_an_unreachable_hypervisor_that_comes_back_has_its_snapshots_and_its_guest(subject: Subject) -> None:
    snapshot = await published(subject)
    await subject.go_away()
    with pytest.raises(BackendUnavailable):
        await subject.backend.state(subject.instance)
    await subject.come_back()
    assert (await subject.backend.state(subject.instance)).state is InstanceState.RUNNING
    assert await subject.backend.list_snapshots(subject.instance) == (snapshot,)


async def test_a_run_is_not_settled_while_the_hypervisor_is_unreachable(subject: Subject) -> None:
    await captured(subject)
    await subject.go_away()
    with pytest.raises(BackendUnavailable):
        await subject.backend.settle(run_of(subject), ours=False)
    await subject.come_back()
    await subject.backend.settle(run_of(subject), ours=False)
    assert leftovers(subject) == []


async def test_a_catalog_whose_marker_vanished_is_not_an_empty_catalog(subject: Subject) -> None:
    assert subject.catalog is not None
    snapshot = await published(subject)
    (subject.catalog / MARKER).unlink()
    with pytest.raises(BackendUnavailable):
        await subject.backend.list_snapshots(subject.instance)
    with pytest.raises(BackendUnavailable):
        await subject.backend.delete_snapshot(snapshot)
    with pytest.raises(BackendUnavailable):
        await subject.backend.settle(run_of(subject), ours=False)
    with pytest.raises(BackendUnavailable):
        await subject.backend.open(first_use=False)
    assert (subject.catalog / subject.instance / snapshot.id).is_dir()


async def test_a_missing_catalog_is_found_before_the_freeze(subject: Subject) -> None:
    assert subject.catalog is not None
    (subject.catalog / MARKER).unlink()
    with pytest.raises(BackendUnavailable):
        await subject.backend.prepare(subject.instance, SnapshotKind.STANDBY)


# Pause and resume


async def test_pause_freezes_the_guest_and_resume_lets_it_run(subject: Subject) -> None:
    await subject.backend.pause(subject.instance, request_of(subject))
    assert not await subject.guest_runs()
    assert (await subject.backend.state(subject.instance)).state is InstanceState.PAUSED
    await subject.backend.resume(subject.instance)
    assert await subject.guest_runs()


async def test_pausing_a_paused_guest_and_resuming_a_running_one_is_no_error(subject: Subject) -> None:
    await subject.backend.resume(subject.instance)
    assert await subject.guest_runs()
    for _ in range(2):
        await subject.backend.pause(subject.instance, request_of(subject))
        assert not await subject.guest_runs()
    for _ in range(2):
        await subject.backend.resume(subject.instance)
        assert await subject.guest_runs()


async def test_an_operators_pause_is_not_taken_for_ours_where_that_can_be_told(subject: Subject) -> None:
    await subject.operator_pauses()
    with contextlib.suppress(InvalidState):
        await subject.backend.pause(subject.instance, request_of(subject))
    assert not await subject.guest_runs()
    assert not (await subject.backend.settle(run_of(subject), ours=False)).resumed
    assert not await subject.guest_runs()


# Capture, publish, list, delete


async def test_preparing_tells_what_is_needed_and_changes_nothing(subject: Subject) -> None:
    snapshot = await published(subject)
    before = catalog_tree(subject)
    preparation = await subject.backend.prepare(subject.instance, SnapshotKind.STANDBY)
    assert all(room.needed_bytes > 0 for room in preparation.rooms)
    assert all(room.path.exists() for room in preparation.rooms)
    assert not any(word == "" for word in preparation.warnings)
    assert snapshot.name in preparation.taken_names
    assert catalog_tree(subject) == before
    assert await subject.backend.list_snapshots(subject.instance) == (snapshot,)
    assert await subject.guest_runs()


async def test_a_snapshot_is_what_was_asked_for_under_the_id_of_its_run(subject: Subject) -> None:
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
    assert await subject.backend.list_snapshots(subject.instance) == (snapshot,)


async def test_the_guest_runs_after_a_capture(subject: Subject) -> None:
    await published(subject)
    assert await subject.guest_runs()


async def test_a_capture_tells_the_freeze_where_the_hypervisor_measures_it(subject: Subject) -> None:
    made = await captured(subject)
    whole = await subject.backend.complete(made)
    assert whole.freeze_s is not None or engine_freezes(subject)
    assert made.freeze_s in (None, whole.freeze_s)


async def test_a_paused_guest_stays_paused_over_a_capture(subject: Subject) -> None:
    await subject.operator_pauses()
    request = request_of(subject)
    await subject.backend.capture(
        subject.instance, evolve(request, freezes=None) if engine_freezes(subject) else request
    )
    assert not await subject.guest_runs()


async def test_a_capture_is_not_listed_before_it_is_complete_and_published(subject: Subject) -> None:
    made = await captured(subject)
    assert await subject.backend.list_snapshots(subject.instance) == ()
    whole = await subject.backend.complete(made)
    assert await subject.backend.list_snapshots(subject.instance) == ()
    await subject.backend.publish(whole.snapshot)
    assert await subject.backend.list_snapshots(subject.instance) == (whole.snapshot,)


async def test_the_guest_runs_while_a_capture_is_completed_and_after(subject: Subject) -> None:
    made = await captured(subject)
    assert await subject.guest_runs()
    whole = await subject.backend.complete(made)
    assert await subject.guest_runs()
    assert (whole.snapshot.id, whole.snapshot.name) == (made.snapshot.id, made.snapshot.name)


async def test_a_snapshot_says_how_to_get_back_to_it(subject: Subject) -> None:
    snapshot = await published(subject)
    (listed,) = await subject.backend.list_snapshots(subject.instance)
    assert listed.restore == snapshot.restore != ()
    assert all(step.command.strip() == step.command != "" for step in listed.restore)
    assert any(snapshot.id in step.command or snapshot.name in step.command for step in listed.restore)


async def test_publishing_twice_is_no_error(subject: Subject) -> None:
    snapshot = await published(subject)
    await subject.backend.publish(snapshot)
    assert await subject.backend.list_snapshots(subject.instance) == (snapshot,)


async def test_snapshots_are_listed_oldest_first(subject: Subject) -> None:
    newer = await published(subject, "a-newer", THEN + timedelta(hours=1))
    oldest = await published(subject, "c-oldest", THEN - timedelta(hours=1))
    older = await published(subject, "b-older", THEN)
    assert await subject.backend.list_snapshots(subject.instance) == (oldest, older, newer)


async def test_an_instance_without_snapshots_has_an_empty_list(subject: Subject) -> None:
    assert await subject.backend.list_snapshots(subject.instance) == ()


async def test_deleting_a_snapshot_leaves_the_others(subject: Subject) -> None:
    first, second, third = [await published(subject, f"run-{n}", THEN + timedelta(hours=n)) for n in range(3)]
    await subject.backend.delete_snapshot(second)
    assert await subject.backend.list_snapshots(subject.instance) == (first, third)
    assert leftovers(subject) == []
    assert await subject.guest_runs()


async def test_deleting_a_snapshot_that_is_gone_is_no_error(subject: Subject) -> None:
    kept, gone = await published(subject, "kept"), await published(subject, "gone", THEN + timedelta(hours=1))
    for _ in range(2):
        await subject.backend.delete_snapshot(gone)
    assert await subject.backend.list_snapshots(subject.instance) == (kept,)


async def test_a_run_may_follow_one_whose_snapshot_was_deleted(subject: Subject) -> None:
    await subject.backend.delete_snapshot(await published(subject, "first"))
    second = await published(subject, "second")
    assert await subject.backend.list_snapshots(subject.instance) == (second,)


# Settling


async def test_a_cancelled_capture_is_cleared_up_and_the_guest_runs(subject: Subject) -> None:
    kept = await published(subject, "kept", THEN - timedelta(hours=1))
    if engine_freezes(subject):
        await subject.backend.pause(subject.instance, request_of(subject))
    with trio.move_on_after(0.2) as scope:
        await subject.slow_backend.capture(subject.instance, request_of(subject))
    if subject.slow_backend is not subject.backend:
        assert scope.cancelled_caught
    settled = await subject.backend.settle(run_of(subject), ours=engine_freezes(subject))
    assert await subject.guest_runs()
    assert leftovers(subject) == []
    found = (kept,) if settled.snapshot is None else (kept, settled.snapshot)
    assert await subject.backend.list_snapshots(subject.instance) == found
    assert (await subject.backend.settle(run_of(subject), ours=False)).snapshot == settled.snapshot


async def test_the_next_run_succeeds_after_a_cancelled_one_was_settled(subject: Subject) -> None:
    if engine_freezes(subject):
        await subject.backend.pause(subject.instance, request_of(subject))
    with trio.move_on_after(0.2):
        await subject.slow_backend.capture(subject.instance, request_of(subject))
    if engine_freezes(subject):
        await subject.backend.resume(subject.instance)
    settled = await subject.backend.settle(run_of(subject), ours=False)
    later = await published(subject, "run-2", THEN + timedelta(hours=1))
    found = (later,) if settled.snapshot is None else (settled.snapshot, later)
    assert await subject.backend.list_snapshots(subject.instance) == found


async def test_a_capture_whose_completion_was_cancelled_is_cleared_up(subject: Subject) -> None:
    kept = await published(subject, "kept", THEN - timedelta(hours=1))
    made = await captured(subject)
    with trio.CancelScope() as scope:
        scope.cancel()
        await subject.backend.complete(made)
    settled = await subject.backend.settle(run_of(subject), ours=False)
    assert not settled.resumed
    assert await subject.guest_runs()
    assert leftovers(subject) == []
    found = (kept,) if settled.snapshot is None else (kept, settled.snapshot)
    assert await subject.backend.list_snapshots(subject.instance) == found
    later = await published(subject, "run-2", THEN + timedelta(hours=1))
    assert await subject.backend.list_snapshots(subject.instance) == (*found, later)


async def test_settling_adopts_the_published_snapshot_of_the_run(subject: Subject) -> None:
    snapshot = await published(subject)
    for _ in range(2):
        settled = await subject.backend.settle(run_of(subject), ours=False)
        assert settled.snapshot == snapshot
        assert not settled.resumed
    assert await subject.backend.list_snapshots(subject.instance) == (snapshot,)


@pytest.mark.parametrize("make", [captured, completed])
async def test_settling_lists_an_unpublished_snapshot_or_removes_it(
    subject: Subject, make: Callable[[Subject], Awaitable[object]]
) -> None:
    await make(subject)
    settled = await subject.backend.settle(run_of(subject), ours=False)
    found = () if settled.snapshot is None else (settled.snapshot,)
    assert await subject.backend.list_snapshots(subject.instance) == found
    assert leftovers(subject) == []
    assert (await subject.backend.settle(run_of(subject), ours=False)).snapshot == settled.snapshot


async def test_settling_a_run_that_left_nothing_finds_nothing(subject: Subject) -> None:
    other = await published(subject, "other")
    settled = await subject.backend.settle(run_of(subject, "run-1", THEN + timedelta(hours=1)), ours=False)
    assert (settled.snapshot, settled.resumed) == (None, False)
    assert await subject.backend.list_snapshots(subject.instance) == (other,)
    assert await subject.guest_runs()


async def test_settling_resumes_a_guest_that_the_run_froze(subject: Subject) -> None:
    if engine_freezes(subject):
        await subject.backend.pause(subject.instance, request_of(subject))
    settled = await subject.backend.settle(run_of(subject), ours=True)
    assert settled.resumed == engine_freezes(subject)
    assert settled.freeze_s is None or settled.freeze_s >= 0
    assert await subject.guest_runs()
    assert not (await subject.backend.settle(run_of(subject), ours=True)).resumed


async def test_settling_leaves_an_operators_pause_alone(subject: Subject) -> None:
    await captured(subject)
    await subject.operator_pauses()
    settled = await subject.backend.settle(run_of(subject), ours=False)
    assert not settled.resumed
    assert not await subject.guest_runs()
