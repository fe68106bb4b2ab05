"""Real daemons, killed and hung at every step, on every backend. ``python -m tests.kills`` does as many as you like."""

import json
import random
import secrets
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio

from hypemand.backends.base import BackendUnavailable
from hypemand.core.fields import check_instant
from hypemand.state.lock import StateLock
from tests.kills import checks, grounds, harness
from tests.kills.campaign import Campaign, Failure
from tests.kills.grounds import EmbeddedGround
from tests.kills.harness import Harness, Outcome
from tests.kills.places import GUEST, OF_THE_ENGINE, OPERATORS, STEPS, By, How, Kill, Phase
from tests.kills.plan import matrix
from tests.kills.report import figures, summary
from tests.processes import TOLD, Lab, Ran, instant

AT_LEAST = 40


@pytest.mark.qemu
async def test_a_daemon_killed_or_hung_at_any_step_leaves_no_guest_frozen_and_no_run_lost_or_doubled(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    campaign = Campaign(secrets.randbelow(10**9), tmp_path, lambda line: None)
    await campaign.run(None)
    record_property(TOLD, summary(campaign))
    assert campaign.failures == [], summary(campaign)
    seen = {(outcome.ground, outcome.kill.step) for outcome in campaign.outcomes}
    assert seen == {
        (ground, step)
        for ground in grounds.NAMES
        for step in STEPS
        if ground != "qemu-internal" or step not in OF_THE_ENGINE
    }
    assert {(o.ground, o.kill.by) for o in campaign.outcomes} == {
        (ground, by) for ground in grounds.NAMES for by in set(By) - {By.NOBODY}
    }
    assert {outcome.kill.how for outcome in campaign.outcomes} == set(How)
    told = figures(campaign)
    assert told["survived"] == told["kills"] >= AT_LEAST
    assert (told["lost_runs"], told["duplicates"], told["left_frozen"]) == (0, 0, 0)


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Lab, datetime]:
    """What is left of a daemon that was killed and settled, and when its run was due."""
    lab = Lab(tmp_path_factory.mktemp("settled"))

    async def kill() -> datetime:
        killer = Harness(EmbeddedGround("embedded", lab), random.Random(0))
        await killer.set_up()
        outcome = await killer.kill(Kill("publish", Phase.AFTER))
        assert outcome.findings == ()
        return check_instant(lab.history()[-1]["due_at"])

    return lab, trio.run(kill)


@pytest.fixture
async def site(tmp_path: Path) -> Harness:
    """An embedded backend with two snapshots."""
    made = Harness(EmbeddedGround("embedded", Lab(tmp_path)), random.Random(0), patience_s=3.0)
    await made.set_up()
    return made


def kinds(found: tuple[checks.Finding, ...] | list[checks.Finding]) -> set[str]:
    return {finding.kind for finding in found}


LEFT_ALONE = {checks.FROZEN, checks.OPEN, checks.LOST, checks.PARTIAL}


async def test_a_killed_daemon_that_nobody_settles_is_found_out(site: Harness) -> None:
    outcome = await site.kill(Kill("capture", Phase.AFTER, by=By.NOBODY))
    assert kinds(outcome.findings) == LEFT_ALONE


async def test_a_recovery_that_only_says_that_it_worked_is_found_out(
    site: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def idle(*args: object) -> Ran:
        return Ran(0, "1 of 1 open runs settled", "")

    monkeypatch.setattr(harness, "run_cli", idle)
    outcome = await site.kill(Kill("pause", Phase.AFTER, by=By.RECOVER))
    assert kinds(outcome.findings) == LEFT_ALONE - {checks.PARTIAL}


async def test_a_place_that_is_never_reached_is_no_kill(site: Harness) -> None:
    outcome = await site.kill(Kill("no such step", Phase.BEFORE))
    assert kinds(outcome.findings) == {checks.FAILED}


async def test_a_slot_that_never_works_again_is_found_out(site: Harness) -> None:
    (site.ground.lab.root / "instances" / GUEST / "memory").unlink()
    assert kinds(await site.next_slot_works()) == {checks.FAILED}


def frozen(lab: Lab, due_at: datetime) -> None:
    lab.set_guest_state("Paused")


def resumed_behind_the_operators_back(lab: Lab, due_at: datetime) -> None:
    lab.set_guest_state("Running", OPERATORS)


def forgotten(lab: Lab, due_at: datetime) -> None:
    path = lab.state / "runs.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    last = lab.history()[-1]["run_id"]
    kept = [line for line in lines if (line["event"], line["run_id"]) != ("finished", last)]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in kept))


def recorded_twice(lab: Lab, due_at: datetime) -> None:
    with (lab.state / "runs.jsonl").open("a") as log:
        log.write(json.dumps({"event": "finished", **lab.history()[-1]}) + "\n")


def half_done(lab: Lab, due_at: datetime) -> None:
    (lab.root / "snapshots" / GUEST / ".r1.partial").mkdir()


