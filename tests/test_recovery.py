"""Open runs: settled at start, retried until their hypervisor answers, never by two at once."""

from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import evolve
from structlog.typing import EventDict

from hypemand.backends.base import BackendUnavailable
from hypemand.core.model import (
    Freezer,
    InstanceId,
    InstanceState,
    Outcome,
    RunFinished,
    RunStarted,
    SnapshotKind,
    Trigger,
)
from hypemand.core.naming import scheduled_tags
from hypemand.engine.recovery import LeftOpen
from hypemand.state.codec import Line, encode_line
from tests.fakes import START, FakeBackend, FakeClock, seeded_snapshot
from tests.virtual_time import VirtualClock
from tests.world import BOOT_ID, entry, world

HOUR, MINUTE = timedelta(hours=1), timedelta(minutes=1)
WEB = InstanceId("web-1")


def started(fake: FakeBackend, **more: Any) -> RunStarted:
    line = RunStarted(
        run_id="crashed",
        instance_id=WEB,
        backend=fake.name,
        trigger=Trigger.SCHEDULE,
        kind=SnapshotKind.STANDBY,
        state_before=InstanceState.RUNNING,
        due_at=START - 5 * MINUTE,
        next_run_at=START + 55 * MINUTE,
        started_at=START - 5 * MINUTE,
        snapshot_name="scheduled-20260309-005500",
        tags=scheduled_tags(WEB, {}),
        max_freeze_s=120.0,
        freezes=Freezer.ENGINE,
        boot_id=BOOT_ID,
        connection=fake.connection,
    )
    return evolve(line, **more)


@pytest.fixture
def fake() -> FakeBackend:
    made = FakeBackend(FakeClock(began=0.0))
    made.add("web-1")
    return made


def crash(tmp_path: Path, line: RunStarted) -> None:
    (tmp_path / "runs.jsonl").write_bytes(encode_line(line))


def freeze(fake: FakeBackend) -> None:
    fake.machines[WEB].state, fake.machines[WEB].paused_by_us = InstanceState.PAUSED, True
    fake._freeze(WEB)


async def test_a_frozen_guest_is_resumed_before_anything_else_runs(
    tmp_path: Path, fake: FakeBackend, virtual_clock: VirtualClock
) -> None:
    crash(tmp_path, started(fake))
    freeze(fake)
    async with world(tmp_path, entry("web-1", HOUR), backends=[fake]) as w:
        assert fake.machines[WEB].state is InstanceState.RUNNING
        (run,) = w.history()
        assert (run.run_id, str(run.outcome)) == ("crashed", "interrupted")
        assert run.freeze_s == pytest.approx(300, abs=1)
        assert run.found_frozen
        assert "killed or crashed" in (run.error or "")
        assert "resumed after at most 300.0 s" in (run.error or "")
        assert w.engine.runlog.open_runs == ()


async def test_a_complete_snapshot_is_adopted_and_becomes_the_last_one(
    tmp_path: Path, fake: FakeBackend, virtual_clock: VirtualClock
) -> None:
    crash(tmp_path, started(fake))
    snapshot = evolve(seeded_snapshot("web-1", 1, START - 5 * MINUTE, scheduled_tags(WEB, {})), id="crashed")
    fake.machines[WEB].snapshots["crashed"] = snapshot
    async with world(tmp_path, entry("web-1", HOUR), backends=[fake]) as w:
        (run,) = w.history()
        assert run.snapshot_id == "crashed"
        assert "is kept" in (run.error or "")


def made_before(snapshot_id: str, hours: int) -> RunFinished:
    at = START - hours * HOUR
    return RunFinished(
        run_id=snapshot_id,
        instance_id=WEB,
        due_at=at,
        started_at=at,
        finished_at=at,
        outcome=Outcome.SUCCEEDED,
        snapshot_id=snapshot_id,
    )


