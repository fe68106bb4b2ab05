"""Freeze budget and record as `status` shows them."""

from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from hypemand.core.model import Freezer, Outcome
from hypemand.state.codec import encode_line
from tests.processes import RUN_NOW, Lab, Ran, run_cli
from tests.test_runlog import finished, started


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


async def on(lab: Lab, *args: str) -> Ran:
    return await run_cli(args[0], "-c", lab.config, *args[1:])


def log_of_a_freeze(lab: Lab, freeze_s: float, **more: Any) -> None:
    """Write a run log in which the hypervisor froze the guest by itself, which nobody can interrupt."""
    began = evolve(started(1, "web-1"), freezes=Freezer.HYPERVISOR)
    ended = evolve(finished(1, "web-1"), outcome=Outcome.SUCCEEDED, freeze_s=freeze_s, error=None)
    ended = evolve(ended, **more)
    lab.state.mkdir(mode=0o700, exist_ok=True)
    (lab.state / "runs.jsonl").write_bytes(encode_line(began) + encode_line(ended))


async def test_status_shows_freeze_budget_and_record(lab: Lab) -> None:
    lab.write(RUN_NOW + 'max_freeze = "30s"')
    lab.prepare(settings={"max_freeze": "30s"})
    log_of_a_freeze(lab, 1.25)
    table = (await on(lab, "status")).stdout.splitlines()
    column = table[0].index("LONGEST")
    assert table[1][column:].startswith("1.2 s of 30s")
    (view,) = (await on(lab, "status", "--json")).json["instances"]
    assert view["freeze"] == {
        "last_s": 1.25,
        "longest_s": 1.25,
        "longest_at": "2026-03-09T01:00:00Z",
        "found_frozen_s": None,
        "found_frozen_at": None,
        "budget_s": 30.0,
        "over_budget": None,
    }


async def test_status_tells_of_a_run_that_will_not_begin_for_its_record(lab: Lab) -> None:
    lab.write(runs='max_freeze = "30s"')
    lab.prepare()
    log_of_a_freeze(lab, 95.2)
    told = await on(lab, "status")
    assert "95.2 s of 30s" in told.stdout
    assert "warning: web-1: its next run will not begin: the guest froze for 95.2 s on 2026-03-09" in told.stderr
    document = (await on(lab, "status", "--json")).json
    assert "max_freeze to at least 2m" in document["instances"][0]["freeze"]["over_budget"]
    lab.write(runs='max_freeze = "2m"')
    assert "will not begin" not in (await on(lab, "status")).stderr


async def test_a_run_over_its_budget_is_told_once_and_not_planned(lab: Lab) -> None:
    lab.write(runs='max_freeze = "30s"', instances=("web-1", "web-2"))
    why = (
        "the guest froze for 95.2 s on 2026-03-09, longer than its max_freeze of 30s, and this capture can't be"
        " interrupted: set max_freeze to at least 2m, or have the backend capture it in a way that freezes it for less"
        " or can be interrupted"
    )
    again = "longer than its max_freeze of 30s: until that is raised, no run begins that could freeze it so again"
    log_of_a_freeze(lab, 95.2, warnings=(f"the guest stood still for 95.2 s, {again}", "another mode"))
    lab.prepare(last_error=why, last_run_at="2026-03-09T01:00:00Z")
    lab.prepare("web-2")
    told = (await on(lab, "status")).stderr
    assert told.count("max_freeze of 30s") == 1
    assert f"warning: web-1: its next run will not begin: {why}" in told
    assert "warning: web-1: last run: another mode" in told
    plan = await on(lab, "plan", "--for", "2h")
    assert {line.split()[2] for line in plan.stdout.splitlines()[1:]} == {"web-2"}
    assert "hypemand: no run of web-1 is shown: it will not begin\n" in plan.stderr
    assert why in plan.stderr


async def test_status_shows_apart_how_long_a_guest_waited_for_a_recovery(lab: Lab) -> None:
    lab.write(runs='max_freeze = "30s"')
    lab.prepare()
    log_of_a_freeze(lab, 95.2, found_frozen=True)
    told = await on(lab, "status")
    assert "none of 30s" in told.stdout
    assert "will not begin" not in told.stderr
    freeze = (await on(lab, "status", "--json")).json["instances"][0]["freeze"]
    assert (freeze["last_s"], freeze["longest_s"], freeze["found_frozen_s"]) == (95.2, None, 95.2)


async def test_status_shows_no_budget_where_an_invalid_config_would_tell(lab: Lab) -> None:
    lab.write()
    lab.prepare()
    log_of_a_freeze(lab, 1.25)
    lab.replace(lab.config.read_text() + "bogus = 1\n")
    told = await on(lab, "status")
    assert told.stdout.splitlines()[0].rstrip().endswith("LONGEST  ERROR")
    assert "1.2 s of" not in told.stdout
    assert (await on(lab, "status", "--json")).json["instances"][0]["freeze"]["budget_s"] is None
