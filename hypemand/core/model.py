"""The values that the wings hand to each other."""

from collections.abc import Mapping
from datetime import datetime, timedelta
from enum import StrEnum
from types import MappingProxyType
from typing import Annotated, Any, NewType

from attrs import frozen

InstanceId = NewType("InstanceId", str)
"""Checked by `naming.check_instance_id`: safe as a file name."""

# What a document may hold in such a field is the rule of that name in `fields.RULES`.
Interval = Annotated[timedelta, "interval"]
PositiveDuration = Annotated[timedelta, "positive duration"]
MaxAge = Annotated[timedelta, "max_age"]
MaxCount = Annotated[int, "max_count"]
PositiveInt = Annotated[int, "positive int"]
NamePrefix = Annotated[str, "name_prefix"]
FirstRun = Annotated[str, "first_run"]
Size = Annotated[int, "size"]
Metadata = Annotated[Mapping[str, str], "metadata"]
BackendName = Annotated[str, "backend name"]


class InstanceState(StrEnum):
    """State of an instance, in Hypeman's words."""

    CREATED = "Created"
    INITIALIZING = "Initializing"
    RUNNING = "Running"
    PAUSED = "Paused"
    SHUTDOWN = "Shutdown"
    STOPPED = "Stopped"
    STANDBY = "Standby"
    UNKNOWN = "Unknown"


class SnapshotKind(StrEnum):
    """What a snapshot holds: memory, devices and disks (Standby), or disks alone (Stopped)."""

    STANDBY = "Standby"
    STOPPED = "Stopped"


class Trigger(StrEnum):
    """Why a run began."""

    SCHEDULE = "schedule"
    MANUAL = "manual"


class Outcome(StrEnum):
    """How a run ended."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    SKIPPED = "skipped"
    INTERRUPTED = "interrupted"


class Freezer(StrEnum):
    """Who makes the guest stand still for a capture: hypemand's engine, or the hypervisor by itself."""

    ENGINE = "engine"
    HYPERVISOR = "hypervisor"


class ManagedBy(StrEnum):
    """Where a schedule is edited."""

    CONFIG = "config"
    API = "api"


NOTHING: Mapping[str, Any] = MappingProxyType({})
"""No keys at all: one for all of many schedules, which have none mostly."""
Extra = Mapping[str, Any]
"""Keys of a stored document that this version does not know, kept as they are."""


@frozen
class Retention:
    """What to keep. A limit that is None or zero is no limit; without any limit everything is kept."""

    max_age: MaxAge | None = None
    max_count: MaxCount | None = None
    extra: Extra = NOTHING

    @property
    def keeps_everything(self) -> bool:
        """Whether nothing ever expires."""
        return not self.max_age and not self.max_count


@frozen
class Settings:
    """What a schedule has beyond Hypeman's API.

    Attributes:
        first_run: ``now``, a local time of day ``HH:MM``, or None for the cadence's own.
        max_freeze: Longest freeze allowed; None for the overall one.
    """

    first_run: FirstRun | None = None
    max_freeze: PositiveDuration | None = None
    enabled: bool = True
    extra: Extra = NOTHING


@frozen(kw_only=True)
class Schedule:
    """One instance's schedule as it is stored. Instants are aware UTC.

    Attributes:
        backend: Name of its backend; None in files that Hypeman wrote.
        last_run_at: Start of the last run that did not end as skipped.
        last_snapshot_id: Snapshot of the last successful run; a failure keeps it.
        gone_since_at: When an authoritative answer first said that the instance is gone.
    """

    instance_id: InstanceId
    interval: Interval
    retention: Retention
    created_at: datetime
    updated_at: datetime
    next_run_at: datetime
    last_run_at: datetime | None = None
    last_error: str | None = None
    last_snapshot_id: str | None = None
    metadata: Metadata = NOTHING
    name_prefix: NamePrefix | None = None
    backend: BackendName | None = None
    managed_by: ManagedBy = ManagedBy.API
    settings: Settings = Settings()
    gone_since_at: datetime | None = None
    extra: Extra = NOTHING


class RestoreAction(StrEnum):
    """What kind of thing a step of a restore is.

    ``run``: a shell command on the host, while the instance is down.
    ``start``: arguments, quoted for a shell, to be added to the command line
    with which the instance is started. ``monitor``: a command for the
    hypervisor's own monitor, once it is started.
    """

    RUN = "run"
    START = "start"
    MONITOR = "monitor"


@frozen
class RestoreStep:
    """One step of the way back to a snapshot."""

    action: RestoreAction
    command: str


@frozen(kw_only=True)
class Snapshot:
    """A complete snapshot. *id* is the id of the run that made it, never the hypervisor's own number.

    Attributes:
        restore: The exact way back, in order.
    """

    id: str
    instance_id: InstanceId
    name: str
    kind: SnapshotKind
    created_at: datetime
    size_bytes: int
    tags: Mapping[str, str]
    restore: tuple[RestoreStep, ...] = ()


@frozen
class Pruned:
    """A deleted snapshot and why it expired."""

    snapshot_id: str
    reasons: tuple[str, ...]


@frozen(kw_only=True)
class RunStarted:
    """The line that is durable before a guest may stand still; all that is needed to settle the run later.

    Attributes:
        next_run_at: The schedule's next slot after this run.
        freezes: Who freezes the guest, or None where it does not run.
        connection: Type and settings of the backend at that time.
        boot_s: *started_at* on the boot-time clock: with it a wall clock that jumped meanwhile is found out.
    """

    run_id: str
    instance_id: InstanceId
    backend: BackendName
    trigger: Trigger
    kind: SnapshotKind
    state_before: InstanceState
    due_at: datetime
    next_run_at: datetime
    started_at: datetime
    snapshot_name: str
    tags: Mapping[str, str]
    max_freeze_s: float
    freezes: Freezer | None
    boot_id: str
    connection: Mapping[str, Any]
    boot_s: float | None = None
    extra: Extra = NOTHING


@frozen(kw_only=True)
class RunFinished:
    """How a run ended: the history's line.

    Attributes:
        missed: Slots of the grid passed over before this run.
        found_frozen: A recovery found the guest frozen and resumed it: *freeze_s* is how long it stood still until
            then, at most, and no measure of the capture.
        error: Set for every outcome but a clean success; a success with an
            error has a snapshot, and something to tell.
        warnings: What went otherwise than configured, with no harm to the snapshot.
    """

    run_id: str
    instance_id: InstanceId
    due_at: datetime
    started_at: datetime
    finished_at: datetime
    outcome: Outcome
    trigger: Trigger = Trigger.SCHEDULE
    kind: SnapshotKind | None = None
    snapshot_id: str | None = None
    snapshot_name: str | None = None
    size_bytes: int | None = None
    freeze_s: float | None = None
    found_frozen: bool = False
    capture_s: float | None = None
    late_s: float = 0.0
    missed: int = 0
    pruned: tuple[Pruned, ...] = ()
    error: str | None = None
    warnings: tuple[str, ...] = ()
    extra: Extra = NOTHING
