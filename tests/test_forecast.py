"""What a schedule is foretold to do, against a simulation minute by minute."""

from collections.abc import Sequence
from datetime import datetime, timedelta

from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from hypemand.core.forecast import PlannedRun, forecast
from hypemand.core.model import Retention, Schedule, Snapshot, SnapshotKind
from hypemand.core.naming import scheduled_tags
from hypemand.core.retention import CLOCK_SLACK
from tests.strategies import NOW, WEB, metadata, prefixes, small_retentions, snapshot_lists

MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)


def made(interval: timedelta, next_run_at: datetime, retention: Retention | None = None) -> Schedule:
    return Schedule(
        instance_id=WEB,
        interval=interval,
        retention=retention or Retention(),
        created_at=NOW,
        updated_at=NOW,
        next_run_at=next_run_at,
    )


def simulated(
    schedule: Schedule, snapshots: Sequence[Snapshot], within: timedelta
) -> list[tuple[datetime, set[datetime]]]:
    """Time of each run and the times of what it prunes, found by waiting for each minute."""
    runs = []
    kept = [one.created_at for one in snapshots]
    due, minute = schedule.next_run_at, NOW
    while minute <= NOW + within:
        if due <= minute:
            kept.append(minute)
            past = sorted((at for at in kept if at <= minute + CLOCK_SLACK), reverse=True)
            gone = set(past[schedule.retention.max_count :]) if schedule.retention.max_count else set()
            if schedule.retention.max_age:
                gone |= {at for at in past if minute - at > schedule.retention.max_age}
            gone -= {minute}
            kept = [at for at in kept if at not in gone]
            runs.append((minute, gone))
            while due <= minute:
                due += schedule.interval
        minute += MINUTE
    return runs


@given(
    st.integers(1, 60),
    st.integers(-90, 60),
    small_retentions(),
    snapshot_lists(most=8),
    st.integers(0, 120),
)
def test_the_forecast_is_what_a_simulation_does(
    interval: int, ahead: int, retention: Retention, snapshots: list[Snapshot], within: int
) -> None:
    # Half a minute off the runs, and no two at once: then times tell the snapshots apart.
    apart = {one.created_at: one for one in snapshots}
    existing = [evolve(one, created_at=at + MINUTE / 2) for at, one in apart.items()]
    schedule = made(interval * MINUTE, NOW + ahead * MINUTE, retention)
    planned = forecast(schedule, existing, now=NOW, within=within * MINUTE)
    assert [(run.at, {one.snapshot.created_at for one in run.prunes}) for run in planned] == simulated(
        schedule, existing, within * MINUTE
    )


@given(snapshot_lists(), small_retentions(), prefixes(), metadata(), st.integers(-300, 60))
def test_retention_metadata_and_prefix_never_move_the_runs(
    snapshots: list[Snapshot], retention: Retention, prefix: str, tags: dict[str, str], ahead: int
) -> None:
    schedule = made(HOUR, NOW + ahead * MINUTE)
    changed = evolve(schedule, retention=retention, name_prefix=prefix, metadata=tags)

    def times(one: Schedule) -> list[datetime]:
        return [run.at for run in forecast(one, snapshots, now=NOW, within=10 * HOUR)]

    assert len(times(schedule)) >= 9
    assert times(changed) == times(schedule)


def test_an_overdue_run_is_due_now_and_the_rest_stays_on_the_grid() -> None:
    planned = list(forecast(made(HOUR, NOW - 10.5 * HOUR), [], now=NOW, within=2 * HOUR))
    assert planned == [
        PlannedRun(NOW, "scheduled-20260309-010000", ()),
        PlannedRun(NOW + HOUR / 2, "scheduled-20260309-013000", ()),
        PlannedRun(NOW + 1.5 * HOUR, "scheduled-20260309-023000", ()),
    ]


def test_runs_at_the_end_of_the_time_asked_for_are_within_it() -> None:
    schedule = made(HOUR, NOW + HOUR)
    assert [run.at for run in forecast(schedule, [], now=NOW, within=2 * HOUR)] == [NOW + HOUR, NOW + 2 * HOUR]
    assert list(forecast(schedule, [], now=NOW, within=HOUR - timedelta.resolution)) == []


def test_planned_snapshots_are_pruned_by_later_runs_with_reasons() -> None:
    schedule = evolve(made(HOUR, NOW, Retention(max_count=2)), name_prefix="nightly", metadata={"team": "backend"})
    runs = list(forecast(schedule, [], now=NOW, within=3 * HOUR))
    assert [[one.snapshot.name for one in run.prunes] for run in runs] == [
        [],
        [],
        ["nightly-20260309-010000"],
        ["nightly-20260309-020000"],
    ]
    (pruned,) = runs[2].prunes
    assert pruned.reasons == ("max_count 2: it is number 3, counted from the newest",)
    assert pruned.snapshot.tags == scheduled_tags(WEB, {"team": "backend"})


def test_a_name_that_is_taken_moves_on_in_the_forecast_too() -> None:
    (run,) = forecast(made(HOUR, NOW), [], now=NOW, within=timedelta(0))
    there = Snapshot(
        id="run-1",
        instance_id=WEB,
        name=run.snapshot_name,
        kind=SnapshotKind.STANDBY,
        created_at=NOW - HOUR,
        size_bytes=1,
        tags=scheduled_tags(WEB, {}),
    )
    (again,) = forecast(made(HOUR, NOW), [there], now=NOW, within=timedelta(0))
    assert (run.snapshot_name, again.snapshot_name) == ("scheduled-20260309-010000", "scheduled-20260309-010001")
