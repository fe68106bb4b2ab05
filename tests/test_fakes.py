"""The fakes behave as the protocol's docstrings say, so that tests over them mean something."""

from datetime import timedelta
from pathlib import Path

import pytest
import trio
from attrs import evolve
from trio.testing import MockClock

from hypemand.backends.base import (
    BackendUnavailable,
    CaptureFailed,
    CaptureRequest,
    InstanceNotFound,
    InvalidState,
    Preparation,
    Room,
)
from hypemand.core.model import Freezer, InstanceId, InstanceState, SnapshotKind
from hypemand.engine.space import Filesystem
from tests.fakes import START, FakeBackend, FakeClock, FakeRoom
from tests.test_recovery import started

WEB = InstanceId("web-1")
REQUEST = CaptureRequest(
    run_id="r1", name="n-1", kind=SnapshotKind.STANDBY, tags={"a": "b"}, created_at=START, freezes=Freezer.ENGINE
)
UNFROZEN = evolve(REQUEST, freezes=None)


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
    await fake.pause(WEB, REQUEST)
    await fake.pause(WEB, REQUEST)
    assert fake.frozen == {WEB}
    await fake.resume(WEB)
    await fake.resume(WEB)
    assert fake.frozen == set()
    fake.machines[WEB].state = InstanceState.PAUSED
    with pytest.raises(InvalidState, match="somebody else"):
        await fake.pause(WEB, REQUEST)
    fake.marks = False
    await fake.pause(WEB, REQUEST)
    assert not fake.machines[WEB].paused_by_us
    fake.machines[WEB].state = InstanceState.SHUTDOWN
    for call in (fake.resume(WEB), fake.pause(WEB, REQUEST)):
        with pytest.raises(InvalidState, match="Shutdown"):
            await call


@pytest.mark.parametrize("error", [CaptureFailed("no disk"), InvalidState("not now")])
async def test_a_pause_that_is_refused_touches_no_guest_and_one_that_hangs_does(
    fake: FakeBackend, autojump_clock: MockClock, error: Exception
) -> None:
    fake.fail("pause", WEB, error, times=1)
    with pytest.raises(type(error)):
        await fake.pause(WEB, REQUEST)
    assert (fake.frozen, fake.machines[WEB].state) == (set(), InstanceState.RUNNING)
    await fake.pause(WEB, REQUEST)
    assert fake.frozen == {WEB}
    await fake.resume(WEB)
    fake.fail("pause", WEB)
    with trio.move_on_after(10):
        await fake.pause(WEB, REQUEST)
    assert fake.frozen == {WEB}


async def test_what_pause_and_capture_were_asked_for_can_be_seen(fake: FakeBackend, autojump_clock: MockClock) -> None:
    await fake.pause(WEB, REQUEST)
    await fake.capture(WEB, REQUEST)
    assert fake.requests == [("pause", REQUEST), ("capture", REQUEST)]


async def test_a_guest_that_the_engine_forgot_to_freeze_is_not_captured(
    fake: FakeBackend, autojump_clock: MockClock
) -> None:
    with pytest.raises(AssertionError, match="it runs"):
        await fake.capture(WEB, REQUEST)
    assert fake.capturing == 0


async def test_a_capture_is_listed_only_when_published(fake: FakeBackend, autojump_clock: MockClock) -> None:
    captured = await fake.capture(WEB, UNFROZEN)
    assert await fake.complete(captured) == captured
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
    fake.capture_s = 7
    assert (await fake.capture(WEB, evolve(REQUEST, freezes=Freezer.HYPERVISOR))).freeze_s == 7
    assert fake.longest_frozen == 7


async def test_where_the_engine_freezes_the_freeze_is_measured_only_where_it_is_to_be(
    fake: FakeBackend, autojump_clock: MockClock
) -> None:
    fake.complete_s = 1
    made = await fake.capture(WEB, UNFROZEN)
    assert made.freeze_s is None
    fake.measured_late_s = 0.02
    assert (await fake.complete(made)).freeze_s == 0.02
    fake.measured_s = 0.01
    assert (await fake.capture(WEB, UNFROZEN)).freeze_s == 0.01


async def test_a_capture_that_takes_completing_is_whole_only_then(fake: FakeBackend, autojump_clock: MockClock) -> None:
    fake.complete_s, fake.captured_warnings = 60, ("hm",)
    made = await fake.capture(WEB, UNFROZEN)
    assert (made.snapshot.size_bytes, made.warnings) == (100, ("hm",))
    with pytest.raises(AssertionError, match="before it was complete"):
        await fake.publish(made.snapshot)
    before = trio.current_time()
    whole = await fake.complete(made)
    assert trio.current_time() - before == 60
    assert whole == evolve(made, snapshot=evolve(made.snapshot, size_bytes=1000))
    assert await fake.list_snapshots(WEB) == ()
    await fake.publish(whole.snapshot)
    assert await fake.list_snapshots(WEB) == (whole.snapshot,)
    assert (fake.completing, fake.most_completing) == (0, 1)
    fake.completed_warnings = ("late",)
    assert (await fake.complete(await fake.capture(WEB, UNFROZEN))).warnings == ("late",)


async def test_what_a_cancelled_completion_leaves_is_removed_by_settling(
    fake: FakeBackend, autojump_clock: MockClock
) -> None:
    fake.complete_s = 60
    made = await fake.capture(WEB, evolve(UNFROZEN, run_id="crashed"))
    with trio.move_on_after(10) as scope:
        await fake.complete(made)
    assert scope.cancelled_caught
    assert fake.completing == 0
    assert (fake.machines[WEB].saving, set(fake.machines[WEB].unpublished)) == ({"crashed"}, {"crashed"})
    assert (await fake.settle(started(fake), ours=False)).snapshot is None
    assert (fake.machines[WEB].saving, fake.machines[WEB].unpublished) == (set(), {})


async def test_a_preparation_says_what_it_was_told_to(fake: FakeBackend, autojump_clock: MockClock) -> None:
    fake.rooms = (Room(Path("/a"), 1), Room(Path("/b"), 2))
    fake.prepared_as, fake.warnings, fake.taken_names = Freezer.HYPERVISOR, ("slower",), {"taken"}
    assert await fake.prepare(WEB, SnapshotKind.STANDBY) == Preparation(
        fake.rooms, {"taken"}, Freezer.HYPERVISOR, ("slower",)
    )


async def test_the_fake_room_tells_filesystems_apart(autojump_clock: MockClock) -> None:
    room = FakeRoom(free_bytes=5, others={Path("/b"): Filesystem(2, 7)})
    assert await room.measure(Path("/a")) == Filesystem(1, 5)
    assert await room.measure(Path("/b")) == Filesystem(2, 7)
    room.hangs = 1
    with trio.move_on_after(10) as scope:
        await room.measure(Path("/a"))
    assert scope.cancelled_caught
    assert await room.measure(Path("/a")) == Filesystem(1, 5)


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
    captured = await fake.capture(WEB, UNFROZEN)
    fake.machines[WEB].unpublished["crashed"] = evolve(captured.snapshot, id="crashed")
    await fake.pause(WEB, REQUEST)
    settled = await fake.settle(started(fake), ours=False)
    assert (settled.resumed, settled.snapshot) == (True, None)
    assert "crashed" not in fake.machines[WEB].unpublished
    assert not (await fake.settle(started(fake), ours=True)).resumed
