"""When schedules run: jitter, first run, the grid, and what brings a time back onto it."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from hypemand.core.cadence import Slot, check_first_run, first_run, jitter, jitter_ns, next_slot, reanchor, stale_after
from hypemand.core.duration import parse_ns
from hypemand.core.errors import RuleBroken
from hypemand.core.model import Retention, Schedule, Settings
from tests.strategies import (
    NOW,
    WEB,
    durations,
    instance_ids,
    instants,
    intervals,
    metadata,
    prefixes,
    retentions,
    schedules,
    times_of_day,
)

VECTORS = Path(__file__).parent / "vectors" / "jitter.json"
BERLIN = ZoneInfo("Europe/Berlin")
HOUR = timedelta(hours=1)
TICK = timedelta.resolution
PLAIN = Settings()


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def made(interval: timedelta, next_run_at: datetime, settings: Settings = PLAIN, *, ran: bool = True) -> Schedule:
    return Schedule(
        instance_id=WEB,
        interval=interval,
        retention=Retention(),
        created_at=NOW,
        updated_at=NOW,
        next_run_at=next_run_at,
        last_run_at=NOW - interval if ran else None,
        settings=settings,
    )


def test_a_good_snapshot_is_stale_after_two_intervals_and_the_jitter() -> None:
    hour = timedelta(hours=1)
    assert stale_after("web-1", hour) == 2 * hour + jitter("web-1", hour)
    assert stale_after("web-1", hour) > 2 * hour


def test_jitter_is_that_of_hypeman() -> None:
    vectors = json.loads(VECTORS.read_text(encoding="utf-8"))
    assert len(vectors) > 20
    for row in vectors:
        assert parse_ns(row["interval"]) == row["interval_ns"]
        assert jitter_ns(row["instance_id"], row["interval_ns"]) == row["jitter_ns"], row


@given(instance_ids(), intervals())
def test_jitter_stays_within_a_tenth_of_the_interval_and_five_minutes(instance: str, interval: timedelta) -> None:
    found = jitter(instance, interval)
    assert timedelta(0) <= found < min(interval / 10, timedelta(minutes=5))


def test_jitter_is_cut_to_microseconds() -> None:
    assert jitter_ns("a", parse_ns("1m")) == 2_555_641_996
    assert jitter("a", timedelta(minutes=1)) == timedelta(microseconds=2_555_641)


@pytest.mark.parametrize("interval_ns", [9, 0, -(10**12)])
def test_an_interval_too_short_for_any_jitter_has_none(interval_ns: int) -> None:
    assert jitter_ns("web-1", interval_ns) == 0


def test_jitter_spreads_a_fleet_out() -> None:
    found = sorted(jitter(f"web-{number}", timedelta(hours=24)) for number in range(300))
    for third in range(3):
        window = (timedelta(seconds=100 * third), timedelta(seconds=100 * (third + 1)))
        assert 60 <= sum(window[0] <= one < window[1] for one in found) <= 140


@given(instants(), intervals(), instants())
def test_next_slot_is_always_in_the_future_and_on_the_grid(due: datetime, interval: timedelta, now: datetime) -> None:
    slot = next_slot(due, interval, now)
    assert slot.next_run_at > now
    assert slot.next_run_at > due
    assert (slot.next_run_at - due) % interval == timedelta(0)


@given(instants(), intervals(), instants())
def test_next_slot_is_the_nearest_and_counts_those_passed_over(
    due: datetime, interval: timedelta, now: datetime
) -> None:
    slot = next_slot(due, interval, now)
    assert slot.missed >= 0
    assert slot.next_run_at == due + (slot.missed + 1) * interval
    assert slot.missed == 0 or slot.next_run_at - interval <= now


@given(intervals(), st.integers(0, 30), st.timedeltas(timedelta(0), timedelta(days=366)))
def test_missed_are_the_slots_between_the_due_one_and_now(interval: timedelta, whole: int, more: timedelta) -> None:
    late = whole * interval + more % interval
    passed = [k for k in range(1, 40) if NOW + k * interval <= NOW + late]
    assert next_slot(NOW, interval, NOW + late) == Slot(NOW + (len(passed) + 1) * interval, len(passed))


@pytest.mark.parametrize(
    ("late", "slot"),
    [
        (-2 * HOUR, Slot(NOW + HOUR, 0)),
        (-TICK, Slot(NOW + HOUR, 0)),
        (timedelta(0), Slot(NOW + HOUR, 0)),
        (HOUR - TICK, Slot(NOW + HOUR, 0)),
        (HOUR, Slot(NOW + 2 * HOUR, 1)),
        (HOUR + TICK, Slot(NOW + 2 * HOUR, 1)),
        (2 * HOUR - TICK, Slot(NOW + 2 * HOUR, 1)),
        (timedelta(days=365), Slot(NOW + 8761 * HOUR, 8760)),
    ],
)
def test_after_a_downtime_there_is_one_run_and_then_the_grid(late: timedelta, slot: Slot) -> None:
    assert next_slot(NOW, HOUR, NOW + late) == slot


@given(instants(), intervals(timedelta(days=7)), st.lists(st.timedeltas(timedelta(0), timedelta(days=20)), max_size=20))
def test_late_runs_never_make_the_grid_drift(start: datetime, interval: timedelta, lateness: list[timedelta]) -> None:
    due = start
    for late in lateness:
        ran_at = due + late
        following = next_slot(due, interval, ran_at).next_run_at
        assert ran_at < following <= ran_at + interval
        due = following
    assert (due - start) % interval == timedelta(0)


@given(schedules(), instants())
def test_reanchored_schedules_are_within_reach_and_on_their_own_grid(schedule: Schedule, now: datetime) -> None:
    found = reanchor(schedule, now)
    a_day = timedelta(hours=26) if schedule.last_run_at is None and schedule.settings.first_run is not None else HOUR
    assert found - now <= max(a_day, schedule.interval + jitter(schedule.instance_id, schedule.interval))
    assert found <= schedule.next_run_at
    assert (schedule.next_run_at - found) % schedule.interval == timedelta(0)
    assert found > now or found == schedule.next_run_at
    assert reanchor(evolve(schedule, next_run_at=found), now) == found


@given(intervals(), durations(-timedelta(days=9999), timedelta(days=1)))
def test_a_time_within_reach_is_left_untouched(interval: timedelta, ahead: timedelta) -> None:
    at = NOW + min(ahead, interval + jitter(WEB, interval))
    assert reanchor(made(interval, at), NOW) == at


@given(intervals(), durations(TICK, timedelta(days=2_900_000)))
def test_a_time_out_of_reach_comes_back_to_within_one_interval(interval: timedelta, beyond: timedelta) -> None:
    at = NOW + interval + jitter(WEB, interval) + beyond
    found = reanchor(made(interval, at), NOW)
    assert NOW < found <= NOW + interval
    assert (at - found) % interval == timedelta(0)


def test_a_time_whose_grid_meets_now_comes_back_to_the_slot_after_now() -> None:
    assert reanchor(made(HOUR, NOW + 48 * HOUR), NOW) == NOW + HOUR


def test_a_time_in_the_year_9999_comes_back() -> None:
    assert reanchor(made(HOUR, utc("9999-12-31T23:59:59.999999")), NOW) == utc("2026-03-09T01:59:59.999999")


def test_a_first_run_at_a_time_of_day_is_waited_for_but_only_once() -> None:
    nightly = Settings(first_run="02:00")
    at = NOW + timedelta(hours=26)
    assert reanchor(made(HOUR, at, nightly, ran=False), NOW) == at
    assert reanchor(made(HOUR, at + TICK, nightly, ran=False), NOW) == NOW + TICK
    assert reanchor(made(HOUR, at, nightly, ran=True), NOW) == NOW + HOUR


@pytest.mark.parametrize("wanted", [None, "now"])
def test_other_first_runs_have_no_longer_reach(wanted: str | None) -> None:
    assert reanchor(made(HOUR, NOW + timedelta(hours=20), Settings(first_run=wanted), ran=False), NOW) == NOW + HOUR


@given(schedules(), instants(), retentions(), metadata(), st.none() | prefixes())
def test_retention_metadata_and_prefix_never_move_the_next_run(
    schedule: Schedule, now: datetime, retention: Retention, tags: dict[str, str], prefix: str | None
) -> None:
    changed = evolve(schedule, retention=retention, metadata=tags, name_prefix=prefix)
    assert reanchor(changed, now) == reanchor(schedule, now)


@given(instants(), intervals())
def test_without_a_wish_the_first_run_is_an_interval_and_the_jitter_from_now(
    now: datetime, interval: timedelta
) -> None:
    found = first_run(WEB, interval, now=now, wanted=None, zone=BERLIN)
    assert found == now + interval + jitter(WEB, interval)
    assert reanchor(made(interval, found, ran=False), now) == found


def test_a_first_run_now_is_now() -> None:
    assert first_run(WEB, HOUR, now=NOW, wanted="now", zone=BERLIN) == NOW


@pytest.mark.parametrize(
    ("now", "wanted", "at"),
    [
        # Winter (UTC+1) and summer (UTC+2): later today, or tomorrow, never now itself.
        ("2026-01-10T00:30:00", "02:00", "2026-01-10T01:00:00"),
        ("2026-01-10T01:00:00", "02:00", "2026-01-11T01:00:00"),
        ("2026-01-10T01:00:00.000001", "02:00", "2026-01-11T01:00:00"),
        ("2026-01-10T00:59:59.999999", "02:00", "2026-01-10T01:00:00"),
        ("2026-07-10T00:30:00", "02:00", "2026-07-11T00:00:00"),
        ("2026-07-10T21:59:00", "00:00", "2026-07-10T22:00:00"),
        ("2026-12-31T22:59:00", "23:59", "2027-01-01T22:59:00"),
        # 2026-03-29: 02:00 to 03:00 is left out.
        ("2026-03-28T20:00:00", "02:30", "2026-03-29T01:30:00"),
        ("2026-03-29T01:10:00", "02:30", "2026-03-29T01:30:00"),
        ("2026-03-29T01:30:00", "02:30", "2026-03-30T00:30:00"),
        ("2026-03-29T00:59:00", "03:00", "2026-03-29T01:00:00"),
        ("2026-03-28T02:00:00", "03:00", "2026-03-29T01:00:00"),
        # 2026-10-25: 02:00 to 03:00 comes twice.
        ("2026-10-24T20:00:00", "02:30", "2026-10-25T00:30:00"),
        ("2026-10-24T20:00:00", "03:30", "2026-10-25T02:30:00"),
        ("2026-10-25T01:30:00", "02:30", "2026-10-26T01:30:00"),
        ("2026-10-25T00:00:00", "01:59", "2026-10-26T00:59:00"),
    ],
)
def test_a_first_run_at_a_time_of_day_is_its_next_occurrence_in_the_zone(now: str, wanted: str, at: str) -> None:
    assert first_run(WEB, HOUR, now=utc(now), wanted=wanted, zone=BERLIN) == utc(at)


@given(
    instants(2000, 2036),
    times_of_day(),
    st.sampled_from(
        ["UTC", "Europe/Berlin", "Australia/Lord_Howe", "Pacific/Apia", "Asia/Kathmandu", "America/New_York"]
    ),
    intervals(),
)
def test_a_first_run_at_a_time_of_day_is_within_reach_and_never_reanchored(
    now: datetime, wanted: str, zone: str, interval: timedelta
) -> None:
    found = first_run(WEB, interval, now=now, wanted=wanted, zone=ZoneInfo(zone))
    assert now < found <= now + timedelta(hours=26)
    schedule = made(interval, found, Settings(first_run=wanted), ran=False)
    assert reanchor(schedule, now) == found


@given(instants(2000, 2036), times_of_day())
def test_a_first_run_shows_the_wanted_time_on_local_clocks_but_where_they_leave_it_out(
    now: datetime, wanted: str
) -> None:
    shown = first_run(WEB, HOUR, now=now, wanted=wanted, zone=BERLIN).astimezone(BERLIN)
    if f"{shown:%H:%M}" != wanted:
        an_hour_before = (shown.astimezone(UTC) - HOUR).astimezone(BERLIN)
        assert an_hour_before.utcoffset() != shown.utcoffset()
        assert f"{shown - HOUR:%H:%M}" == wanted


@pytest.mark.parametrize("value", ["now", "00:00", "02:00", "19:59", "23:59"])
def test_now_and_times_of_day_are_accepted_as_first_run(value: str) -> None:
    assert check_first_run(value) == value


@pytest.mark.parametrize(
    "value",
    [
        "",
        "Now",
        "later",
        "2:00",
        "24:00",
        "23:60",
        "02:00:00",
        "0200",
        " 02:00",
        "02:00\n",
        "\u06602:00",
        2,
        None,
        True,
        [],
    ],
)
def test_any_other_first_run_is_refused_with_what_is_wanted(value: object) -> None:
    with pytest.raises(RuleBroken) as caught:
        check_first_run(value)
    assert str(caught.value) == f'{value!r} must be "now" or a local time of day like "02:00"'
