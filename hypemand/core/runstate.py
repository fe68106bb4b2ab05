"""What a run does, decided from the state of the instance. Nothing else decides it."""

from attrs import frozen

from hypemand.core.errors import StateForbidsRun
from hypemand.core.model import Freezer, InstanceState, SnapshotKind

_KINDS = {
    InstanceState.RUNNING: SnapshotKind.STANDBY,
    InstanceState.STANDBY: SnapshotKind.STANDBY,
    InstanceState.STOPPED: SnapshotKind.STOPPED,
}


@frozen
class Steps:
    """The steps of a run.

    Attributes:
        freezes: Who makes the guest stand still; None where it does not run.
    """

    kind: SnapshotKind
    freezes: Freezer | None

    @property
    def pauses(self) -> bool:
        """Whether the engine pauses the instance before the capture and resumes it after."""
        return self.freezes is Freezer.ENGINE

    def frozen_by(self, freezer: Freezer | None) -> "Steps":
        """The same with *freezer*, where there is one to be named and the guest runs."""
        return Steps(self.kind, freezer) if freezer and self.freezes else self


def decide_steps(state: InstanceState, freezer: Freezer, detail: str = "") -> Steps:
    """The steps for an instance in *state*, by Hypeman's documented rule.

    Args:
        freezer: Who freezes a running guest on this backend.
        detail: The hypervisor's own word for the state, for the error.

    Raises:
        StateForbidsRun: Not Running, Standby or Stopped.
    """
    if state not in _KINDS:
        own_word = f" ({detail})" if detail else ""
        raise StateForbidsRun(
            f"instance is {state}{own_word}: a scheduled snapshot needs it Running, Standby or Stopped"
        )
    return Steps(_KINDS[state], freezer if state is InstanceState.RUNNING else None)
