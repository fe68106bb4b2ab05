"""``python -m tests.simulation``: simulate worlds, print what was seen, and how to replay one that breaks a promise."""

import argparse
import json
import os
import secrets
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from attrs import asdict

from tests.simulation import coverage
from tests.simulation.bugs import BUGS
from tests.simulation.simulate import Figures, Outcome, simulate

HASH_SEED = "0"
SHOWN_EVENTS = 40


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    if os.environ.get("PYTHONHASHSEED") != HASH_SEED:
        # The order of sets is part of what a seed replays.
        environment = {**os.environ, "PYTHONHASHSEED": HASH_SEED}
        os.execve(sys.executable, [sys.executable, "-m", "tests.simulation", *arguments], environment)
    figures = Figures()
    broken = _simulate(options, figures)
    _tell(options, figures, broken)
    return 1 if broken is not None else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="the first seed")
    parser.add_argument("--random", action="store_true", help="begin at a random seed, which is printed")
    parser.add_argument("--step", type=int, default=1, help="from one seed to the next")
    parser.add_argument("--worlds", type=int, help="how many worlds; 1 where no number of runs is given")
    parser.add_argument("--runs", type=int, help="go on until there were so many runs")
    parser.add_argument("--bug", choices=sorted(BUGS), help="break the product on purpose")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--digest", action="store_true", help="print the digest of each world's trace")
    return parser


def _simulate(options: argparse.Namespace, figures: Figures) -> Outcome | None:
    seed = secrets.randbelow(10**9) if options.random else options.seed
    worlds = options.worlds or (10**9 if options.runs else 1)
    if options.random:
        sys.stdout.write(f"random seed {seed}\n")
    with BUGS[options.bug].make() if options.bug else nullcontext():
        while worlds and (options.runs is None or figures.runs < options.runs):
            outcome = simulate(seed, figures)
            if options.digest:
                sys.stdout.write(f"{seed} {outcome.digest}\n")
            if outcome.violation is not None:
                return outcome
            seed += options.step
            worlds -= 1
    return None


def _tell(options: argparse.Namespace, figures: Figures, broken: Outcome | None) -> None:
    told = asdict(figures)
    told["cpu_s"] = round(time.process_time(), 1)
    told["broken"] = None
    if broken is not None and broken.violation is not None:
        bug = f" --bug '{options.bug}'" if options.bug else ""
        command = f"python -m tests.simulation --seed {broken.seed}{bug}"
        told["broken"] = {
            "seed": broken.seed,
            "promise": broken.violation.promise,
            "rule": broken.violation.rule,
            "detail": broken.violation.detail,
            "replay": command,
        }
        events = "\n".join(broken.last_events[-SHOWN_EVENTS:])
        sys.stdout.write(f"{events}\n\nBROKEN, seed {broken.seed}: {broken.violation}\nReplay: {command}\n")
    if options.json is not None:
        options.json.write_text(json.dumps(told, indent=2) + "\n")
    sys.stdout.write(_summary(figures, told["cpu_s"]))


def _summary(figures: Figures, cpu_s: float) -> str:
    missing = coverage.missing(coverage.merged([figures.seen]))
    return (
        f"{figures.worlds} worlds, {figures.instance_years:.1f} instance-years, {figures.runs} runs"
        f" ({', '.join(f'{count} {name}' for name, count in sorted(figures.outcomes.items()))}),\n"
        f"{figures.faults} faults, {figures.crashes} crashes, {figures.freezes} freezes,"
        f" {figures.deletions} deletions; {cpu_s} s of CPU\n"
        f"longest undisturbed freeze {figures.longest_freeze_of_budget:.3f} of its budget,"
        f" latest healthy run {figures.latest_control_s:.3f} s\n"
        f"pairs of fault and step not seen: {len(missing)} of {len(coverage.expected())}\n"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
