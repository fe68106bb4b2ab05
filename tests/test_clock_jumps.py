"""Wrong clocks: nothing is deleted that true time would keep, runs go on, the log says what was seen, pruning goes on.

True time is trio's clock; the wall clock that the engine sees is jumped about.
"""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
import trio
from attrs import define, field
from structlog.typing import EventDict

from hypemand.backends.base import Settled
from hypemand.config import ScheduleEntry
from hypemand.core.cadence import jitter
from hypemand.core.model import InstanceId, InstanceState, Retention, Snapshot
from hypemand.engine.outside import Tempo
from tests.fakes import START, FakeBackend, FakeClock
from tests.virtual_time import VirtualClock
from tests.world import BOOT_ID, World, entry, world

SECOND, MINUTE, HOUR, DAY = timedelta(seconds=1), timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
WEB = InstanceId("web-1")
TO_1970 = datetime(1970, 1, 1, tzinfo=UTC) - START - 10 * DAY
"""Some days before 1970-01-01, where a jump from any moment of these tests ends."""
JUMPS = {
    "+1h": HOUR,
    "-1h": -HOUR,
    "+1d": DAY,
    "-1d": -DAY,
    "+10y": 3653 * DAY,
    "1970": TO_1970,
}
KEPT = 3
SELDOM = Tempo(discover_s=DAY.total_seconds())


