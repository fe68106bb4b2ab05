"""The whole engine simulated: no promise breaks, whatever fails; seeded bugs are found; a seed replays exactly."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.processes import TOLD
from tests.simulation import coverage
from tests.simulation.bugs import BUGS

ROOT = Path(__file__).parents[1]
FIXED_RUNS = 25_200  # each of two processes, over seeds of its own
RANDOM_WORLDS = 4
BUG_WORLDS = 24  # the first ones of those that the fixed seeds go through
PATIENCE_S = 1500


@contextmanager
def simulation(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A simulation in a process of its own, which ends with the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.simulation", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def said_by(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=PATIENCE_S)
    return said


def figures_in(path: Path) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads(path.read_text())
    return figures


def test_fifty_thousand_runs_with_every_fault_at_every_step_break_no_promise(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    odd, even, drawn = (tmp_path / name for name in ("odd.json", "even.json", "drawn.json"))
    said, codes = [], []
    # One after the other: beside it run others, some of which look whether a guest is thawed in time.
    for arguments in (
        ("--seed", "1", "--step", "2", "--runs", str(FIXED_RUNS), "--json", str(odd)),
        ("--seed", "2", "--step", "2", "--runs", str(FIXED_RUNS), "--json", str(even)),
        ("--random", "--worlds", str(RANDOM_WORLDS), "--json", str(drawn)),
    ):
        with simulation(*arguments) as process:
            said.append(said_by(process))
            codes.append(process.returncode)
    record_property(TOLD, "".join(said))
    assert codes == [0, 0, 0], "\n".join(said)
    parts = [figures_in(path) for path in (odd, even, drawn)]
    total = {key: sum(part[key] for part in parts) for key in ("runs", "faults", "crashes", "wrong_deletions")}
    assert total["runs"] >= 50_000
    assert total["faults"] >= 10_000
    assert total["crashes"] >= 1_000
    assert total["wrong_deletions"] == 0
    assert 2 * min(part["worlds"] for part in parts[:2]) >= BUG_WORLDS
    assert coverage.missing(coverage.merged([part["seen"] for part in parts])) == []


@pytest.mark.parametrize("bug", sorted(BUGS))
def test_a_seeded_bug_is_found_by_its_invariant(tmp_path: Path, bug: str) -> None:
    told = tmp_path / "told.json"
    with simulation(
        "--seed", str(BUGS[bug].seed), "--worlds", str(BUG_WORLDS - BUGS[bug].seed), "--bug", bug, "--json", str(told)
    ) as process:
        said = said_by(process)
    broken = figures_in(told)["broken"]
    assert process.returncode == 1, said
    assert broken["promise"] in BUGS[bug].promises, said
    assert any(rule in broken["rule"] for rule in BUGS[bug].rules), said
    assert f"Replay: {broken['replay']}" in said


def test_the_same_seed_replays_byte_for_byte_alone_and_among_others() -> None:
    with simulation("--worlds", "4", "--digest") as first, simulation("--worlds", "4", "--digest") as second:
        said, again = said_by(first).splitlines(), said_by(second).splitlines()
    with simulation("--seed", "4", "--digest") as third:
        alone = said_by(third).splitlines()
    assert [line.split()[0] for line in said[:4]] == ["1", "2", "3", "4"]
    assert said[:4] == again[:4]
    assert alone[0] == said[3]