@pytest.mark.parametrize("answers", [True, False])
async def test_what_a_killed_run_may_have_pruned_is_told(
    tmp_path: Path, fake: FakeBackend, virtual_clock: VirtualClock, answers: bool
) -> None:
    lines: list[Line] = [made_before("gone", 3), made_before("there", 2), started(fake)]
    (tmp_path / "runs.jsonl").write_bytes(b"".join(encode_line(line) for line in lines))
    tags = scheduled_tags(WEB, {})
    for number, name in enumerate(["there", "crashed"]):
        at = START - (2 - number) * HOUR
        fake.machines[WEB].snapshots[name] = evolve(seeded_snapshot("web-1", number, at, tags), id=name)
    if not answers:
        fake.fail("list_snapshots", "web-1", BackendUnavailable("busy"))
    async with world(tmp_path, entry("web-1", HOUR), backends=[fake]) as w:
        error = w.history()[-1].error or ""
        wanted = "maybe pruned by it: gone" if answers else "whether it has pruned any is not known: busy"
        assert error.endswith(wanted)


async def test_a_run_that_had_not_come_to_pruning_is_not_said_to_have_pruned(
    tmp_path: Path, fake: FakeBackend, virtual_clock: VirtualClock
) -> None:
    run = started(fake)
    (tmp_path / "runs.jsonl").write_bytes(encode_line(made_before("gone", 3)) + encode_line(run))
    fake.machines[WEB].snapshots["crashed"] = evolve(seeded_snapshot("web-1", 1, START, {}), id="crashed")
    fake.fail("settle", "web-1", BackendUnavailable("busy"))
    async with world(tmp_path, entry("web-1", HOUR), backends=[fake]) as w:
        w.engine.recovery.hand_over(run, LeftOpen("the capture took too long", thawed=True))
        fake.heal("settle", "web-1")
        await trio.sleep(60)
        error = next(line.error for line in w.history() if line.run_id == "crashed") or ""
        assert "is kept" in error
        assert "pruned" not in error


async def test_a_partial_snapshot_is_removed(tmp_path: Path, fake: FakeBackend, virtual_clock: VirtualClock) -> None:
    crash(tmp_path, started(fake))
    partial = evolve(seeded_snapshot("web-1", 1, START, {}), id="crashed")
    fake.machines[WEB].unpublished["crashed"] = partial
    async with world(tmp_path, entry("web-1", HOUR), backends=[fake]) as w:
        assert fake.machines[WEB].unpublished == {}
        assert w.history()[0].snapshot_id is None


async def test_while_a_run_is_open_its_instance_gets_no_new_one(
    tmp_path: Path, fake: FakeBackend, virtual_clock: VirtualClock
) -> None:
    crash(tmp_path, started(fake))
    fake.fail("settle", "web-1", BackendUnavailable("still saving"))
    async with world(tmp_path, entry("web-1", HOUR, first_run="now"), backends=[fake]) as w:
        await trio.sleep(2 * 3600 + 60)
        assert w.outcomes() == ["skipped"] * 3
        assert all("crashed" in (run.error or "") for run in w.history())
        fake.heal("settle", "web-1")
        await trio.sleep(3600)
        assert w.outcomes()[-2:] == ["interrupted", "succeeded"]


async def test_a_run_that_hangs_on_settling_delays_start_and_others_by_its_time_limit_alone(
    tmp_path: Path, fake: FakeBackend, virtual_clock: VirtualClock
) -> None:
    crash(tmp_path, started(fake))
    fake.add("web-1", "web-2")
    fake.fail("settle", "web-1")
    entries = [entry("web-1", HOUR), entry("web-2", HOUR, first_run="now")]
    async with world(tmp_path, *entries, backends=[fake]) as w:
        assert trio.current_time() <= 15
        await trio.sleep(30)
        assert w.outcomes("web-2") == ["succeeded"]
        assert len(w.engine.runlog.open_runs) == 1


@pytest.mark.parametrize(
    ("more", "ours"),
    [
        ({}, True),
        ({"boot_id": "another"}, True),
        ({"boot_id": "another", "started_at": START - timedelta(minutes=13)}, False),
        ({"boot_id": "", "started_at": START - timedelta(minutes=13)}, False),
        ({"boot_id": "another", "started_at": START + timedelta(minutes=1)}, False),
        ({"started_at": START - timedelta(days=30)}, True),
    ],
)
async def test_a_pause_counts_as_ours_only_when_it_provably_is(
    tmp_path: Path, fake: FakeBackend, virtual_clock: VirtualClock, more: dict[str, object], ours: bool
) -> None:
    async with world(tmp_path, entry("web-1", HOUR), backends=[fake], clock=FakeClock()) as w:
        assert w.engine.recovery.is_ours(started(fake, **more)) is ours


