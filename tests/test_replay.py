"""The run log over the schedules: what a crash kept from a schedule's file is known again."""

from datetime import datetime, timedelta
from typing import Any

import pytest
from attrs import evolve

from hypemand.core.model import InstanceId, Outcome, Retention, RunFinished, RunStarted, Schedule
from hypemand.state.codec import Line
from hypemand.state.replay import advanced, lay_over, remembered, with_outcome
from tests.strategies import NOW, WEB
from tests.test_runlog import finished, started

HOUR = timedelta(hours=1)
DUE = NOW
"""When hypemand starts again."""

SCHEDULE = Schedule(
    instance_id=WEB,
    interval=HOUR,
    retention=Retention(),
    created_at=NOW - timedelta(days=3),
    updated_at=NOW - timedelta(days=3),
    next_run_at=DUE,
    last_run_at=DUE - HOUR,
    last_error="an old error",
    last_snapshot_id="old",
)


def begun(due_at: datetime = DUE, number: int = 1) -> RunStarted:
    at = due_at + timedelta(seconds=1)
    return evolve(started(number), due_at=due_at, started_at=at, next_run_at=due_at + HOUR)


def ended(outcome: Outcome, due_at: datetime = DUE, number: int = 1, **more: Any) -> RunFinished:
    at = due_at + timedelta(seconds=1)
    made = evolve(finished(number), due_at=due_at, started_at=at, finished_at=at + timedelta(seconds=5))
    more.setdefault("error", None if outcome is Outcome.SUCCEEDED else f"{outcome} indeed")
    more.setdefault("snapshot_id", f"run-{number}" if outcome is Outcome.SUCCEEDED else None)
    return evolve(made, outcome=outcome, **more)


def test_a_log_without_lines_changes_nothing() -> None:
    assert lay_over(SCHEDULE, []) == SCHEDULE


def test_a_run_that_was_started_has_used_its_slot_and_changes_nothing_else() -> None:
    assert lay_over(SCHEDULE, [begun()]) == evolve(SCHEDULE, next_run_at=DUE + HOUR)


@pytest.mark.parametrize("lines", [[begun()], []])
def test_a_success_that_the_file_missed_is_told(lines: list[RunStarted]) -> None:
    after = lay_over(SCHEDULE, [*lines, ended(Outcome.SUCCEEDED)])
    assert after == evolve(
        SCHEDULE,
        next_run_at=DUE + HOUR,
        last_run_at=DUE + timedelta(seconds=1),
        last_error=None,
        last_snapshot_id="run-1",
    )


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.INTERRUPTED])
def test_a_failure_that_the_file_missed_keeps_the_last_snapshot(outcome: Outcome) -> None:
    after = lay_over(SCHEDULE, [begun(), ended(outcome)])
    assert after == evolve(
        SCHEDULE,
        next_run_at=DUE + HOUR,
        last_run_at=DUE + timedelta(seconds=1),
        last_error=f"{outcome} indeed",
    )


def test_an_interrupted_run_whose_snapshot_was_adopted_has_it() -> None:
    after = lay_over(SCHEDULE, [begun(), ended(Outcome.INTERRUPTED, snapshot_id="run-1")])
    assert after.last_snapshot_id == "run-1"
    assert after.last_error == "interrupted indeed"


def test_a_success_with_something_to_tell_tells_it() -> None:
    after = lay_over(SCHEDULE, [ended(Outcome.SUCCEEDED, error="prune failed")])
    assert (after.last_error, after.last_snapshot_id) == ("prune failed", "run-1")


def test_a_skip_that_the_file_missed_uses_its_slot_up_and_changes_no_last_field() -> None:
    after = lay_over(SCHEDULE, [ended(Outcome.SKIPPED)])
    assert after == evolve(SCHEDULE, next_run_at=DUE + HOUR)


@pytest.mark.parametrize("outcome", Outcome)
def test_what_the_file_knows_already_is_not_told_again(outcome: Outcome) -> None:
    lines: list[Line] = [begun(), ended(outcome)]
    once = lay_over(SCHEDULE, lines)
    assert lay_over(once, lines) == once
    edited = evolve(once, next_run_at=DUE + 2 * HOUR)
    assert lay_over(edited, lines) == edited


@pytest.mark.parametrize("first", Outcome)
@pytest.mark.parametrize("second", Outcome)
def test_a_file_of_any_age_ends_up_the_same(first: Outcome, second: Outcome) -> None:
    lines: list[Line] = [begun(DUE, 1), ended(first, DUE, 1), begun(DUE + HOUR, 2), ended(second, DUE + HOUR, 2)]
    whole = lay_over(SCHEDULE, lines)
    for known in range(len(lines)):
        assert lay_over(lay_over(SCHEDULE, lines[:known]), lines) == whole