@pytest.fixture(autouse=True)
def looks_every_four_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weeks of virtual time are not to be gone through in steps of 5 s."""
    monkeypatch.setattr("hypemand.engine.scheduler.LONGEST_SLEEP_S", 240.0)


@define(eq=False)
class TrueTime(FakeBackend):
    """Knows when each snapshot was really made, and holds every deletion against that.

    Attributes:
        tolerance: By how much an age may be wrong. A date that is too early by less than an interval, so that it
            still lies after the one before, can't be told from a right one.
    """

    retention: Retention = field(factory=Retention)
    tolerance: timedelta = 2 * SECOND  # a capture takes a second, and its snapshot is dated from its begin
    made: dict[str, datetime] = field(factory=dict)
    wrong: list[str] = field(factory=list)
    deleted: int = 0

    def now(self) -> datetime:
        return START + timedelta(seconds=trio.current_time()) + self.clock.suspended

    async def publish(self, snapshot: Snapshot) -> None:
        self.made[snapshot.id] = self.now()
        await super().publish(snapshot)

    async def delete_snapshot(self, snapshot: Snapshot) -> None:
        held = self.machines[snapshot.instance_id].snapshots
        newer = sum(self.made[other] > self.made[snapshot.id] for other in held)
        too_many = bool(self.retention.max_count) and newer >= (self.retention.max_count or 0)
        age = self.now() - self.made[snapshot.id]
        too_old = self.retention.max_age is not None and age >= self.retention.max_age - self.tolerance
        self.deleted += 1
        if not (too_many or too_old):
            self.wrong.append(f"{snapshot.name} of {self.made[snapshot.id]} at {self.now()}, {newer} newer")
        await super().delete_snapshot(snapshot)

    def ages(self) -> list[timedelta]:
        """How old the snapshots really are that are not dated in the future, youngest first."""
        held = self.machines[WEB].snapshots.values()
        counted = [s for s in held if s.created_at <= self.clock.now() + 5 * MINUTE]
        return sorted(self.now() - self.made[s.id] for s in counted)


RETENTIONS = {
    "age": lambda interval: Retention(max_age=KEPT * interval),
    "count": lambda interval: Retention(max_count=KEPT),
    "both": lambda interval: Retention(max_age=2 * KEPT * interval, max_count=KEPT),
}


@pytest.fixture(params=["1h", "24h"])
def interval(request: pytest.FixtureRequest) -> timedelta:
    return HOUR if request.param == "1h" else DAY


@pytest.fixture(params=list(RETENTIONS))
def retention(request: pytest.FixtureRequest, interval: timedelta) -> Retention:
    return RETENTIONS[request.param](interval)


def trusted_after(jump: timedelta, interval: timedelta) -> timedelta:
    """How long pruning by age waits after *jump*."""
    return min(DAY, max(interval, abs(jump)))


def heard_of(heard: list[EventDict], event: str) -> list[EventDict]:
    return [line for line in heard if line["event"].startswith(event)]


async def runs_within(w: World, interval: timedelta) -> None:
    """A run begins within one interval (and the jitter) of true time, and the minutes until the jump is seen."""
    before = len(w.backend.times("capture", "web-1"))
    most = interval + jitter("web-1", interval) + 5 * MINUTE
    with trio.move_on_after(most.total_seconds()):
        while len(w.backend.times("capture", "web-1")) == before:
            await trio.sleep(60)
    assert len(w.backend.times("capture", "web-1")) > before, f"no run within {most} of {w.clock.now()}"


def check_caught_up(backend: TrueTime, interval: timedelta, jump: timedelta) -> None:
    """Nothing is kept for ever: what was dated by the wrong clock is gone, but for what is dated in the future."""
    ages = backend.ages()
    assert ages[0] <= interval + jitter("web-1", interval)
    if backend.retention.max_count:
        assert len(ages) <= backend.retention.max_count
    if backend.retention.max_age:
        # What was made after a snapshot with too late a date counts as no older than that.
        slack = abs(jump) if abs(jump) <= DAY else timedelta(0)
        assert ages[-1] <= backend.retention.max_age + interval + slack


def schedule_of(interval: timedelta, retention: Retention) -> ScheduleEntry:
    return entry(
        "web-1", interval, first_run="now", max_age=retention.max_age, max_count=retention.max_count, metadata={}
    )


def hypervisor(retention: Retention, tolerance: timedelta = timedelta(0)) -> TrueTime:
    made = TrueTime(FakeClock(), retention=retention, tolerance=2 * SECOND + tolerance)
    made.add("web-1")
    return made


@pytest.mark.parametrize("jump", JUMPS.values(), ids=JUMPS)
@pytest.mark.parametrize("moment", ["idle", "in a run"])
async def test_a_clock_that_jumps_and_jumps_back_has_nothing_deleted_wrongly(  # noqa: PLR0917 - a matrix
    tmp_path: Path,
    virtual_clock: VirtualClock,
    heard_log: list[EventDict],
    interval: timedelta,
    retention: Retention,
    jump: timedelta,
    moment: str,
) -> None:
    too_early = min(-jump, interval + jitter("web-1", interval)) if jump < timedelta(0) else timedelta(0)
    backend = hypervisor(retention, too_early)
    async with world(
        tmp_path, schedule_of(interval, retention), backends=[backend], clock=backend.clock, tempo=SELDOM
    ) as w:
        # Two thirds into an interval; in a run: half a second into one.
        into = 2 / 3 * interval.total_seconds() if moment == "idle" else 0.5
        await trio.sleep(5 * interval.total_seconds() + into)
        assert backend.capturing == (moment != "idle")
        wrong_for = 0.9 * trusted_after(jump, interval)
        w.clock.jump(jump)
        with trio.move_on_after(wrong_for.total_seconds()):
            await runs_within(w, interval)
            await trio.sleep_forever()
        w.clock.jump(-jump)
        await runs_within(w, interval)
        assert backend.wrong == []
        await trio.sleep((trusted_after(jump, interval) + 8 * interval).total_seconds())
        assert backend.wrong == []
        check_caught_up(backend, interval, jump)
        assert backend.deleted > 0
        assert set(w.outcomes()) == {"succeeded"}
    seen = [timedelta(seconds=line["by_s"]) for line in heard_of(heard_log, "the clock jumped")]
    assert [abs(there - wanted) < SECOND for there, wanted in zip(seen, (jump, -jump), strict=True)] == [True, True]


@pytest.mark.parametrize("jump", JUMPS.values(), ids=JUMPS)
@pytest.mark.parametrize("boot", [BOOT_ID, "another boot"])
async def test_a_clock_that_is_wrong_after_a_restart_has_nothing_deleted_wrongly(  # noqa: PLR0917 - a matrix
    tmp_path: Path,
    virtual_clock: VirtualClock,
    heard_log: list[EventDict],
    interval: timedelta,
    retention: Retention,
    jump: timedelta,
    boot: str,
) -> None:
    backend = hypervisor(retention, min(abs(jump), interval + jitter("web-1", interval)))
    hourly = schedule_of(interval, retention)
    async with world(tmp_path, hourly, backends=[backend], clock=backend.clock, tempo=SELDOM) as w:
        await trio.sleep(5.7 * interval.total_seconds())
        names = w.outcomes()
    down = 0.1 * interval
    await trio.sleep(down.total_seconds())
    backend.clock.jump(jump)
    if boot != BOOT_ID:
        backend.clock.reboot()
    async with world(
        tmp_path, hourly, backends=[backend], clock=backend.clock, tempo=SELDOM, first_id=100, boot_id=boot
    ) as w:
        wrong_for = 0.9 * trusted_after(jump, interval)
        with trio.move_on_after(wrong_for.total_seconds()):
            await runs_within(w, interval)
            await trio.sleep_forever()
        assert backend.wrong == []
        w.clock.jump(-jump)
        await runs_within(w, interval)
        await trio.sleep((trusted_after(jump, interval) + 8 * interval).total_seconds())
        assert backend.wrong == []
        check_caught_up(backend, interval, jump)
        assert len(w.outcomes()) > len(names) + 8
    if boot == BOOT_ID:
        (said,) = heard_of(heard_log, "the clock jumped before this start")
        assert abs(timedelta(seconds=said["by_s"]) - jump) < SECOND
    else:  # how long it was down can't be known
        (said,) = heard_of(heard_log, "the clock went far ahead") or heard_of(heard_log, "the clock stands before")
        assert abs(timedelta(seconds=said["by_s"]) - jump) <= interval + down


@pytest.mark.parametrize("jump", [TO_1970, -DAY, 3653 * DAY], ids=["1970", "-1d", "+10y"])
async def test_a_clock_that_stays_where_it_jumped_is_the_right_one_in_the_end(
    tmp_path: Path, virtual_clock: VirtualClock, jump: timedelta
) -> None:
    backend = hypervisor(Retention(max_age=KEPT * HOUR), tolerance=10_000 * DAY)
    wanted = schedule_of(HOUR, backend.retention)
    async with world(tmp_path, wanted, backends=[backend], clock=backend.clock, tempo=SELDOM) as w:
        await trio.sleep(6.5 * 3600)
        w.clock.jump(jump)
        before = backend.deleted
        await trio.sleep(0.95 * DAY.total_seconds())
        assert backend.deleted == before
        await trio.sleep(0.3 * DAY.total_seconds())
        assert backend.deleted > before
        assert len(backend.ages()) == KEPT


async def test_a_week_of_suspend_is_no_jump_makes_one_run_and_prunes_by_age(
    tmp_path: Path, virtual_clock: VirtualClock, heard_log: list[EventDict]
) -> None:
    backend = hypervisor(Retention(max_age=10 * DAY))
    wanted = schedule_of(DAY, backend.retention)
    async with world(tmp_path, wanted, backends=[backend], clock=backend.clock, tempo=SELDOM) as w:
        await trio.sleep(5.5 * DAY.total_seconds())
        w.clock.suspend(7 * DAY)
        await trio.sleep(600)
        assert len(w.history()) == 7, "one for the week"
        assert w.history()[-1].missed == 6
        assert w.schedule("web-1").next_run_at == START + 13 * DAY
        assert backend.deleted == 3, "those of the days 0, 1 and 2"
        await trio.sleep(DAY.total_seconds())
        assert w.history()[-1].due_at == START + 13 * DAY
        assert backend.wrong == []
        assert w.engine.watch.jumps == 0
    assert heard_of(heard_log, "the clock jumped") == []


@pytest.mark.parametrize(
    ("zone", "day", "first"),
    [
        # The night in which 02:30 does not exist: what it would have been by the time before.
        ("Europe/Berlin", "2026-03-28T12:00Z", "2026-03-29T01:30Z"),
        ("America/New_York", "2026-03-07T12:00Z", "2026-03-08T07:30Z"),
        # The night in which it comes twice: the first of both.
        ("Europe/Berlin", "2026-10-24T12:00Z", "2026-10-25T00:30Z"),
        ("America/New_York", "2026-10-31T12:00Z", "2026-11-01T07:30Z"),
    ],
)
async def test_over_a_change_to_or_from_summer_time_daily_runs_stay_a_day_apart(  # noqa: PLR0917 - as above
    tmp_path: Path, virtual_clock: VirtualClock, heard_log: list[EventDict], zone: str, day: str, first: str
) -> None:
    clock = FakeClock(start=datetime.fromisoformat(day), local=ZoneInfo(zone))
    expected = datetime.fromisoformat(first)
    daily = entry("web-1", DAY, first_run="02:30", max_age=4 * DAY)
    async with world(tmp_path, daily, clock=clock, tempo=SELDOM) as w:
        assert w.schedule("web-1").next_run_at == expected
        await trio.sleep(8 * DAY.total_seconds())
        assert [run.due_at for run in w.history()] == [expected + n * DAY for n in range(len(w.history()))]
        assert len(w.history()) == 8
        assert len(w.backend.names("web-1")) == 4
    assert heard_of(heard_log, "the clock jumped") == []


async def test_daily_runs_begun_before_a_change_to_summer_time_keep_their_hour_of_utc(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    clock = FakeClock(start=datetime(2026, 3, 26, 12, tzinfo=UTC), local=ZoneInfo("Europe/Berlin"))
    async with world(tmp_path, entry("web-1", DAY, first_run="02:30"), clock=clock, tempo=SELDOM) as w:
        await trio.sleep(6 * DAY.total_seconds())
        assert [f"{run.due_at:%H:%M}" for run in w.history()] == ["01:30"] * 6


async def test_a_name_that_was_taken_under_another_clock_moves_on(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    backend = hypervisor(Retention(max_count=10))
    wanted = schedule_of(HOUR, backend.retention)
    async with world(tmp_path, wanted, backends=[backend], clock=backend.clock, tempo=SELDOM) as w:
        await trio.sleep(2.5 * 3600)
        for _ in range(3):
            w.clock.jump(-HOUR)  # each time the same hour comes again
            await trio.sleep(3600)
        names = backend.names("web-1")
        assert len(names) == len(set(names)) == 6
        assert set(w.outcomes()) == {"succeeded"}


async def test_what_a_wrong_clock_recorded_is_not_held_against_a_right_one_for_ever(
    tmp_path: Path, virtual_clock: VirtualClock, heard_log: list[EventDict]
) -> None:
    backend = hypervisor(Retention(max_age=3 * HOUR))
    wanted = schedule_of(HOUR, backend.retention)
    async with world(tmp_path, wanted, backends=[backend], clock=backend.clock, tempo=SELDOM) as w:
        await trio.sleep(2.5 * 3600)
        w.clock.jump(3653 * DAY)
        await trio.sleep(3600)
    backend.clock.jump(-3653 * DAY)
    for number in (1, 2):
        heard_log.clear()
        async with world(
            tmp_path, wanted, backends=[backend], clock=backend.clock, tempo=SELDOM, first_id=100 * number
        ) as w:
            await trio.sleep(1.2 * 3600)
        assert len(heard_of(heard_log, "the clock stands before")) == (number == 1)
    assert backend.wrong == []


async def test_a_guest_frozen_while_the_clock_is_set_back_is_recorded_without_a_negative_length(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    backend = hypervisor(Retention(max_count=10))
    backend.capture_s = 10_000
    wanted = schedule_of(HOUR, backend.retention)
    async with world(tmp_path, wanted, backends=[backend], clock=backend.clock, tempo=SELDOM) as w:
        await trio.sleep(10)
        started = w.engine.runlog.open_runs[0]
        w.clock.jump(-DAY)
        settled = w.engine.recovery._interrupted(started, Settled(resumed=True))
        assert settled.freeze_s is None
        assert "the clock was set back" in (settled.error or "")
        assert backend.machines[WEB].state is InstanceState.PAUSED