async def test_a_bug_in_settle_keeps_the_run_open_and_hypemand_running(
    tmp_path: Path, fake: FakeBackend, virtual_clock: VirtualClock
) -> None:
    crash(tmp_path, started(fake))
    fake.fail("settle", "web-1", ZeroDivisionError("oops"), times=3)
    async with world(tmp_path, entry("web-1", HOUR), backends=[fake]) as w:
        await trio.sleep(60)
        assert w.outcomes() == ["interrupted"]


async def test_a_run_settles_with_the_connection_that_it_began_with(
    tmp_path: Path, fake: FakeBackend, virtual_clock: VirtualClock
) -> None:
    other = FakeBackend(fake.clock, settings={"socket": "elsewhere"})
    other.add("web-1")
    crash(tmp_path, started(fake))
    async with world(tmp_path, entry("web-1", HOUR), backends=[other]) as w:
        # The fleet's `connect` of this world gives the fake of that name, and closes it after the one run.
        assert w.outcomes() == ["interrupted"]
        assert other.closed


async def test_whose_lease_was_open_is_known_better_than_by_boot_and_deadline(
    tmp_path: Path, fake: FakeBackend, virtual_clock: VirtualClock
) -> None:
    """A run that had thawed its guest when its daemon died: a pause that is found is an operator's."""
    async with world(tmp_path, entry("web-1", HOUR), backends=[fake], serve=False) as w:
        recovery = w.engine.recovery
        assert recovery.is_ours(started(fake))
        recovery.frozen = frozenset({"another"})
        assert not recovery.is_ours(started(fake))
        assert recovery.is_ours(started(fake, run_id="another", boot_id="before"))


async def test_hypervisors_that_hang_keep_no_other_guest_frozen(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    clock = FakeClock()
    hung, fine = FakeBackend(clock, name="hung"), FakeBackend(clock)
    names = [f"hung-{number}" for number in range(40)]
    hung.add(*names)
    hung.fail("settle", "*")
    fine.add("web-1")
    freeze(fine)
    fine.fail("settle", "web-1", BackendUnavailable("busy"), times=1)
    lines = [started(hung, run_id=name, instance_id=InstanceId(name)) for name in names]
    (tmp_path / "runs.jsonl").write_bytes(b"".join(map(encode_line, [*lines, started(fine)])))
    async with world(tmp_path, entry("web-1", HOUR, backend="fake"), backends=[fine, hung], clock=clock):
        await trio.sleep(0.1)
        assert trio.current_time() < 20
        assert fine.frozen == set()
        first, second = fine.times("settle", "web-1")
        assert second - first <= 1.5


@pytest.mark.parametrize("freezes", Freezer)
async def test_what_can_not_be_settled_is_tried_each_second_and_told_once_a_minute(
    tmp_path: Path, fake: FakeBackend, virtual_clock: VirtualClock, heard_log: list[EventDict], freezes: Freezer
) -> None:
    crash(tmp_path, started(fake, freezes=freezes))
    fake.fail("settle", "web-1", BackendUnavailable("busy"))
    async with world(tmp_path, entry("web-1", HOUR), backends=[fake]):
        await trio.sleep(600)
        told = [event for event in heard_log if event["event"] == "open run not settled yet"]
        tried = fake.times("settle", "web-1")
        assert max(after - before for before, after in pairwise(tried)) <= 1.5, "a guest may stand still for so long"
        assert 9 <= len(told) <= 12


async def test_a_freeze_that_would_be_negative_is_not_known(
    tmp_path: Path, fake: FakeBackend, virtual_clock: VirtualClock
) -> None:
    crash(tmp_path, started(fake))
    freeze(fake)
    fake.settled_freeze_s = -3600.0
    async with world(tmp_path, entry("web-1", HOUR), backends=[fake]) as w:
        await trio.sleep(1)
        (run,) = w.history("web-1")
        assert (run.freeze_s, run.found_frozen) == (None, True)
        assert "the clock was set back" in (run.error or "")
