"""What happens in the engine, told at once to whoever wants to know: metrics, hooks, an operator who waits."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from enum import StrEnum
from typing import Any

import structlog
from attrs import Factory, define, field, frozen

from hypemand.core.model import InstanceId, RunFinished, Snapshot

_log = structlog.get_logger()


class Step(StrEnum):
    """How far a run has come. Each carries the facts named here."""

    WAITING = "waiting"  # error, in_s: it can't start yet, and tries again
    BEGUN = "begun"  # snapshot_name, kind: it is written down, nothing was touched
    PAUSED = "paused"
    COPYING = "copying"  # done_bytes, total_bytes: once a second, where the capture copies for longer
    CAPTURED = "captured"  # size_bytes
    RESUMED = "resumed"  # freeze_s
    LISTED = "listed"  # snapshot_id, snapshot_name, size_bytes: the snapshot is complete and durable
    PRUNED = "pruned"  # snapshot_id, snapshot_name, reasons


@frozen
class RunStepped:
    """A run came to a step."""

    run_id: str
    instance_id: InstanceId
    step: Step
    facts: Mapping[str, Any] = Factory(dict)


@frozen
class RunEnded:
    """A finished line is in the run log."""

    run: RunFinished


@frozen
class SnapshotsListed:
    """The scheduled snapshots that an instance has now, as its backend told."""

    instance_id: InstanceId
    snapshots: tuple[Snapshot, ...]


@frozen
class ClockJumped:
    """The wall clock jumped by *jump*."""

    jump: timedelta


TellStep = Callable[..., None]
"""Takes the step, and its facts as keywords."""


def tell_nobody(step: Step, **facts: Any) -> None:
    """A `TellStep` for who has no listeners."""


Event = RunStepped | RunEnded | SnapshotsListed | ClockJumped
Listener = Callable[[Event], None]
"""Called in the event loop; has to return at once."""


@define(eq=False)
class Events:
    """Tells each listener of each event, in order. A listener that fails stops nobody else."""

    _listeners: list[Listener] = field(factory=list)

    @contextmanager
    def heard_by(self, listener: Listener) -> Iterator[None]:
        """Have *listener* told until the end of the block."""
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)

    def tell(self, event: Event) -> None:
        """Tell all that listen now."""
        for listener in [*self._listeners]:
            try:
                listener(event)
            except Exception:  # noqa: BLE001 - whoever only watches must not stop a run
                _log.exception("internal error of a listener", told=type(event).__name__)