def deleted_unasked(lab: Lab, due_at: datetime) -> None:
    shutil.rmtree(lab.root / "snapshots" / GUEST / lab.snapshots()[-1])


def taken_twice(lab: Lab, due_at: datetime) -> None:
    first = lab.root / "snapshots" / GUEST / lab.snapshots()[0]
    second = shutil.copytree(first, first.with_name("r2"))
    manifest = json.loads((second / "manifest.json").read_text())
    (second / "manifest.json").write_text(json.dumps(manifest | {"id": "r2"}))


def off_the_grid(lab: Lab, due_at: datetime) -> None:
    lab.edit(next_run_at=instant(datetime.now(UTC) + timedelta(seconds=1000)))


def not_moved_on(lab: Lab, due_at: datetime) -> None:
    """Later than the run's own slot, else the run log would move it on."""
    lab.edit(next_run_at=instant(due_at + timedelta(hours=1)))


@pytest.mark.parametrize(
    ("tamper", "wanted"),
    [
        (frozen, {checks.FROZEN}),
        (resumed_behind_the_operators_back, {checks.UNDONE}),
        (forgotten, {checks.OPEN, checks.LOST}),
        (recorded_twice, {checks.TWICE}),
        (half_done, {checks.PARTIAL}),
        (deleted_unasked, {checks.GONE}),
        (taken_twice, {checks.TWICE}),
        (off_the_grid, {checks.OFF_GRID}),
        (not_moved_on, {checks.OFF_GRID}),
    ],
)
async def test_what_must_not_be_is_found(
    settled: tuple[Lab, datetime], tmp_path: Path, tamper: Callable[[Lab, datetime], None], wanted: set[str]
) -> None:
    lab, due_at = settled[0].copy_to(tmp_path / "copy"), settled[1]
    ground = EmbeddedGround("embedded", lab)
    assert await checks.findings(ground, due_at) == []
    tamper(lab, due_at)
    assert wanted <= kinds(await checks.findings(ground, due_at))


async def test_a_lock_that_is_not_given_back_is_found(settled: tuple[Lab, datetime], tmp_path: Path) -> None:
    lab = settled[0].copy_to(tmp_path / "copy")
    lock = StateLock.acquire(lab.state, "recover")
    found = await checks.findings(EmbeddedGround("embedded", lab), settled[1])
    lock.release()
    assert kinds(found) == {checks.HELD}


async def test_a_guest_that_cannot_be_looked_at_ends_no_campaign(
    site: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def gone(*args: object) -> str:
        raise BackendUnavailable("its QEMU has ended")

    monkeypatch.setattr(EmbeddedGround, "state", gone)
    site.patience_s = 60.0
    campaign = Campaign(7, tmp_path, lambda line: None)
    left = [Kill("publish", Phase.AFTER), Kill("record", Phase.AFTER)]
    await campaign.use(site, left)
    (failure,) = campaign.failures
    assert "its QEMU has ended" in str(failure)
    assert '"capture begins"' in str(failure)
    assert left == [Kill("record", Phase.AFTER)]  # for another ground


@pytest.mark.parametrize("seed", range(20))
def test_whatever_the_seed_no_step_and_no_way_to_settle_is_left_out(seed: int) -> None:
    kills = matrix(random.Random(seed), STEPS)
    assert {kill.step for kill in kills} == set(STEPS)
    assert {kill.by for kill in kills} == set(By) - {By.NOBODY}
    assert {kill.how for kill in kills} == set(How)
    assert sum(kill.operator for kill in kills) == 2
    assert {kill.by for kill in matrix(random.Random(seed), STEPS, guard=False)} == {By.RECOVER}


def test_the_figures_count_what_was_found(tmp_path: Path) -> None:
    campaign = Campaign(7, tmp_path, lambda line: None)
    bad = checks.Finding(checks.FROZEN, "web-1 is paused")
    good, failed = Kill("pause", Phase.IN, by=By.GUARD), Kill("file", Phase.AFTER)
    campaign.outcomes = [
        Outcome(good, "embedded", (), thawed_s=0.5, freeze_s=0.7),
        Outcome(good, "embedded", (), thawed_s=0.3, freeze_s=0.9),
        Outcome(failed, "qemu-internal", (bad,)),
    ]
    campaign.failures = [Failure("qemu-internal", str(failed), (bad,), tmp_path, "a line")]
    told = json.loads(json.dumps(figures(campaign)))
    assert (told["kills"], told["survived"], told["left_frozen"], told["lost_runs"]) == (3, 2, 1, 0)
    embedded = told["by_backend"]["embedded"]
    assert embedded["longest_from_death_to_thaw_s"] == 0.5
    assert embedded["longest_freeze_s"] == [{"budget_s": 30.0, "longest_freeze_s": 0.9}]
    assert "left frozen: web-1 is paused" in summary(campaign)
    assert f"look in {tmp_path}" in summary(campaign)
