"""What a run does in each state of the instance."""

import pytest

from hypemand.core.errors import HypemandError, StateForbidsRun
from hypemand.core.model import Freezer, InstanceState, SnapshotKind
from hypemand.core.runstate import Steps, decide_steps

ALLOWED = {
    InstanceState.RUNNING: SnapshotKind.STANDBY,
    InstanceState.STANDBY: SnapshotKind.STANDBY,
    InstanceState.STOPPED: SnapshotKind.STOPPED,
}


@pytest.mark.parametrize("freezer", Freezer)
@pytest.mark.parametrize(("state", "kind"), ALLOWED.items())
def test_the_state_decides_the_kind_and_only_a_running_guest_is_frozen(
    state: InstanceState, kind: SnapshotKind, freezer: Freezer
) -> None:
    freezes = freezer if state is InstanceState.RUNNING else None
    assert decide_steps(state, freezer) == Steps(kind, freezes)


@pytest.mark.parametrize("freezer", Freezer)
@pytest.mark.parametrize("state", InstanceState)
def test_the_engine_pauses_a_running_guest_where_it_freezes_and_nothing_else(
    state: InstanceState, freezer: Freezer
) -> None:
    if state in ALLOWED:
        wanted = state is InstanceState.RUNNING and freezer is Freezer.ENGINE
        assert decide_steps(state, freezer).pauses is wanted
    else:
        with pytest.raises(StateForbidsRun):
            decide_steps(state, freezer)


@pytest.mark.parametrize("freezer", Freezer)
@pytest.mark.parametrize("state", [state for state in InstanceState if state not in ALLOWED])
def test_any_other_state_forbids_the_run_and_names_itself_and_the_three(state: InstanceState, freezer: Freezer) -> None:
    with pytest.raises(HypemandError) as caught:
        decide_steps(state, freezer)
    assert str(caught.value) == f"instance is {state.value}: a scheduled snapshot needs it Running, Standby or Stopped"


@pytest.mark.parametrize("named", [*Freezer, None])
@pytest.mark.parametrize("steps", [Steps(kind, freezes) for kind in SnapshotKind for freezes in (*Freezer, None)])
def test_a_backend_may_name_another_freezer_for_a_guest_that_runs_and_for_no_other(
    steps: Steps, named: Freezer | None
) -> None:
    wanted = named if named is not None and steps.freezes is not None else steps.freezes
    assert steps.frozen_by(named) == Steps(steps.kind, wanted)


def test_the_hypervisors_own_word_is_told() -> None:
    with pytest.raises(StateForbidsRun, match=r"^instance is Unknown \(io-error\): a scheduled snapshot needs"):
        decide_steps(InstanceState.UNKNOWN, Freezer.ENGINE, "io-error")
