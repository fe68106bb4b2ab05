"""``python -m tests.reliability``: kill daemons and simulate worlds, and write the figures into docs/reliability.md.

Takes half an hour with the defaults on two processors. Exit status 1, and nothing written, if a promise was broken.
"""

import argparse
import json
import platform
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- figures: begin -->\n", "<!-- figures: end -->\n"


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description=__doc__)
    parser.add_argument("--kills", type=int, default=1000, help="daemons to kill (%(default)s)")
    parser.add_argument("--runs", type=int, default=200_000, help="runs to simulate (%(default)s)")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**9), help="of both")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        simulated = figures_of("tests.simulation", Path(directory, "s"), "--runs", options.runs, "--seed", options.seed)
        killed = figures_of("tests.kills", Path(directory, "k"), "--kills", options.kills, "--seed", options.seed)
    if simulated is None or killed is None:
        return 1
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    PAGE.write_text(before + BEGIN + "\n".join(table(simulated, killed)) + "\n" + END + rest.split(END)[1])
    return 0


def figures_of(module: str, out: Path, *arguments: object) -> dict[str, Any] | None:
    """The figures that *module* wrote; None where it found a broken promise, which it has told."""
    command = [sys.executable, "-m", module, *map(str, arguments), "--json", str(out)]
    if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
        return None
    figures: dict[str, Any] = json.loads(out.read_text())
    return figures


def table(simulated: dict[str, Any], killed: dict[str, Any]) -> Iterator[str]:
    """The figures as they stand on the page."""
    yield f"By one run of the command above, on {platform.machine()} with Python {platform.python_version()}.\n"
    yield "| simulated | |"
    yield "|---|---|"
    yield from (f"| {what} | {value} |" for what, value in _simulated(simulated))
    yield ""
    yield "| real daemons, killed or hung | |"
    yield "|---|---|"
    yield from (f"| {what} | {value} |" for what, value in _killed(killed))
    yield ""
    yield "| by backend | kills | longest from death to a running guest | longest hang over a freeze | longest freeze |"
    yield "|---|---|---|---|---|"
    yield from (_by_backend(name, figures) for name, figures in sorted(killed["by_backend"].items()))


def _simulated(figures: dict[str, Any]) -> Iterator[tuple[str, str]]:
    outcomes = ", ".join(f"{count:,} {name}" for name, count in sorted(figures["outcomes"].items()))
    yield "worlds", f"{figures['worlds']:,}"
    yield "instance-years", f"{figures['instance_years']:,.1f}"
    yield "runs", f"{figures['runs']:,} ({outcomes})"
    yield "injected faults", f"{figures['faults']:,}, in {len(figures['seen'])} pairs of fault and step"
    yield "crashes", f"{figures['crashes']:,}"
    yield "torn ends of the run log, renames lost", f"{figures['torn_ends']:,}, {figures['lost_names']:,}"
    yield "deletions", f"{figures['deletions']:,}"
    yield "wrong deletions", str(figures["wrong_deletions"])
    yield "lost runs", str(figures["lost_runs"])
    yield "freezes", f"{figures['freezes']:,}"
    yield "longest freeze that nothing kept from ending, of its budget", f"{figures['longest_freeze_of_budget']:.3f}"
    yield "latest run of a healthy schedule", f"{figures['latest_control_s']:.3f} s"


def _killed(figures: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "kills", f"{figures['kills']:,}, at {figures['steps_seen']} pairs of step and backend"
    yield "survived", f"{figures['survived']:,}"
    yield "guests left frozen", str(figures["left_frozen"])
    yield "lost runs", str(figures["lost_runs"])
    yield "duplicates", str(figures["duplicates"])


def _by_backend(name: str, figures: dict[str, Any]) -> str:
    longest = figures["longest_freeze_s"]
    freezes = ", ".join(f"{f['longest_freeze_s']:.2f} s (budget {f['budget_s']:g} s)" for f in longest)
    times = [_seconds(figures[f"longest_{what}_s"]) for what in ("from_death_to_thaw", "hang_over_a_freeze")]
    return f"| {name} | {figures['kills']} | {' | '.join(times)} | {freezes or '-'} |"


def _seconds(value: float | None) -> str:
    return "never frozen" if not value else f"{value:.2f} s"


if __name__ == "__main__":
    sys.exit(main())
