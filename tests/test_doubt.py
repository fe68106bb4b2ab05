"""What readings of the clocks leave to doubt."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypemand.core.doubt import LONGEST_WAIT, Doubt, Reading, doubts_of

START = datetime(2026, 3, 9, 1, 0, tzinfo=UTC)
HOUR, MINUTE, SECOND = timedelta(hours=1), timedelta(minutes=1), timedelta(seconds=1)


def at(wall: timedelta, boot_s: float | None = None, boot: str = "a") -> Reading:
    return Reading(START + wall, boot if boot_s is not None else "", boot_s)


def seen(*readings: Reading) -> list[Doubt]:
    return doubts_of(readings, readings[-1].boot_s or 0.0)


def test_within_a_boot_time_that_nobody_looked_is_no_doubt_and_a_jump_is_one() -> None:
    assert seen(at(HOUR, 60), at(71 * HOUR, 60 + 70 * 3600)) == []
    assert seen(at(HOUR, 60), at(3 * HOUR, 120)) == [Doubt(120, 2 * HOUR - MINUTE)]
    assert seen(at(3 * HOUR, 60), at(HOUR, 120)) == [Doubt(120, -2 * HOUR - MINUTE)]
    assert seen(at(HOUR, 60), at(HOUR + 90 * SECOND, 120)) == []


def test_within_a_boot_lines_without_its_clock_tell_nothing() -> None:
    assert seen(at(HOUR, 60), at(9 * HOUR), at(HOUR + MINUTE, 120)) == []


def test_from_one_boot_to_the_next_a_step_forward_may_be_downtime_and_one_back_is_a_jump() -> None:
    (ahead,) = seen(at(HOUR, 60), at(3 * HOUR, 10, "b"))
    assert ahead == Doubt(10, 2 * HOUR, may_be_downtime=True)
    assert not ahead.holds(10, 2 * HOUR)
    assert ahead.holds(10 + 7199, HOUR)
    assert not ahead.holds(10 + 7200, HOUR)
    (back,) = seen(at(3 * HOUR, 60), at(HOUR, 10, "b"))
    assert back == Doubt(10, -2 * HOUR)
    assert back.holds(10 + 86399, timedelta(days=30))


def test_a_line_of_the_new_boot_that_does_not_tell_its_clock_hides_no_jump() -> None:
    doubts = seen(at(HOUR, 60), at(9 * HOUR), at(9 * HOUR + MINUTE, 80, "b"), at(10 * HOUR, 80 + 3540, "b"))
    assert doubts == [Doubt(20, 8 * HOUR, may_be_downtime=True), Doubt(80, MINUTE, may_be_downtime=True)]


def test_a_doubt_of_an_earlier_boot_goes_on_in_the_next_until_its_time_is_over() -> None:
    jump = [at(HOUR, 60), at(HOUR + MINUTE + 3 * HOUR, 120)]
    (still, _) = seen(*jump, at(6 * HOUR, 10, "b"))
    assert still == Doubt(10 - (2 * HOUR - MINUTE).total_seconds(), 3 * HOUR)
    assert [doubt.may_be_downtime for doubt in seen(*jump, at(28 * HOUR + MINUTE, 10, "b"))] == [True]


def test_where_no_boot_is_known_the_wall_clock_alone_is_compared() -> None:
    assert seen(at(HOUR), at(2 * HOUR)) == [Doubt(0, HOUR, may_be_downtime=True)]
    assert seen(at(HOUR, 60, ""), at(2 * HOUR, 120, "")) == [Doubt(120, HOUR, may_be_downtime=True)]
    assert seen(at(HOUR, 60)) == []


@given(
    st.lists(
        st.tuples(st.integers(0, 10**6), st.integers(-(10**7), 10**7), st.sampled_from("ab"), st.booleans()),
        min_size=2,
        max_size=12,
    )
)
def test_every_doubt_was_seen_within_a_day_and_is_over_after_another(
    taken: list[tuple[int, int, str, bool]],
) -> None:
    readings = [
        Reading(START + timedelta(seconds=wall), boot if told else "", float(boot_s) if told else None)
        for boot_s, wall, boot, told in taken
    ]
    now_s = 1000.0
    for doubt in doubts_of(readings, now_s):
        assert timedelta(0) <= doubt.age(now_s) < LONGEST_WAIT
        assert abs(doubt.by) > timedelta(seconds=30)
        assert not doubt.holds(now_s + 86400, timedelta(days=365))


@pytest.mark.parametrize("interval", [MINUTE, HOUR, timedelta(days=30)])
def test_a_doubt_holds_for_an_interval_or_its_own_size_and_a_day_at_most(interval: timedelta) -> None:
    for by in (-9 * HOUR, 2 * HOUR, timedelta(days=3652)):
        doubt = Doubt(0, by)
        wait = min(LONGEST_WAIT, max(interval, abs(by)))
        assert doubt.holds(wait.total_seconds() - 1, interval)
        assert not doubt.holds(wait.total_seconds(), interval)
