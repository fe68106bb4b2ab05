"""What backends are asked of each instance: one that does not answer costs its own time, and nobody else's."""

from collections.abc import Collection
from datetime import UTC, datetime

import pytest
import trio
from attrs import define
from trio.testing import MockClock

from hypemand.backends.base import Backend, BackendUnavailable, Status
from hypemand.config import BackendConfig
from hypemand.core.model import InstanceId, InstanceState, Snapshot
from hypemand.engine.fleet import Fleet
from hypemand.surface.views import (
    ALL_ANSWERS_S,
    ANSWER_S,
    AT_ONCE,
    NOT_AT_WORK,
    NOT_IN_TIME,
    AtWork,
    InstanceView,
    ask_all,
)
from tests.fakes import FakeBackend, FakeClock

NOW = datetime(2026, 3, 9, tzinfo=UTC)
MANY = 10 * AT_ONCE


@define(eq=False)
class Slow(FakeBackend):
    """Each state takes its time; those of *stubborn* ones take a second too long, whether somebody waits or not."""

    state_s: float = 0.0
    stubborn: int = 0

    async def state(self, instance: InstanceId) -> Status:
        if self.stubborn:
            self.stubborn -= 1
            with trio.CancelScope(shield=True):
                await trio.sleep(ANSWER_S + 1)
            return Status(InstanceState.RUNNING)
        await trio.sleep(self.state_s)
        return await FakeBackend.state(self, instance)


def fleet_of(*backends: FakeBackend) -> Fleet:
    made: dict[str, Backend] = {backend.name: backend for backend in backends}
    fleet = Fleet(lambda name, _: made[name], lambda name, _: made[name])
    fleet.have({name: BackendConfig("fake", name) for name in made})
    return fleet


def views_of(backend: FakeBackend, count: int) -> list[InstanceView]:
    names = [f"vm-{number}" for number in range(count)]
    backend.add(*names)
    return [InstanceView(InstanceId(name), backend.name) for name in names]


async def asked(fleet: Fleet, views: Collection[InstanceView], at_work: AtWork = NOT_AT_WORK) -> float:
    """Ask about all *views*; how long that took, in virtual seconds."""
    began = trio.current_time()
    await ask_all([*views], fleet, at_work, NOW)
    return trio.current_time() - began


async def test_all_are_told_of(autojump_clock: MockClock) -> None:
    backend = FakeBackend(FakeClock())
    views = views_of(backend, MANY)
    assert await asked(fleet_of(backend), views) < 1
    assert {(view.state, view.snapshots, view.trouble) for view in views} == {("Running", (), None)}


@pytest.mark.parametrize("call", ["state", "list_snapshots"])
async def test_one_that_hangs_costs_its_own_time_and_hides_no_other(call: str, autojump_clock: MockClock) -> None:
    backend = FakeBackend(FakeClock())
    backend.fail(call, "vm-7")
    views = views_of(backend, MANY)
    assert ANSWER_S <= await asked(fleet_of(backend), views) < ANSWER_S + 1
    hung = views.pop(7)
    assert hung.trouble is not None
    assert f"did not answer within {ANSWER_S:g} s" in hung.trouble
    assert (hung.state is None, hung.snapshots is None) == (call == "state", call != "state")
    assert {view.trouble for view in views} == {None}


async def test_each_has_its_own_time_however_many_come_before_it(autojump_clock: MockClock) -> None:
    backend = Slow(FakeClock(), state_s=0.9)
    views = views_of(backend, MANY)
    assert await asked(fleet_of(backend), views) > ANSWER_S
    assert {view.trouble for view in views} == {None}


async def test_one_that_answers_when_its_time_is_over_takes_none_from_the_next(autojump_clock: MockClock) -> None:
    backend = Slow(FakeClock(), stubborn=AT_ONCE)
    views = views_of(backend, AT_ONCE + 1)
    assert ANSWER_S + 1 <= await asked(fleet_of(backend), views) < ANSWER_S + 2
    assert [view.trouble for view in views] == [None] * (AT_ONCE + 1)


async def test_where_all_hang_those_that_were_not_asked_are_told(autojump_clock: MockClock) -> None:
    backend = FakeBackend(FakeClock())
    backend.fail("state", "*")
    views = views_of(backend, MANY)
    assert ALL_ANSWERS_S <= await asked(fleet_of(backend), views) < ALL_ANSWERS_S + 1
    troubles = [view.trouble or "" for view in views]
    assert sum("did not answer" in trouble for trouble in troubles) >= AT_ONCE
    assert troubles.count(NOT_IN_TIME) >= MANY - 3 * AT_ONCE
    assert all(troubles)


async def test_a_bug_and_an_error_are_the_trouble_of_their_instances_alone(autojump_clock: MockClock) -> None:
    backend = FakeBackend(FakeClock())
    backend.fail("state", "vm-1", ZeroDivisionError("a bug"))
    backend.fail("list_snapshots", "vm-2", BackendUnavailable("the disk is gone"))
    views = views_of(backend, 4)
    await asked(fleet_of(backend), views)
    assert [view.trouble for view in views] == [
        None,
        "internal error: ZeroDivisionError('a bug')",
        "the disk is gone",
        None,
    ]


async def test_what_hypemand_is_at_work_on_is_not_asked_about(autojump_clock: MockClock) -> None:
    backend = FakeBackend(FakeClock())
    views = [
        *views_of(backend, 2),
        InstanceView(InstanceId("gone-1"), "gone"),
        InstanceView(InstanceId("gone-2"), "gone"),
    ]
    known: tuple[Snapshot, ...] = ()
    at_work = AtWork(lambda instance: instance in ("vm-0", "gone-1"), {"vm-0": known}.get)
    await asked(fleet_of(backend), views, at_work)
    assert {instance for _, _, instance in backend.calls} == {"vm-1"}
    assert [view.snapshots for view in views] == [(), (), None, None]
    assert [view.trouble for view in views[:3]] == [None] * 3
    assert "backend 'gone' is not in the config" in str(views[3].trouble)
