"""Runs that are due at one moment are all claimed before the first one's work holds up the last."""

from datetime import timedelta
from pathlib import Path

import pytest
import trio

from hypemand.backends.base import Preparation
from hypemand.config import ScheduleEntry
from hypemand.core.model import InstanceId, InstanceState, SnapshotKind
from hypemand.engine.changes import SetSchedule
from hypemand.engine.requests import Requests
from hypemand.engine.rush import LONGEST_S, MANY, QUIET_S, Rush
from tests.fakes import FakeBackend, FakeClock
from tests.virtual_time import VirtualClock
from tests.world import entry, world

HOUR = timedelta(hours=1)


@pytest.fixture
def rush() -> Rush:
    return Rush()


async def begin(rush: Rush, seconds: float) -> None:
    with rush:
        await trio.sleep(seconds)


async def waited(rush: Rush, woken: list[float] | None = None) -> float:
    began = trio.current_time()
    await rush.wait()
    if woken is not None:
        woken.append(trio.current_time() - began)
    return trio.current_time() - began


async def test_nobody_waits_where_few_begin(rush: Rush, virtual_clock: VirtualClock) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(MANY - 1):
            nursery.start_soon(begin, rush, 10)
        await trio.sleep(0.001)
        assert await waited(rush) == 0
        nursery.cancel_scope.cancel()


async def test_where_many_begin_all_wait_until_few_are_left(rush: Rush, virtual_clock: VirtualClock) -> None:
    woken: list[float] = []
    async with trio.open_nursery() as nursery:
        for number in range(100):
            nursery.start_soon(begin, rush, number / 100)
        await trio.sleep(0.001)
        for _ in range(5):
            nursery.start_soon(waited, rush, woken)
    assert woken == [pytest.approx((100 - MANY) / 100, abs=0.01)] * 5


async def test_those_that_do_not_come_forward_hold_up_nobody_for_long(rush: Rush, virtual_clock: VirtualClock) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(MANY):
            nursery.start_soon(begin, rush, 60)
        await trio.sleep(0.001)
        assert await waited(rush) == pytest.approx(QUIET_S)
        nursery.cancel_scope.cancel()


async def test_steps_forward_count_before_the_end(rush: Rush, virtual_clock: VirtualClock) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(MANY):
            nursery.start_soon(begin, rush, 60)
        nursery.start_soon(_step_for, rush, 5.0)
        await trio.sleep(0.001)
        assert await waited(rush) == pytest.approx(5.0, abs=2 * QUIET_S)
        nursery.cancel_scope.cancel()


async def test_a_rush_without_end_holds_up_nobody_for_long(rush: Rush, virtual_clock: VirtualClock) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_begin_again_and_again, rush, nursery)
        await trio.sleep(20)
        with trio.fail_after(600):
            for _ in range(2):
                assert await waited(rush) == pytest.approx(LONGEST_S, abs=2 * QUIET_S)
        nursery.cancel_scope.cancel()


async def _begin_again_and_again(rush: Rush, nursery: trio.Nursery) -> None:
    """As at a hypervisor that hangs: each gives up in the end."""
    while True:
        nursery.start_soon(begin, rush, 10)
        await trio.sleep(QUIET_S / 2)


async def _step_for(rush: Rush, seconds: float) -> None:
    with trio.move_on_after(seconds):
        while True:
            await trio.sleep(QUIET_S / 2)
            rush.step()


async def test_one_that_gives_up_waiting_lets_the_others_go_on(rush: Rush, virtual_clock: VirtualClock) -> None:
    woken: list[float] = []
    async with trio.open_nursery() as nursery:
        for _ in range(MANY):
            nursery.start_soon(begin, rush, 0.1)
        await trio.sleep(0.001)
        with trio.move_on_after(0.05):
            nursery.start_soon(waited, rush, woken)
            await rush.wait()
    assert len(woken) == 1


class Slow(FakeBackend):
    """Each question takes a while."""

    async def prepare(self, instance: InstanceId, kind: SnapshotKind) -> Preparation:
        await trio.sleep(int(instance.removeprefix("vm-")) / 100)
        return await super().prepare(instance, kind)


def crowd(number: int) -> tuple[FakeClock, Slow, list[ScheduleEntry]]:
    """So many guests that are due at once, and take their time to be asked."""
    clock = FakeClock()
    fake = Slow(clock)
    entries = [entry(f"vm-{each}", HOUR, first_run="now") for each in range(number)]
    fake.add(*(e.instance for e in entries))
    return clock, fake, entries


async def test_every_run_that_is_due_at_one_moment_is_claimed_before_the_first_guest_stands_still(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    clock, fake, entries = crowd(40)
    async with world(tmp_path, *entries, backends=[fake], clock=clock, concurrency=40, fake_concurrency=40) as w:
        await trio.sleep(30)
        assert w.outcomes() == ["succeeded"] * 40
        claims = [run.started_at for run in w.history()]
        pauses = [at for at, call, _ in fake.calls if call == "pause"]
        assert len(pauses) == 40
        claimed_before = sorted((at - clock.start).total_seconds() for at in claims)[: 40 - MANY]
        assert claimed_before[-1] - clock.began <= min(pauses)


async def test_hypervisors_that_hang_hold_up_no_claim_and_no_guest_of_others_for_long(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    clock = FakeClock()
    fake, hung = FakeBackend(clock, name="good"), FakeBackend(clock, name="hung")
    good = [entry(f"vm-{number}", HOUR, first_run="now", backend="good") for number in range(5)]
    bad = [entry(f"bad-{number}", HOUR, first_run="now", backend="hung") for number in range(2 * MANY)]
    fake.add(*(e.instance for e in good))
    hung.add(*(e.instance for e in bad))
    for one in bad:
        hung.fail("prepare", one.instance)
    async with world(
        tmp_path, *good, *bad, backends=[fake, hung], clock=clock, concurrency=40, hung_concurrency=40
    ) as w:
        await trio.sleep(5)
        assert w.outcomes() == ["succeeded"] * 5
        assert max(at for at, call, _ in fake.calls if call == "pause") < 3 * QUIET_S + 1


async def test_a_client_that_changes_schedules_waits_for_the_runs_that_begin(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    clock, fake, entries = crowd(100)
    fake.add("new")
    async with world(tmp_path, *entries, backends=[fake], clock=clock, concurrency=100, fake_concurrency=100) as w:
        await trio.sleep(0.1)
        began = trio.current_time()
        made = await Requests(w.engine).put(InstanceId("new"), SetSchedule(interval=HOUR), "somebody")
        assert made.instance_id == "new"
        assert 0.5 < trio.current_time() - began < 1


async def test_a_guest_that_is_started_while_its_run_waits_for_others_is_not_copied(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    clock, fake, entries = crowd(40)
    fake.machines[InstanceId("vm-0")].state = InstanceState.STOPPED
    fake.machines[InstanceId("vm-1")].state = InstanceState.STOPPED
    async with world(tmp_path, *entries, backends=[fake], clock=clock, concurrency=40, fake_concurrency=40) as w:
        await trio.sleep(0.2)
        fake.machines[InstanceId("vm-0")].state = InstanceState.RUNNING
        await trio.sleep(30)
        (started,) = w.history("vm-0")
        assert started.outcome == "failed"
        assert started.error == "instance is Running now, it was Stopped when its run began"
        assert ("capture", "vm-0") not in {(call, instance) for _, call, instance in fake.calls}
        assert w.outcomes("vm-1") == ["succeeded"]
