"""A soak: the real daemon with many schedules at one-minute intervals, watched for minutes. Is everything flat?

Run it from a checkout::

    .venv/bin/python -m benchmarks.soak
    .venv/bin/python -m benchmarks.soak --minutes 2 --schedules 200 --output /tmp/soak

The instances are directories of the embedded backend, with some bytes each,
and are really captured and pruned. Each few seconds memory, descriptors,
threads and processor time of the daemon and of its guard are noted, and the
runs that have ended since, with how late each began. What was seen is written
as JSON, and as a plot beside it.
"""

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import trio

from benchmarks.plot import Line, Panel, plot
from benchmarks.scale.machine import default_directory, is_in_memory, machine
from benchmarks.soak_report import Sample, document, summary
from benchmarks.soak_watch import Watch
from tests.processes import Lab, instant, running_daemon

INTERRUPTED = 130
WARM_UP_S = 70.0
"""So long the figures are not judged: every instance has its first run in it."""
_MAKING_S = 900.0


def main(argv: Sequence[str] | None = None) -> int:
    """Soak, write, and tell in a few lines; 1 when a run went wrong or the daemon ended."""
    options = _options(argv)
    soaked = trio.run(_run, options)
    if soaked is None:
        return INTERRUPTED
    told, samples = soaked
    options.output.with_suffix(".json").write_text(json.dumps(told, indent=2) + "\n")
    options.output.with_suffix(".png").write_bytes(plot([s.at_s / 60 for s in samples], _panels(samples), "min"))
    print("\n".join(summary(told)))
    print(f"written: {options.output.with_suffix('.json')}, {options.output.with_suffix('.png')}")
    return 1 if told["runs"]["failed"] else 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak",
        description="Many schedules at one-minute intervals for minutes: memory, descriptors and lateness, as a plot.",
        epilog="Exit status: 0 done, 1 a run failed or was skipped, 130 interrupted. Nothing is left running.",
    )
    parser.add_argument("--minutes", type=float, default=20.0, metavar="M", help="how long (%(default)g)")
    parser.add_argument("--schedules", type=int, default=10_000, metavar="N", help="how many (%(default)s)")
    parser.add_argument("--every", type=float, default=5.0, metavar="S", help="seconds between two looks (%(default)g)")
    parser.add_argument("--concurrency", type=int, default=16, metavar="N", help="runs at once (%(default)s)")
    parser.add_argument(
        "--directory", type=Path, default=default_directory(), metavar="DIR", help="where the state lies (%(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("soak"), metavar="NAME", help="files to write: NAME.json, NAME.png (soak)"
    )
    options = parser.parse_args(argv)
    if not options.directory.is_dir() or is_in_memory(options.directory):
        parser.error(f"argument --directory: {options.directory} has to be a directory on a disk")
    if options.schedules < 1 or options.every <= 0 or options.minutes * 60 < 3 * options.every:
        parser.error("there has to be a schedule, and time for three looks")
    if not options.output.absolute().parent.is_dir():
        parser.error(f"argument --output: {options.output.absolute().parent} is no directory")
    return options


def _tell(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


async def _run(options: argparse.Namespace) -> tuple[dict[str, Any], list[Sample]] | None:
    """What was seen; None when a signal came first. Either way, everything that was started has ended."""
    told = None
    directory = Path(tempfile.mkdtemp(prefix="hypemand-soak-", dir=options.directory))
    try:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
            async with trio.open_nursery() as nursery:
                soaking = trio.CancelScope()
                nursery.start_soon(_cancel_at, signals, soaking)
                with soaking:
                    told = await _soak(options, Lab(directory))
                nursery.cancel_scope.cancel()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return told


async def _cancel_at(signals: AsyncIterator[int], soaking: trio.CancelScope) -> None:
    async for number in signals:
        _tell(f"{signal.Signals(number).name}: clearing up")
        soaking.cancel()


async def _soak(options: argparse.Namespace, lab: Lab) -> tuple[dict[str, Any], list[Sample]]:
    about = machine(options.directory)
    names = [f"vm-{number:06}" for number in range(options.schedules)]
    _write_config(lab, names, options.concurrency)
    _tell(f"making {len(names)} instances")
    async with running_daemon(lab.config) as daemon:
        await daemon.wait_for("API serves")
        with trio.fail_after(_MAKING_S):
            while len([*(lab.root / "instances").glob("*")]) < len(names):  # noqa: ASYNC110 - of another process
                await trio.sleep(1.0)
        await daemon.stop()
    first = datetime.now(UTC) + timedelta(seconds=5 + len(names) / 1000)
    for number, name in enumerate(names):
        due = first + timedelta(seconds=60 * number / len(names))
        keys = {"interval": "1m", "retention": {"max_count": 1}, "managed_by": "api"}
        lab.prepare(name, next_run_at=instant(due), **keys)
    samples = []
    async with running_daemon(lab.config) as daemon:
        await daemon.wait_for("API serves")
        with closing(Watch(daemon.pid, lab.state, began=time.time())) as watch:
            until = trio.current_time() + 60 * options.minutes
            while trio.current_time() < until:
                await trio.sleep(options.every)
                if not daemon.alive:
                    raise SystemExit(f"the daemon ended by itself: {daemon.log.read_text()[-2000:]}")
                samples.append(watch.look())
                _tell(samples[-1].text())
        await daemon.stop()
    told = document(samples, warm_up_s=WARM_UP_S, schedules=len(names), machine=about, wrong=watch.wrong)
    return told, samples


def _write_config(lab: Lab, names: Sequence[str], concurrency: int) -> None:
    """The schedules are those of the state; the guests are as small as can be."""
    lab.write("", instances=tuple(names), backend=f"concurrency = {concurrency}", runs=f"concurrency = {concurrency}")
    small = lab.config.read_text().replace('memory = "64KiB", disk = "256KiB"', 'memory = "1KiB", disk = "1KiB"')
    lab.replace(small)


def _panels(samples: Sequence[Sample]) -> list[Panel]:
    return [
        Panel(
            "memory, MB",
            [Line("daemon RSS", [s.rss_mb for s in samples]), Line("guard RSS", [s.guard_rss_mb for s in samples])],
        ),
        Panel(
            "descriptors and threads",
            [Line("descriptors", [s.descriptors for s in samples]), Line("threads", [s.threads for s in samples])],
        ),
        Panel(
            "late, ms", [Line("p50", [s.late_p50_ms for s in samples]), Line("p99", [s.late_p99_ms for s in samples])]
        ),
        Panel("processor, % of a core", [Line("daemon", [s.cpu_percent for s in samples])]),
        Panel("runs per second", [Line("ended", [s.runs_per_s for s in samples])]),
    ]


if __name__ == "__main__":
    sys.exit(main())
