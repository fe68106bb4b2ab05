"""Snapshots kept, as the metrics tell them: asked for in the background, and unknown where nobody answers."""

import itertools
from datetime import timedelta
from pathlib import Path

import trio
from attrs import evolve
from trio.testing import MockClock

from hypemand.backends.base import BackendUnavailable
from hypemand.core.model import InstanceId
from hypemand.surface.metrics.kept import AT_A_TIME, KeptSnapshots
from tests.fakes import FakeBackend, FakeClock
from tests.metered import HOUR, SOON, metered, now_and_then
from tests.prometheus import scrape
from tests.world import entry, world


async def test_snapshots_kept_follow_the_runs(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with metered(tmp_path, now_and_then(max_count=2)) as (_, metrics):
        kept = []
        for _ in range(4):
            await trio.sleep(3600)
            page = await scrape(metrics)
            kept.append(
                (page.value("hypemand_snapshots_kept", "web-1"), page.value("hypemand_snapshots_kept_bytes", "web-1"))
            )
    assert kept == [(1, 100), (2, 200), (2, 200), (2, 200)]
    assert page.value("hypemand_snapshots_pruned_total", "web-1") == 2


async def test_snapshots_deleted_by_hand_are_noticed_within_an_hour_or_two(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with metered(tmp_path, entry("web-1", timedelta(days=1), first_run="now")) as (made, metrics):
        await trio.sleep(SOON)
        assert (await scrape(metrics)).value("hypemand_snapshots_kept", "web-1") == 1
        made.backend.machines[InstanceId("web-1")].snapshots.clear()
        await trio.sleep(2 * 3600)
        assert (await scrape(metrics)).value("hypemand_snapshots_kept", "web-1") == 0


async def test_a_hung_hypervisor_holds_no_scrape_up_and_its_snapshots_are_unknown(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    clock = FakeClock()
    hung, well = FakeBackend(clock, "hung"), FakeBackend(clock, "well")
    hung.add("web-1", "web-2")
    well.add("db-1")
    hung.fail("list_snapshots", "*")
    entries = [entry(name, HOUR, backend="hung") for name in ("web-1", "web-2")] + [entry("db-1", HOUR, backend="well")]
    async with metered(tmp_path, *entries, clock=clock, backends=[hung, well]) as (_, metrics):
        await trio.sleep(1)
        before = trio.current_time()
        page = await scrape(metrics)
        assert trio.current_time() == before
        hung.heal("list_snapshots", "*")
        await trio.sleep(120)
        healed = await scrape(metrics)
    assert page.value("hypemand_snapshots_kept", "web-1") is None
    assert page.value("hypemand_snapshots_kept_bytes", "web-2") is None
    assert page.value("hypemand_snapshots_kept", "db-1") == 0
    assert page.value("hypemand_next_run_seconds", "web-1") is not None
    assert healed.value("hypemand_snapshots_kept", "web-1") == healed.value("hypemand_snapshots_kept", "web-2") == 0


async def test_what_a_backend_can_no_longer_tell_is_missing_again(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with metered(tmp_path, entry("web-1", timedelta(days=1), first_run="now")) as (made, metrics):
        await trio.sleep(SOON)
        made.backend.fail("list_snapshots", "web-1", BackendUnavailable("not mounted"))
        await trio.sleep(2 * 3600)
        assert (await scrape(metrics)).value("hypemand_snapshots_kept", "web-1") is None


async def test_snapshots_of_an_instance_that_comes_back_are_asked_for_anew(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with metered(tmp_path, now_and_then()) as (made, metrics):
        await trio.sleep(SOON)
        await made.apply()
        made.backend.machines[InstanceId("web-1")].snapshots.clear()
        await trio.sleep(120)
        await made.apply(now_and_then())
        at_once = await scrape(metrics)
        await trio.sleep(120)
        asked = await scrape(metrics)
    assert at_once.value("hypemand_snapshots_kept", "web-1") is None
    assert asked.value("hypemand_snapshots_kept", "web-1") == 0


async def test_no_hypervisor_is_asked_during_a_run_nor_twice_at_once(tmp_path: Path, autojump_clock: MockClock) -> None:
    names = [f"web-{number}" for number in range(8)]
    clock = FakeClock()
    busy, hung = FakeBackend(clock, "busy"), FakeBackend(clock, "hung")
    busy.add("db-1")
    hung.add(*names)
    hung.fail("list_snapshots", "*")
    entries = [entry(name, timedelta(days=1), backend="hung") for name in names]
    entries.append(entry("db-1", HOUR, first_run="now", backend="busy"))
    async with metered(tmp_path, *entries, clock=clock, backends=[busy, hung]):
        await trio.sleep(SOON)
        busy.capture_s = 100.0
        await trio.sleep(3600 + 200)
    assert not [at for at in busy.times("list_snapshots", "db-1") if 3600 <= at < 3700]
    asked = [at for at, call, _ in hung.calls if call == "list_snapshots"]
    assert len(asked) > 50
    assert min(after - before for before, after in itertools.pairwise(asked)) >= 10


async def test_what_hangs_is_asked_once_in_a_round_and_keeps_no_other_instance_unknown(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    names = [f"web-{number}" for number in range(20)]
    hung = names[:3]
    async with metered(tmp_path, *[entry(name, timedelta(days=1)) for name in names]) as (made, metrics):
        for name in hung:
            made.backend.fail("list_snapshots", name)
        await trio.sleep(600)
        page = await scrape(metrics)
        asked = sum(len(made.backend.times("list_snapshots", name)) for name in hung)
    assert [name for name in names if page.value("hypemand_snapshots_kept", name) is None] == hung
    assert len(hung) <= asked <= 11


async def test_a_bug_in_a_backend_stops_no_counting(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with metered(tmp_path, entry("web-1", HOUR), entry("web-2", HOUR)) as (made, metrics):
        made.backend.fail("list_snapshots", "web-1", RuntimeError("a bug"), times=1)
        await trio.sleep(1)
        first = await scrape(metrics)
        await trio.sleep(100)
        second = await scrape(metrics)
    assert first.value("hypemand_snapshots_kept", "web-1") is None
    assert first.value("hypemand_snapshots_kept", "web-2") == 0
    assert second.value("hypemand_snapshots_kept", "web-1") == 0


async def test_an_answer_that_comes_after_a_run_has_told_better_is_dropped(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with metered(tmp_path, entry("web-1", HOUR)) as (made, metrics):
        made.backend.fail("list_snapshots", "web-1", times=1)  # the question at the start gets no answer for 10 s
        await trio.sleep(1)
        assert await made.engine.scheduler.begin_now(made.schedule("web-1")).ended() is not None
        await trio.sleep(20)
        assert (await scrape(metrics)).value("hypemand_snapshots_kept", "web-1") == 1


async def test_looking_through_many_schedules_lets_others_have_their_turns(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with world(tmp_path, entry("web-1", HOUR)) as w:
        of_web = w.schedule("web-1")
        for number in range(6 * AT_A_TIME):
            w.engine.store.remember(evolve(of_web, instance_id=InstanceId(f"many-{number}")))
        kept, turns = KeptSnapshots(w.engine), 0
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def take_turns() -> None:
                nonlocal turns
                while True:
                    turns += 1
                    await trio.lowlevel.checkpoint()

            asked = await kept._to_ask()
            nursery.cancel_scope.cancel()
    assert len(asked["fake"]) == 6 * AT_A_TIME + 1
    assert turns >= 10  # once for each 500 that were looked through, twice
