"""The fakes behave as the protocol's docstrings say, so that tests over them mean something."""

from datetime import timedelta

import pytest
import trio
from attrs import evolve
from trio.testing import MockClock

from hypemand.backends.base import BackendUnavailable, CaptureRequest, InstanceNotFound, InvalidState
from hypemand.core.model import Freezer, InstanceId, InstanceState, SnapshotKind
from tests.fakes import START, FakeBackend, FakeClock
from tests.test_recovery import started

WEB = InstanceId("web-1")
REQUEST = CaptureRequest(run_id="r1", name="n-1", kind=SnapshotKind.STANDBY, tags={"a": "b"}, created_at=START)


@pytest.fixture
def fake() -> FakeBackend:
    made = FakeBackend(FakeClock(began=0.0))
    made.add("web-1")
    return made


async def test_the_fake_clock_follows_virtual_time_and_jumps_alone(autojump_clock: MockClock) -> None:
    clock = FakeClock()
    await trio.sleep(90)
    clock.jump(timedelta(days=1))
    assert clock.now() == START + timedelta(days=1, seconds=90)
    assert clock.boot_s() == 90


async def test_pause_and_resume_are_idempotent_and_an_operators_pause_has_no_mark(
    fake: FakeBackend, autojump_clock: MockClock
) -> None:
    await fake.pause(WEB)
    await fake.pause(WEB)
    assert fake.frozen == {WEB}
    await fake.resume(WEB)
    await fake.resume(WEB)
    assert fake.frozen == set()
    fake.machines[WEB].state = InstanceState.PAUSED
    await fake.pause(WEB)
    assert not fake.machines[WEB].paused_by_us
    fake.machines[WEB].state = InstanceState.SHUTDOWN
    with pytest.raises(InvalidState):
        await fake.resume(WEB)


async def test_a_capture_is_listed_only_when_published(fake: FakeBackend, autojump_clock: MockClock) -> None:
    captured = await fake.capture(WEB, REQUEST)
    assert await fake.list_snapshots(WEB) == ()
    await fake.publish(captured.snapshot)
    await fake.publish(captured.snapshot)
    assert await fake.list_snapshots(WEB) == (captured.snapshot,)
    await fake.delete_snapshot(captured.snapshot)
    await fake.delete_snapshot(captured.snapshot)
    assert await fake.list_snapshots(WEB) == ()


async def test_a_hypervisor_that_freezes_by_itself_says_for_how_long(
    fake: FakeBackend, autojump_clock: MockClock
) -> None:
    fake.freezes, fake.capture_s = Freezer.HYPERVISOR, 7
    assert (await fake.capture(WEB, REQUEST)).freeze_s == 7
    assert fake.longest_frozen == 7


async def test_a_missing_instance_is_not_found_and_an_unavailable_backend_says_nothing(
    fake: FakeBackend, autojump_clock: MockClock
) -> None:
    with pytest.raises(InstanceNotFound):
        await fake.state(InstanceId("nobody"))
    fake.unavailable = True
    with pytest.raises(BackendUnavailable):
        await fake.state(WEB)


async def test_faults_last_as_long_as_they_are_told_to(fake: FakeBackend, autojump_clock: MockClock) -> None:
    fake.fail("state", WEB, BackendUnavailable("x"), times=1)
    with pytest.raises(BackendUnavailable):
        await fake.state(WEB)
    assert (await fake.state(WEB)).state is InstanceState.RUNNING
    fake.fail("state", WEB)
    with trio.move_on_after(1000) as scope:
        await fake.state(WEB)
    assert scope.cancelled_caught


async def test_settling_resumes_what_is_marked_and_drops_what_is_partial(
    fake: FakeBackend, autojump_clock: MockClock
) -> None:
    captured = await fake.capture(WEB, REQUEST)
    fake.machines[WEB].unpublished["crashed"] = evolve(captured.snapshot, id="crashed")
    await fake.pause(WEB)
    settled = await fake.settle(started(fake), ours=False)
    assert (settled.resumed, settled.snapshot) == (True, None)
    assert "crashed" not in fake.machines[WEB].unpublished
    assert not (await fake.settle(started(fake), ours=True)).resumed
