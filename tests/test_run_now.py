"""A run that somebody asks for: beside the schedule's slots, told step by step."""

from datetime import timedelta
from pathlib import Path

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from hypemand.core.model import InstanceId, Outcome, RunFinished, Trigger
from hypemand.engine.events import Event, RunEnded, RunStepped, SnapshotsListed
from hypemand.engine.refusals import ConflictError, NotFoundError, UnavailableError
from hypemand.engine.requests import Requests
from tests.world import World, entry, world

WEB = InstanceId("web-1")
HOUR = timedelta(hours=1)


async def run_now(made: World, instance: InstanceId) -> RunFinished | None:
    await made.engine.scheduler.serving.wait()
    return await Requests(made.engine).run_now(instance)


async def test_a_run_by_hand_leaves_the_next_slot_where_it_is(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path, entry("web-1", HOUR)) as made:
        before = made.schedule("web-1").next_run_at
        run = await run_now(made, WEB)
        assert run is not None
        assert (run.outcome, run.trigger, run.missed) == (Outcome.SUCCEEDED, Trigger.MANUAL, 0)
        after = made.schedule("web-1")
        assert after.next_run_at == before
        assert (after.last_snapshot_id, after.last_run_at) == (run.snapshot_id, run.started_at)


async def test_a_run_by_hand_uses_up_no_slot_after_a_crash(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path, entry("web-1", HOUR)) as made:
        await run_now(made, WEB)
        due = made.schedule("web-1").next_run_at
        clock = made.clock
    async with world(tmp_path, entry("web-1", HOUR), clock=clock, first_id=10) as made:
        assert made.schedule("web-1").next_run_at == due


async def test_each_step_of_a_run_is_told_in_order(tmp_path: Path, autojump_clock: MockClock) -> None:
    told: list[Event] = []
    async with world(tmp_path, entry("web-1", HOUR, max_count=1)) as made:
        await run_now(made, WEB)
        with made.engine.events.heard_by(told.append):
            run = await run_now(made, WEB)
    assert run is not None
    steps = [str(event.step) for event in told if isinstance(event, RunStepped)]
    assert steps == ["begun", "paused", "captured", "resumed", "listed", "pruned"]
    assert {event.run_id for event in told if isinstance(event, RunStepped)} == {run.run_id}
    assert told[-1] == RunEnded(run)
    listed = [event for event in told if isinstance(event, SnapshotsListed)]
    assert [len(event.snapshots) for event in listed] == [2, 1]


async def test_a_listener_that_fails_stops_no_run(tmp_path: Path, autojump_clock: MockClock) -> None:
    def broken(event: Event) -> None:
        raise RuntimeError("broken")

    async with world(tmp_path, entry("web-1", HOUR)) as made:
        with made.engine.events.heard_by(broken):
            run = await run_now(made, WEB)
        assert run is not None
        assert run.outcome is Outcome.SUCCEEDED


async def test_a_second_run_at_the_same_time_is_refused_for_now(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path, entry("web-1", HOUR)) as made, trio.open_nursery() as nursery:
        nursery.start_soon(run_now, made, WEB)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(ConflictError, match=r"asked for at .* still going") as refused:
            await run_now(made, WEB)
        assert not refused.value.lasting


async def test_a_run_goes_on_when_who_asked_for_it_has_gone(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path, entry("web-1", HOUR)) as made:
        with trio.move_on_after(0.1):
            await run_now(made, WEB)
        assert made.outcomes() == []
        await trio.sleep(60)
        assert made.outcomes() == ["succeeded"]


async def test_a_run_of_what_has_no_schedule_or_a_disabled_one_is_refused(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with world(tmp_path, entry("web-1", HOUR, enabled=False)) as made:
        with pytest.raises(ConflictError, match="disabled"):
            await run_now(made, WEB)
        with pytest.raises(NotFoundError, match="'web-2' has no snapshot schedule"):
            await run_now(made, InstanceId("web-2"))


async def test_no_run_begins_before_the_engine_serves(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path, entry("web-1", HOUR), serve=False) as made:
        with pytest.raises(UnavailableError, match="starts or stops"):
            await Requests(made.engine).run_now(WEB)


async def test_a_run_by_hand_whose_hypervisor_does_not_answer_fails_at_once(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with world(tmp_path, entry("web-1", HOUR)) as made:
        made.backend.unavailable = True
        began = trio.current_time()
        run = await run_now(made, WEB)
        assert run is not None
        assert run.outcome is Outcome.FAILED
        assert trio.current_time() - began < 60
