"""Speed and scale of hypemand, each figure beside something of its kind, measured in one run. See README.md."""

import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import trio

from benchmarks.scale.check import UnlikeError, at_best, compare, doubtful, kept_document, kept_figures
from benchmarks.scale.figures import FIGURES
from benchmarks.scale.machine import machine
from benchmarks.scale.options import Options, parse_options
from benchmarks.scale.report import Report, report_of
from benchmarks.scale.rows import Row
from benchmarks.scale.setting import Figure, Setting

INTERRUPTED = 130
LOOKS = 3
"""What is much worse than kept each of so many times is a regression."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Goals are told, not enforced; a regression, or a figure that failed, is exit status 1."""
    options = parse_options(FIGURES, argv)
    kept = _read(options.check) if options.check else None
    if kept is not None and not options.only:
        options = options.with_only(kept_figures(kept))
    if options.read is not None:
        report: Report | None = report_of(_read(options.read))
    else:
        report = trio.run(_run, options, kept)
    if report is None:
        return INTERRUPTED
    print(report.markdown() if options.markdown else report.table())
    if options.json is not None:
        options.json.write_text(json.dumps(report.document(), indent=2) + "\n")
    if options.keep is not None:
        options.keep.write_text(json.dumps(kept_document(report), indent=2) + "\n")
    status = 1 if report.failed else 0
    return max(status, _checked(report, kept)) if kept is not None else status


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        sys.exit(f"{path} can't be read: {error}")


def _checked(report: Report, kept: Any) -> int:
    try:
        verdicts = compare(report, kept)
    except UnlikeError as error:
        print(f"not compared: {error}")
        return 1
    print()
    for verdict in verdicts:
        print(f"{'ok ' if verdict.good else 'BAD'} {verdict.key}: {verdict.text}")
    bad = sum(not verdict.good for verdict in verdicts)
    print(f"{len(verdicts)} ratios compared with those kept: {f'{bad} BAD' if bad else 'none is much worse'}")
    return 1 if bad or not verdicts else 0


def _tell(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


async def _run(options: Options, kept: Any) -> Report | None:
    """The report; None when a signal came first. Either way, everything that was started has ended."""
    report = None
    about = machine(options.directory)
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:
            measuring = trio.CancelScope()
            nursery.start_soon(_cancel_at, signals, measuring)
            with measuring:
                report = await _look_again(await _report(options, about), options, kept)
            nursery.cancel_scope.cancel()
    return report


async def _report(options: Options, about: Mapping[str, Any]) -> Report:
    figures = [FIGURES[name] for name in options.only or FIGURES]
    rows = [row for figure in figures for row in await _measured(figure, options)]
    return Report(rows=rows, quick=options.quick, machine=about)


async def _look_again(report: Report, options: Options, kept: Any) -> Report:
    """Measure once more what looks like a regression: what else a machine does passes."""
    for _ in range(LOOKS - 1):
        doubts = doubtful(report, kept) if kept is not None and kept["quick"] == options.quick else []
        if not doubts:
            break
        _tell(f"much worse than kept, measured once more: {', '.join(doubts)}")
        report = at_best(report, await _report(options.with_only(doubts), report.machine))
    return report


async def _cancel_at(signals: AsyncIterator[int], measuring: trio.CancelScope) -> None:
    async for number in signals:
        _tell(f"{signal.Signals(number).name}: clearing up")
        measuring.cancel()


def _new_directory(parent: Path) -> Path:
    directory = Path(tempfile.mkdtemp(prefix="hypemand-bench-", dir=parent))
    directory.chmod(0o711)  # libvirt's guest, which is another user's, has its disk in there
    return directory


async def _measured(figure: Figure, options: Options) -> Sequence[Row]:
    directory = _new_directory(options.directory)
    _tell(f"{figure.name}: {figure.about}")
    try:
        return await figure.measure(Setting(directory, options.quick, options.runs, options.check is not None, _tell))
    except Exception as error:  # noqa: BLE001 - the boundary of a figure: one that breaks leaves the others to be measured
        _tell(f"{figure.name}: failed: {error!r}")
        note = f"failed: {str(error) or type(error).__name__}"
        return [Row(figure=figure.name, key=figure.name, title=figure.name, unit="", note=note, failed=True)]
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
