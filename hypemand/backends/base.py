"""The protocol that every hypervisor backend follows, its values and its errors."""

from collections.abc import Callable, Collection, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from attrs import Factory, field, frozen

from hypemand.backends.meter import Meter
from hypemand.core.errors import HypemandError
from hypemand.core.model import Freezer, InstanceId, InstanceState, RunStarted, Snapshot, SnapshotKind


class BackendError(HypemandError):
    """Base of what a backend may raise."""


class InstanceNotFound(BackendError):
    """The hypervisor itself says that it has no such instance. Never guessed from a missing socket or mount."""


class InvalidState(BackendError):
    """The instance is not in a state that allows the call."""


class BackendUnavailable(BackendError):
    """No answer, a busy monitor, a missing mount: nothing is known. Transient: later it may work."""


class CaptureFailed(BackendError):
    """The snapshot could not be made; nothing of it is listed."""


class Unsupported(BackendError):
    """This instance or hypervisor cannot be captured like this; trying again changes nothing."""


@frozen
class Capabilities:
    """What a backend can do.

    Attributes:
        freezes: Who makes a running guest stand still, unless `Preparation`
            says otherwise of a guest. `Freezer.HYPERVISOR`: the engine neither
            pauses nor resumes, `Backend.capture` does it all.
        abortable: Whether cancelling `Backend.capture` ends the capture at
            once. Where it is False, the hypervisor goes on by itself until it
            is done, and `Backend.settle` clears up after it. It counts only
            where the engine freezes, which then ends the capture at the freeze
            budget. All other captures, a fallback that `Preparation` names
            included, are held to it by their record: none begins once a
            capture of that guest, frozen in the same way, has taken longer.
        kinds: Snapshot kinds that can be made.
    """

    freezes: Freezer
    abortable: bool
    kinds: frozenset[SnapshotKind]


@frozen
class Status:
    """State of an instance; *detail* is the hypervisor's own word where ours says less."""

    state: InstanceState
    detail: str = ""


@frozen
class Room:
    """What a capture will take from the filesystem of *path*, which exists: an estimate on the safe side."""

    path: Path
    needed_bytes: int


@frozen
class Preparation:
    """What a backend knows before a capture.

    Attributes:
        rooms: By filesystem; one where nothing can be known of is left out, and not checked.
        taken_names: Every snapshot name in use for the instance, other people's too.
        freezes: Who makes this guest stand still this time; None: as `Capabilities` says.
        warnings: What will go otherwise than configured, and why.
        advice: What an operator could do better, and how. For ``check-config``; a run says nothing of it.
    """

    rooms: tuple[Room, ...] = ()
    taken_names: Collection[str] = ()
    freezes: Freezer | None = None
    warnings: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()


@frozen(kw_only=True)
class CaptureRequest:
    """What to make.

    Attributes:
        run_id: Becomes `Snapshot.id`.
        created_at: Aware UTC.
        freezes: Who makes the guest stand still, as the run's started line has it; None where it does not run.
        freeze_deadline: On trio's clock, where the engine has the guest stand still: the end of its freeze budget. A
            capture that can't be aborted as a whole ends then what of it can be ended: copies.
        meter: Takes how far copies have come, so that whoever waits for the run is told.
    """

    run_id: str
    name: str
    kind: SnapshotKind
    tags: Mapping[str, str]
    created_at: datetime
    freezes: Freezer | None
    freeze_deadline: float | None = field(default=None, eq=False)
    meter: Meter = field(factory=Meter, eq=False)


@frozen
class Captured:
    """A capture that went well.

    Attributes:
        freeze_s: Measured by the hypervisor; None where only the engine can tell.
        warnings: What an operator should know of it.
    """

    snapshot: Snapshot
    freeze_s: float | None = None
    warnings: tuple[str, ...] = ()


@frozen
class Settled:
    """What was found of an interrupted run, and is now in order.

    Attributes:
        snapshot: The complete snapshot of the run, adopted, or None; a partial one is gone.
        resumed: Whether the guest was found frozen by the run and has been resumed.
        freeze_s: How long it was frozen, where that is known; negative where the clock was set back meanwhile.
    """

    snapshot: Snapshot | None = None
    resumed: bool = False
    freeze_s: float | None = None
    notes: tuple[str, ...] = Factory(tuple)


