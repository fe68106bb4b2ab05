"""How fast the API answers, beside a bare hypercorn app, and what a flood of requests does to runs that are due.

Run it from a checkout, on an otherwise idle machine::

    .venv/bin/python -m benchmarks.api
    .venv/bin/python -m benchmarks.api --rounds 9 --json > api.json

GET and PUT over TCP with a token, from 16 kept connections, in turns with an
app of hypercorn's that has one route and the same answer: what the bare app
does in a second is the measure, and the ratio is the figure. Then a thousand
schedules come due at one moment, once alone and once while a thousand new
schedules are put from 16 connections.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trio

from benchmarks.api_flood import flood
from benchmarks.api_rounds import Rates, measure_rates

GET_TO_BARE = 0.5
LATEST_S = 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; the exit status says whether everything ran, not whether a goal is met."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.api", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="turns of each request (5)")
    parser.add_argument("--seconds", type=float, default=3.0, metavar="S", help="length of a turn (3)")
    parser.add_argument(
        "--schedules", type=int, default=1000, metavar="N", help="due at once, and put meanwhile (1000)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    options = parser.parse_args(argv)
    report = trio.run(_run, options)
    print(json.dumps(report, indent=2) if options.json else _table(report))
    return 0


async def _run(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="hypemand-bench-") as directory:
        rates = await measure_rates(Path(directory) / "rates", options.rounds, options.seconds, _tell)
        _tell(f"{options.schedules} schedules due at once, alone")
        alone = await flood(Path(directory) / "alone", options.schedules, puts=0)
        _tell(f"{options.schedules} schedules due at once, while {options.schedules} are put")
        beside = await flood(Path(directory) / "beside", options.schedules, puts=options.schedules)
    return {
        "load_average": os.getloadavg()[0],
        "rates": [_rates_document(rates, one) for one in rates],
        "due_at_once": {"alone": alone.document(), "beside_puts": beside.document()},
    }


def _tell(text: str) -> None:
    print(text, file=sys.stderr)


def _rates_document(every: Sequence[Rates], one: Rates) -> dict[str, Any]:
    return {"what": one.what, **one.document(), "to_bare": round(one.median / every[0].median, 3)}


def _table(report: dict[str, Any]) -> str:
    lines = ["request                        median/s     min     max   to bare   99 % within"]
    lines += [
        f"{row['what']:<30} {row['median']:>8.0f} {row['min']:>7.0f} {row['max']:>7.0f}"
        f" {row['to_bare']:>9.2f} {row['p99_ms']:>10.1f} ms"
        for row in report["rates"]
    ]
    lines += ["", "due at once                      runs  failed   latest    half within   PUTs   slowest PUT"]
    for name, row in report["due_at_once"].items():
        put = f"{row['slowest_put_s']:>10.2f} s" if row["puts"] else f"{'-':>12}"
        lines.append(
            f"{name.replace('_', ' '):<30} {row['runs']:>6} {row['failed']:>7} {row['latest_s']:>6.2f} s"
            f" {row['median_late_s']:>10.2f} s {row['puts']:>6} {put}"
        )
    get = next(row for row in report["rates"] if row["what"].startswith("GET"))
    latest_s = report["due_at_once"]["beside_puts"]["latest_s"]
    lines += [
        "",
        f"GET to bare: {get['to_bare']:.2f}, goal {GET_TO_BARE} or more",
        f"latest run beside the PUTs: {latest_s:.2f} s, goal {LATEST_S:g} s or less",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