def test_a_slot_that_a_run_has_used_is_not_run_again_and_the_one_after_it_stays_due_in_a_downtime() -> None:
    assert lay_over(SCHEDULE, [begun()]).next_run_at == DUE + HOUR
    assert lay_over(SCHEDULE, [begun(), ended(Outcome.SUCCEEDED)]).next_run_at == DUE + HOUR


def test_a_slot_missed_in_a_downtime_stays_due() -> None:
    before: list[Line] = [begun(DUE - HOUR), ended(Outcome.SUCCEEDED, DUE - HOUR)]
    assert lay_over(SCHEDULE, before).next_run_at == DUE


def test_lines_of_an_earlier_schedule_of_the_instance_are_not_its_own() -> None:
    made_anew = evolve(SCHEDULE, created_at=NOW + timedelta(minutes=1), next_run_at=DUE, last_run_at=None)
    lines: list[Line] = [begun(), ended(Outcome.SUCCEEDED)]
    assert lay_over(made_anew, lines) == made_anew
    at_that_moment = evolve(made_anew, created_at=lines[0].started_at)
    assert lay_over(at_that_moment, lines).last_snapshot_id == "run-1"


def test_a_slot_skipped_while_an_earlier_run_waits_uses_up_only_itself() -> None:
    """The earlier run waits for room; the slot after it comes, and is skipped."""
    skip = ended(Outcome.SKIPPED, DUE + HOUR)
    assert lay_over(SCHEDULE, [skip]) == SCHEDULE
    assert advanced(SCHEDULE, skip).next_run_at == DUE


def test_an_earlier_run_that_ends_late_brings_no_slot_back() -> None:
    ahead = evolve(SCHEDULE, next_run_at=DUE + 3 * HOUR)
    assert advanced(ahead, ended(Outcome.SUCCEEDED)).next_run_at == DUE + 3 * HOUR


def test_a_manual_run_between_slots_leaves_the_next_slot_alone() -> None:
    manual = evolve(begun(DUE - timedelta(minutes=20)))
    after = lay_over(SCHEDULE, [manual, ended(Outcome.SUCCEEDED, manual.due_at)])
    assert after.next_run_at == DUE
    assert after.last_snapshot_id == "run-1"


def test_an_outcome_with_the_start_that_the_file_has_already_is_told() -> None:
    """A run left open has its start in the file before its outcome is known."""
    left_open = evolve(SCHEDULE, last_run_at=DUE + timedelta(seconds=1), last_error="not cleared up yet")
    after = lay_over(left_open, [begun(), ended(Outcome.INTERRUPTED, snapshot_id="run-1")])
    assert after.last_snapshot_id == "run-1"


def test_an_older_failure_does_not_replace_a_newer_success() -> None:
    known = evolve(SCHEDULE, last_run_at=DUE + HOUR, last_error=None, last_snapshot_id="newer")
    after = lay_over(known, [ended(Outcome.FAILED)])
    assert (after.last_run_at, after.last_error, after.last_snapshot_id) == (DUE + HOUR, None, "newer")


def test_an_outcome_keeps_what_is_not_its_business() -> None:
    rich = evolve(SCHEDULE, extra={"later": 1}, metadata={"team": "x"})
    after = with_outcome(rich, ended(Outcome.SUCCEEDED))
    assert (after.extra, after.metadata, after.next_run_at) == ({"later": 1}, {"team": "x"}, DUE)


def test_remembered_is_the_last_run_of_each_instance_with_its_last_snapshot() -> None:
    database = InstanceId("db")
    lines: list[Line] = [
        begun(),
        ended(Outcome.SUCCEEDED, DUE, 1),
        ended(Outcome.FAILED, DUE + HOUR, 2),
        evolve(ended(Outcome.FAILED, DUE, 3), instance_id=database),
        ended(Outcome.SKIPPED, DUE + 2 * HOUR, 4),
        begun(DUE + 3 * HOUR, 5),
    ]
    known = remembered(lines)
    assert known == {
        WEB: ended(Outcome.FAILED, DUE + HOUR, 2, snapshot_id="run-1"),
        database: evolve(ended(Outcome.FAILED, DUE, 3), instance_id=database),
    }
    assert remembered([]) == {}
    assert remembered([ended(Outcome.SKIPPED)]) == {}
