"""The started line that the engine would have written of a capture. A helper for tests of backends."""

from datetime import timedelta

from hypemand.backends.base import Backend, CaptureRequest
from hypemand.core.model import InstanceId, InstanceState, RunStarted, SnapshotKind, Trigger


def run_of(request: CaptureRequest, backend: Backend, instance: InstanceId) -> RunStarted:
    """A run of *instance* that began when *request* was made."""
    standby = request.kind is SnapshotKind.STANDBY
    return RunStarted(
        run_id=request.run_id,
        instance_id=instance,
        backend=backend.name,
        trigger=Trigger.SCHEDULE,
        kind=request.kind,
        state_before=InstanceState.RUNNING if standby else InstanceState.STOPPED,
        due_at=request.created_at,
        next_run_at=request.created_at + timedelta(hours=1),
        started_at=request.created_at,
        snapshot_name=request.name,
        tags=request.tags,
        max_freeze_s=60,
        freezes=request.freezes,
        boot_id="",
        connection=backend.connection,
    )
