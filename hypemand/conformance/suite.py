"""The cases of a backend, and the test function that runs them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from hypemand.conformance import (
    promises_of_freezing,
    promises_of_settling,
    promises_of_snapshots,
    promises_of_state,
)
from hypemand.conformance.leaping import LeapingClock
from hypemand.conformance.matrix import fault_cases
from hypemand.conformance.subject import Case, Subject, SubjectMaker, Traits
from hypemand.core.model import Freezer, SnapshotKind


def conformance(subject: SubjectMaker, traits: Traits = Traits()) -> Callable[[Case, Path], None]:  # noqa: B008 - frozen
    """A pytest test function with a case for each promise, and for each fault at each step of a run.

    Assign it to a name that pytest takes for a test's. Each case gets a
    subject of its own.

    Args:
        subject: Makes the backend and its guest.
        traits: What the backend does differently from most.
    """

    @pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in conformance_cases(traits)])
    def test_conformance(case: Case, tmp_path: Path) -> None:
        run_case(case, subject, tmp_path)

    return test_conformance


def conformance_cases(traits: Traits = Traits()) -> list[Case]:  # noqa: B008 - frozen
    """Every case that applies to a backend of *traits*."""
    cases = [
        _case_of(traits),
        *promises_of_state.promise,
        *promises_of_freezing.promise,
        *promises_of_snapshots.promise,
        *promises_of_settling.promise,
        *fault_cases(),
    ]
    return [case for case in cases if case.applies(traits)]


def _case_of(traits: Traits) -> Case:
    """So that no case is left out by mistake."""

    async def check(subject: Subject, directory: Path) -> None:
        del directory
        able = subject.backend.capabilities
        assert able.freezes is traits.freezes, f"the backend says freezes={able.freezes}, its traits {traits.freezes}"
        assert SnapshotKind.STANDBY in able.kinds, "a guest that runs can't be captured"
        assert (subject.catalog is not None) == traits.catalog, "traits.catalog is not what Subject.catalog says"
        assert traits.pauses or able.freezes is Freezer.HYPERVISOR, "the engine can't freeze without a pause"

    return Case("promise-its-traits-are-what-the-backend-says", check)


def run_case(case: Case, subject: SubjectMaker, directory: Path) -> None:
    """Run *case* on a new subject in *directory*, which is empty."""
    home, own = directory / "subject", directory / "case"
    home.mkdir(parents=True)
    own.mkdir()
    trio.run(_run, case, subject, home, own, clock=LeapingClock())


async def _run(case: Case, subject: SubjectMaker, home: Path, own: Path) -> None:
    async with subject(home) as made:
        try:
            await case.check(made, own)
        finally:
            with trio.CancelScope(shield=True):
                if made.slow_backend is not None:
                    await made.slow_backend.aclose()
                await made.backend.aclose()
