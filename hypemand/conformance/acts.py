"""A capture as the engine makes it, in parts."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

from hypemand.backends.base import Backend, Captured, CaptureRequest
from hypemand.conformance.subject import Subject
from hypemand.core.model import Freezer, InstanceState, RunStarted, Snapshot, SnapshotKind, Trigger
from hypemand.core.naming import scheduled_tags, snapshot_name

THEN = datetime(2025, 1, 1, tzinfo=UTC)
"""Before any snapshot that a hypervisor dates by its own clock."""
HOUR = timedelta(hours=1)


def engine_freezes(subject: Subject) -> bool:
    """Whether the engine pauses the guest."""
    return subject.backend.capabilities.freezes is Freezer.ENGINE


def slow_backend_of(subject: Subject) -> Backend:
    """The backend to cancel captures of."""
    return subject.slow_backend or subject.backend


def request_of(subject: Subject, run_id: str = "run-1", at: datetime = THEN) -> CaptureRequest:
    """What the engine would ask for."""
    return CaptureRequest(
        run_id=run_id,
        name=snapshot_name("nightly", at),
        kind=SnapshotKind.STANDBY,
        tags=scheduled_tags(subject.instance, {"team": "back end"}),
        created_at=at,
        freezes=subject.backend.capabilities.freezes,
    )


def run_of(subject: Subject, run_id: str = "run-1", at: datetime = THEN) -> RunStarted:
    """The started line of that run."""
    request = request_of(subject, run_id, at)
    return RunStarted(
        run_id=run_id,
        instance_id=subject.instance,
        backend=subject.backend.name,
        trigger=Trigger.SCHEDULE,
        kind=request.kind,
        state_before=InstanceState.RUNNING,
        due_at=at,
        next_run_at=at + HOUR,
        started_at=at,
        snapshot_name=request.name,
        tags=request.tags,
        max_freeze_s=30,
        freezes=request.freezes,
        boot_id="this-boot",
        connection=subject.backend.connection,
    )


async def paused(subject: Subject, run_id: str = "run-1", at: datetime = THEN) -> CaptureRequest:
    """The guest made to stand still for a capture; and the request for that."""
    request = request_of(subject, run_id, at)
    await subject.backend.make_ready(subject.instance, request)
    await subject.backend.pause(subject.instance, request)
    return request


async def frozen(subject: Subject, run_id: str = "run-1", at: datetime = THEN) -> CaptureRequest:
    """The same, where that is the engine's part."""
    return await paused(subject, run_id, at) if engine_freezes(subject) else request_of(subject, run_id, at)


async def captured(subject: Subject, run_id: str = "run-1", at: datetime = THEN) -> Captured:
    """A capture, up to where the guest runs again."""
    request = await frozen(subject, run_id, at)
    made = await subject.backend.capture(subject.instance, request)
    if engine_freezes(subject):
        await subject.backend.resume(subject.instance)
    return made


async def completed(subject: Subject, run_id: str = "run-1", at: datetime = THEN) -> Snapshot:
    """A whole snapshot, not yet published."""
    return (await subject.backend.complete(await captured(subject, run_id, at))).snapshot


async def published(subject: Subject, run_id: str = "run-1", at: datetime = THEN) -> Snapshot:
    """A snapshot that is listed."""
    snapshot = await completed(subject, run_id, at)
    await subject.backend.publish(snapshot)
    return snapshot


async def listed(subject: Subject) -> tuple[Snapshot, ...]:
    """What the backend lists of the guest."""
    return await subject.backend.list_snapshots(subject.instance)


def catalog_tree(subject: Subject) -> set[Path]:
    """Everything that is in the catalog."""
    return set(subject.catalog.rglob("*")) if subject.catalog is not None else set()
