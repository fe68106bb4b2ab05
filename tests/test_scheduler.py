"""The scheduler and whole engine in virtual time: on time, on the grid, nobody held up by somebody else."""

import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import trio
from attrs import evolve

from hypemand.core.cadence import first_run, jitter
from hypemand.core.model import InstanceId
from tests.fakes import START, FakeBackend, FakeClock
from tests.virtual_time import VirtualClock
from tests.world import entry, world

HOUR, MINUTE, DAY = timedelta(hours=1), timedelta(minutes=1), timedelta(days=1)


async def test_the_first_run_now_starts_at_once_and_the_grid_follows(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    async with world(tmp_path, entry("web-1", HOUR, first_run="now")) as w:
        await trio.sleep(2 * 3600 + 60)
        assert [run.due_at for run in w.history()] == [START, START + HOUR, START + 2 * HOUR]
        assert w.outcomes() == ["succeeded"] * 3
        assert all(run.late_s < 0.001 for run in w.history())
        assert w.schedule("web-1").next_run_at == START + 3 * HOUR


async def test_without_first_run_the_cadence_of_hypeman_holds(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    async with world(tmp_path, entry("web-1", HOUR)) as w:
        expected = first_run(InstanceId("web-1"), HOUR, now=START, wanted=None, zone=w.clock.zone())
        assert w.schedule("web-1").next_run_at == expected
        await trio.sleep(3 * 3600)
        assert [run.due_at for run in w.history()] == [expected, expected + HOUR]


@pytest.fixture
def quick_path(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one: this is about schedules, not about disks."""
    in_memory = Path("/dev/shm")
    if not in_memory.is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=in_memory) as made:
        yield Path(made)


async def test_a_week_of_a_hundred_schedules_is_complete_on_time_and_pruned(
    quick_path: Path, virtual_clock: VirtualClock
) -> None:
    entries = [entry(f"vm-{n}", HOUR, max_count=5) for n in range(100)]
    async with world(quick_path, *entries, concurrency=8) as w:
        await trio.sleep(7 * 24 * 3600)
        history = w.history()
        assert {run.outcome for run in history} == {"succeeded"}
        for n in range(100):
            due = [run.due_at for run in history if run.instance_id == f"vm-{n}"]
            first = START + HOUR + jitter(f"vm-{n}", HOUR)
            assert due == [first + k * HOUR for k in range(len(due))]
            assert len(due) == 167
            assert len(w.backend.names(f"vm-{n}")) == 5
        assert w.backend.most_capturing <= 8
        assert w.backend.frozen == set()


async def test_many_due_at_one_instant_all_run_within_the_limit_of_concurrency(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    entries = [entry(f"vm-{n}", HOUR, first_run="now") for n in range(20)]
    async with world(tmp_path, *entries, concurrency=4, fake_concurrency=4) as w:
        await trio.sleep(10)
        assert w.outcomes() == ["succeeded"] * 20
        assert w.backend.most_capturing == 4


async def test_each_backend_has_half_of_the_slots_by_default(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    clock = FakeClock()
    left, right = FakeBackend(clock, name="left"), FakeBackend(clock, name="right")
    left.add(*(f"l-{n}" for n in range(6)))
    right.add(*(f"r-{n}" for n in range(6)))
    entries = [
        entry(f"{side[0]}-{n}", HOUR, first_run="now", backend=side) for n in range(6) for side in ("left", "right")
    ]
    async with world(tmp_path, *entries, backends=[left, right], clock=clock, concurrency=4) as w:
        await trio.sleep(30)
        assert w.outcomes() == ["succeeded"] * 12
        assert (left.most_capturing, right.most_capturing) == (2, 2)


async def test_a_hung_hypervisor_delays_no_other_schedule(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    clock = FakeClock()
    hung, well = FakeBackend(clock, name="hung"), FakeBackend(clock, name="well")
    hung.add(*(f"h-{n}" for n in range(10)))
    well.add(*(f"w-{n}" for n in range(10)))
    for n in range(10):
        hung.fail("state" if n % 2 else "capture", f"h-{n}")
    entries = [entry(f"{b[0]}-{n}", MINUTE, first_run="now", backend=b) for n in range(10) for b in ("hung", "well")]
    budget = timedelta(seconds=30)
    async with world(tmp_path, *entries, backends=[hung, well], clock=clock, concurrency=2, max_freeze=budget):
        await trio.sleep(600)
        for n in range(10):
            times = well.times("capture", f"w-{n}")
            assert len(times) >= 10
            # One slot is left to each backend, so ten captures of a second take up to ten seconds.
            assert all(at - 60 * k < 30 + 10 for k, at in enumerate(times))
        assert hung.longest_frozen <= 31


async def test_a_hung_guest_holds_up_no_other_guest_of_its_own_backend(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    clock = FakeClock()
    fake = FakeBackend(clock)
    fake.add("hung", "well")
    fake.fail("state", "hung")
    entries = [entry(name, MINUTE, first_run="now") for name in ("hung", "well")]
    async with world(tmp_path, *entries, backends=[fake], clock=clock, concurrency=1) as w:
        await trio.sleep(30)
        assert w.outcomes("well") == ["succeeded"]
        assert w.history("well")[0].late_s < 0.001


async def test_a_slot_that_comes_due_during_its_run_is_skipped_and_says_why(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    clock = FakeClock()
    slow = FakeBackend(clock, capture_s=150)
    async with world(
        tmp_path,
        entry("web-1", MINUTE, first_run="now"),
        backends=[slow],
        clock=clock,
        max_freeze=timedelta(minutes=10),
    ) as w:
        slow.add("web-1")
        await trio.sleep(200)
        assert [(str(r.outcome), r.due_at - START) for r in w.history()] == [
            ("skipped", MINUTE),
            ("skipped", 2 * MINUTE),
            ("succeeded", timedelta(0)),
        ]
        assert "still going" in (w.history()[0].error or "")
        schedule = w.schedule("web-1")
        assert schedule.next_run_at == START + 4 * MINUTE, "the run of minute 3 is under way"
        assert schedule.last_error is None


async def test_after_a_downtime_there_is_one_run_and_then_the_grid(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    async with world(tmp_path, entry("web-1", HOUR, first_run="now")) as w:
        await trio.sleep(60)
        kept = w.backend
    clock = FakeClock(start=START + timedelta(hours=10, minutes=20))
    kept.clock = clock
    async with world(tmp_path, entry("web-1", HOUR, first_run="now"), backends=[kept], clock=clock) as w:
        await trio.sleep(60)
        second = w.history()[1]
        assert len(w.history()) == 2
        assert (second.due_at, second.missed) == (START + HOUR, 9)
        assert w.schedule("web-1").next_run_at == START + 11 * HOUR
        await trio.sleep(3600)
        assert w.history()[2].due_at == START + 11 * HOUR


async def test_many_missed_runs_are_spread_within_a_tenth_of_the_smallest_interval(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    entries = [entry(f"vm-{n}", HOUR if n else 10 * MINUTE) for n in range(50)]
    async with world(tmp_path, *entries) as w:
        kept = w.backend
    clock = FakeClock(start=START + DAY)
    kept.clock, kept.calls = clock, []
    began = trio.current_time()
    async with world(tmp_path, *entries, backends=[kept], clock=clock) as w:
        await trio.sleep(200)
        starts = sorted(at - began for at, call, _ in kept.calls if call == "capture")[:50]
        assert len({round(at, 3) for at in starts}) > 20
        first_asked: dict[str, float] = {}
        for at, call, instance in kept.calls:
            if call == "state":
                first_asked.setdefault(instance, at - began)
        assert len(first_asked) == 50
        assert max(first_asked.values()) <= 60
        assert min(first_asked.values()) >= 0


async def test_a_disabled_schedule_does_not_run_and_goes_on_at_the_next_slot_of_its_grid(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    on = entry("web-1", HOUR, first_run="now")
    async with world(tmp_path, on) as w:
        await trio.sleep(60)
        await w.apply(evolve(on, enabled=False))
        await trio.sleep(5 * 3600)
        assert len(w.history()) == 1
        await w.apply(on)
        await trio.sleep(60)
        assert len(w.history()) == 1
        await trio.sleep(3600)
        assert [run.due_at for run in w.history()] == [START, START + 6 * HOUR]


@pytest.mark.parametrize("jump", [HOUR, -HOUR, DAY, -DAY, 3650 * DAY, -3650 * DAY])
async def test_after_a_clock_jump_the_next_run_comes_within_one_interval(
    tmp_path: Path, virtual_clock: VirtualClock, jump: timedelta
) -> None:
    async with world(tmp_path, entry("web-1", HOUR, first_run="now", max_age=2 * HOUR)) as w:
        await trio.sleep(4 * 3600 + 1800)
        kept = set(w.backend.names("web-1"))
        runs = len(w.history())
        w.clock.jump(jump)
        await trio.sleep(3600)
        assert len(w.history()) > runs
        assert w.engine.watch.jumps == 1
        assert kept <= set(w.backend.names("web-1")), "a jump made pruning by age delete something"
        assert w.schedule("web-1").next_run_at - w.clock.now() <= HOUR


async def test_pruning_by_age_goes_on_after_one_clean_interval(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    async with world(tmp_path, entry("web-1", HOUR, first_run="now", max_age=2 * HOUR)) as w:
        await trio.sleep(600)
        w.clock.jump(timedelta(minutes=1))
        await trio.sleep(8 * 3600)
        # Two hours back from the end of the last capture, a second after its start.
        assert len(w.backend.names("web-1")) == 2


async def test_pruning_by_age_waits_while_the_clock_is_not_synchronised(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    clock = FakeClock(synced=False)
    async with world(tmp_path, entry("web-1", HOUR, first_run="now", max_age=2 * HOUR), clock=clock) as w:
        await trio.sleep(5 * 3600 + 60)
        assert len(w.backend.names("web-1")) == 6
        clock.synced = True
        await trio.sleep(3600)
        assert len(w.backend.names("web-1")) == 2


async def test_a_start_with_a_clock_before_the_recorded_past_prunes_nothing_by_age_for_an_interval(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    nightly = entry("web-1", HOUR, first_run="now", max_age=2 * HOUR, max_count=0)
    async with world(tmp_path, nightly) as w:
        await trio.sleep(2 * 3600 + 60)
        kept = w.backend
    clock = FakeClock(start=START - 5 * HOUR)
    kept.clock = clock
    async with world(tmp_path, nightly, backends=[kept], clock=clock) as w:
        assert w.engine.watch.distrusted(HOUR)
        await trio.sleep(1800)
        clock.jump(40 * DAY)
        await trio.sleep(120)
        assert len(kept.names("web-1")) >= 3


async def test_a_next_run_in_the_year_9999_is_brought_back_onto_its_grid(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    async with world(tmp_path, entry("web-1", HOUR, first_run="now")) as w:
        await trio.sleep(60)
        schedule = w.schedule("web-1")
        far = schedule.next_run_at.replace(year=9999)
        await w.engine.store.put(evolve(schedule, next_run_at=far))
        kept = w.backend
    clock = FakeClock(start=START + timedelta(minutes=5))
    kept.clock = clock
    async with world(tmp_path, entry("web-1", HOUR, first_run="now"), backends=[kept], clock=clock) as w:
        await trio.sleep(5)
        assert w.schedule("web-1").next_run_at == START + HOUR
        await trio.sleep(3600)
        assert len(w.history()) == 2


async def test_a_changed_interval_takes_effect_at_once(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    async with world(tmp_path, entry("web-1", DAY)) as w:
        await trio.sleep(60)
        await w.apply(entry("web-1", MINUTE))
        await trio.sleep(300)
        assert len(w.history()) >= 3


async def test_a_schedule_taken_out_no_longer_runs(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    async with world(tmp_path, entry("web-1", MINUTE), entry("web-2", MINUTE)) as w:
        await trio.sleep(100)
        await w.apply(entry("web-2", MINUTE))
        runs = len(w.history("web-1"))
        await trio.sleep(600)
        assert len(w.history("web-1")) == runs
        assert len(w.history("web-2")) > runs
