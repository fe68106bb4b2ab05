"""The real clocks, and the watch over them."""

import time
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
import trio
from trio.testing import MockClock

from hypemand.core.doubt import Reading
from hypemand.engine.clock import ClockWatch, SystemClock, boot_id
from tests.fakes import START, FakeClock

HOUR = timedelta(hours=1)


def test_the_system_clock_is_aware_utc_and_boot_time_moves_on() -> None:
    clock = SystemClock()
    assert abs(clock.now() - datetime.now(UTC)) < timedelta(seconds=5)
    assert clock.now().tzinfo is UTC
    first = clock.boot_s()
    time.sleep(0.01)
    assert clock.boot_s() > first
    assert clock.synchronised() in (True, False, None)


def test_the_zone_follows_tz_and_falls_back_to_utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    try:
        berlin = ZoneInfo("Europe/Berlin")
    except KeyError:
        assert SystemClock().zone() is UTC
    else:
        assert SystemClock().zone() == berlin
    monkeypatch.setenv("TZ", "Nowhere/Atall")
    assert SystemClock().zone() is UTC
    monkeypatch.setenv("TZ", "../../etc/passwd")
    assert SystemClock().zone() is UTC
    monkeypatch.delenv("TZ")
    assert SystemClock().now().astimezone(SystemClock().zone()).utcoffset() is not None


def test_the_boot_id_stays_the_same() -> None:
    assert boot_id() == boot_id()
    assert boot_id()


async def test_a_jump_is_told_once_and_trusted_again_after_an_interval(autojump_clock: MockClock) -> None:
    clock = FakeClock()
    watch = ClockWatch(clock)
    jumps: list[timedelta] = []
    await trio.sleep(5)
    watch.check(jumps.append)
    clock.jump(timedelta(seconds=-40))
    watch.check(jumps.append)
    watch.check(jumps.append)
    assert jumps == [timedelta(seconds=-40)]
    assert watch.why_age_waits(HOUR) is not None
    await trio.sleep(3599)
    assert watch.why_age_waits(HOUR) is not None
    await trio.sleep(1)
    assert watch.why_age_waits(HOUR) is None


async def test_a_drift_of_less_than_half_a_minute_is_no_jump(autojump_clock: MockClock) -> None:
    clock = FakeClock()
    watch = ClockWatch(clock)
    clock.jump(timedelta(seconds=30))
    watch.check(lambda by: pytest.fail(f"a jump by {by}"))
    assert watch.jumps == 0


async def test_pruning_by_age_waits_for_a_day_at_most(autojump_clock: MockClock) -> None:
    clock = FakeClock()
    watch = ClockWatch(clock)
    watch.check_start([Reading(START + HOUR)])
    await trio.sleep(24 * 3600 - 1)
    assert watch.why_age_waits(timedelta(days=30)) is not None
    await trio.sleep(1)
    assert watch.why_age_waits(timedelta(days=30)) is None


async def test_a_start_after_all_that_is_recorded_is_trusted(autojump_clock: MockClock) -> None:
    watch = ClockWatch(FakeClock())
    watch.check_start([Reading(START)])
    watch.check_start([])
    assert watch.why_age_waits(HOUR) is None


async def test_a_small_jump_does_not_end_the_doubt_of_a_large_one(autojump_clock: MockClock) -> None:
    clock = FakeClock()
    watch = ClockWatch(clock)
    for jump in (timedelta(days=3652), timedelta(minutes=-1)):
        clock.jump(jump)
        watch.check(lambda _: None)
    await trio.sleep(24 * 3600 - 1)
    watch.check(lambda by: pytest.fail(f"a jump by {by}"))
    assert watch.why_age_waits(HOUR) is not None
    await trio.sleep(1)
    assert watch.why_age_waits(HOUR) is None
