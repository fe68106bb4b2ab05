"""What must hold after a run with a fault, whatever the fault and wherever it was."""

from hypemand.conformance.acts import listed
from hypemand.conformance.bench import Bench
from hypemand.conformance.steps import Step
from hypemand.conformance.subject import Subject
from hypemand.core.model import Outcome, RunFinished


async def check_order(subject: Subject, bench: Bench, step: Step) -> None:
    """Check that the second run of *bench*, which had a fault at *step*, left all in order."""
    assert bench.open_runs() == [], "an open run is left"
    history = bench.history()
    assert len(history) == 2, f"one good run, and one with a fault: {history}"
    assert len({run.run_id for run in history}) == 2, "a run is in the history twice"
    first, faulty = history
    assert first.outcome is Outcome.SUCCEEDED, first.error
    assert faulty.error is not None or faulty.outcome is Outcome.SUCCEEDED
    assert await subject.leftovers() == [], "something partial is left"
    await _check_snapshots(subject, history, step)


async def _check_snapshots(subject: Subject, history: list[RunFinished], step: Step) -> None:
    snapshots = {snapshot.id: snapshot for snapshot in await listed(subject)}
    taken = {run.snapshot_id for run in history if run.snapshot_id is not None}
    pruned = {pruned.snapshot_id for run in history for pruned in run.pruned}
    assert snapshots.keys() <= taken, "a snapshot is listed that no run tells of"
    missing = taken - pruned - snapshots.keys()
    # A deletion that was cut short may have been done all the same.
    unsure = {history[0].snapshot_id} if step.method == "delete_snapshot" else set()
    assert missing <= unsure, "a snapshot is gone that nobody pruned"
    names = [snapshot.name for snapshot in snapshots.values()]
    assert len(set(names)) == len(names), "two snapshots have one name"
    for snapshot in snapshots.values():
        assert snapshot.size_bytes > 0
        assert snapshot.restore != ()
        await subject.backend.publish(snapshot)
    assert {snapshot.id for snapshot in await listed(subject)} == snapshots.keys(), "published again, it is not listed"


async def check_next(subject: Subject, bench: Bench) -> None:
    """Check that the third run went as if nothing had ever been."""
    assert bench.open_runs() == []
    third = bench.history()[-1]
    assert len(bench.history()) == 3
    assert (third.outcome, third.error) == (Outcome.SUCCEEDED, None), "the next run fails"
    assert [snapshot.id for snapshot in await listed(subject)] == [third.snapshot_id], "retention keeps one snapshot"
    assert await subject.leftovers() == []
    assert await subject.guest_runs(), "the guest stands still after the next run"