class Backend(Protocol):
    """One hypervisor.

    Every method may raise `BackendError`; anything else is a bug. Cancellation
    passes through at once, except where a method says otherwise. Methods may
    be called at the same time for different instances, and for one instance
    while nothing but `state`, `list_snapshots` and `instances` is under way.
    No method waits longer than its hypervisor does: the caller sets time limits.
    """

    @property
    def name(self) -> str:
        """The backend's name in the config."""

    @property
    def capabilities(self) -> Capabilities:
        """What this backend can do; constant."""

    @property
    def connection(self) -> Mapping[str, Any]:
        """Type and settings, as JSON values, from which `registry.connect` rebuilds this backend in another process."""

    async def open(self, *, first_use: bool) -> None:
        """Make directories that the backend itself needs. Idempotent.

        Args:
            first_use: Nothing was ever captured through this backend. Only then
                may an empty or missing directory be taken for a new one;
                otherwise it is a mount that is missing.

        Raises:
            BackendUnavailable: A directory of an earlier use is missing.
        """

    async def instances(self) -> frozenset[InstanceId]:
        """Instances that the hypervisor knows at the moment.

        Raises:
            BackendUnavailable: It can't be asked, or what would be searched is missing or empty.
        """

    async def state(self, instance: InstanceId) -> Status:
        """State of *instance*, asked anew.

        Raises:
            InstanceNotFound: By an authoritative answer only.
            BackendUnavailable: No answer, or the hypervisor is busy.
        """

    async def prepare(self, instance: InstanceId, kind: SnapshotKind) -> Preparation:
        """Check that a capture is possible, and tell what it needs. Changes nothing.

        Raises:
            BackendUnavailable: Where the snapshot would go is missing; found here, before the freeze.
            Unsupported: This instance can't be captured; the text names why and what to do.
        """

    async def make_ready(self, instance: InstanceId, request: CaptureRequest) -> None:
        """Make ready what the capture needs, while the guest still runs: what takes time must not be left to `pause`.

        Called where the engine freezes, before `pause`, which may not come
        then: `settle` removes what was made ready. Idempotent for a request.

        Raises:
            InvalidState: Not running, or paused by somebody else.
            CaptureFailed: The capture can't be made ready.
        """

    async def pause(self, instance: InstanceId, request: CaptureRequest) -> None:
        """Freeze the guest for the capture of *request*, and return once its vCPUs stand still.

        Made ready first, if it is not. Paused already: no-op, or
        `InvalidState` where the backend can tell that the pause is somebody
        else's.

        Raises:
            InvalidState: Neither running nor paused, or somebody else's pause. The guest was not touched, and is
                not resumed.
            CaptureFailed: The capture can't be made ready. Likewise.
            BackendUnavailable: It may have taken hold; `resume` follows.
        """

    async def resume(self, instance: InstanceId) -> None:
        """Let the guest run again, and return once it does. Already running: no-op.

        Where the backend can tell that the pause is somebody else's, it is left alone.

        Raises:
            InvalidState: Neither paused nor running; there is nothing to resume.
        """

    async def capture(self, instance: InstanceId, request: CaptureRequest) -> Captured:
        """Make the snapshot, as far as the guest has to stand still for it. Until `publish`, nothing of it is listed.

        Where the engine freezes, the guest stands still when this is called
        with the request that `pause` had, and this writes nothing but the
        snapshot. Room that `complete` will fill is taken when this returns. On
        failure and cancellation the partial snapshot is removed as far as that
        takes no time; `settle` removes the rest.

        Raises:
            CaptureFailed: With the hypervisor's reason.
        """

    async def complete(self, captured: Captured) -> Captured:
        """Do the rest of the capture, for which the guest runs again: memory still to be saved, a look at the guest.

        Cancelled, it has the hypervisor end that work; `settle` removes what
        is left. It notices by itself when that work no longer advances.

        Returns:
            What was captured, with its final size.

        Raises:
            CaptureFailed: With the reason; `settle` removes what is left.
        """

    async def publish(self, snapshot: Snapshot) -> None:
        """Make a captured snapshot durable and listed; the guest runs again by now. Idempotent.

        Raises:
            BackendUnavailable: It could not be made durable; it is not listed.
        """

    async def list_snapshots(self, instance: InstanceId) -> tuple[Snapshot, ...]:
        """Complete snapshots that hypemand made of *instance*, oldest first.

        Raises:
            BackendUnavailable: They can't be seen now; never an empty answer instead.
        """

    async def delete_snapshot(self, snapshot: Snapshot) -> None:
        """Delete *snapshot*, durably. Already gone: no error.

        Raises:
            BackendError: The hypervisor refuses; the snapshot is still listed.
        """

    async def settle(self, run: RunStarted, *, ours: bool) -> Settled:
        """Put in order what an interrupted *run* left behind. Idempotent.

        Waits until the hypervisor's own operation for the run is over, resumes
        the guest if this run froze it, adopts a complete snapshot of the run,
        removes a partial one. An instance that is gone has nothing to resume.

        Args:
            ours: A pause that is found can only be the run's. A backend with a
                mark of its own for that goes by the mark.

        Raises:
            BackendUnavailable: Not to be decided now; the run stays open.
        """

    async def aclose(self) -> None:
        """Let go of connections. The backend is not used again."""


@frozen
class Surroundings:
    """What a backend gets from the process that it works in. *state_dir* holds its default directories."""

    state_dir: Path


class BackendType(Protocol):
    """What the table of built-ins, and an entry point of the group ``hypemand.backends``, leads to."""

    @property
    def settings(self) -> type[Any]:
        """An attrs class; its fields are the type's config keys. Structured strictly by `core.structure`."""

    @property
    def build(self) -> Callable[[str, Any, Surroundings], Backend]:
        """Make the backend from its name, its settings and its surroundings. Does no I/O."""
