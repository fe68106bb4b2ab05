"""The command line of the freeze benchmark, and its help."""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from attrs import frozen

from benchmarks.freeze_report import TITLES

# The guest leaves 16 MB of its RAM unfilled, and knows none beyond the hole for PCI.
_LEAST_MB, _MOST_MB = 64, 2048


@frozen(kw_only=True)
class Options:
    """What the command line asks for."""

    memory_mb: int
    runs: int
    ways: Sequence[str]
    directory: Path
    as_json: bool
    whole_pages: bool
    engine: bool


def parse_options(argv: Sequence[str] | None) -> Options:
    """The options in *argv*, or in the process's own arguments. Ends the process for ``--help`` and for mistakes."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.freeze",
        description=(
            "Measure how long a QEMU guest stands still for a snapshot with its memory: a bare snapshot-save,"
            " hypemand's internal and background modes, and virsh, in turns on one machine. A round takes some seconds."
        ),
        epilog=(
            "Goals are told, not enforced: the exit status is 0 unless something failed to run (1), or the benchmark"
            " was interrupted (130). The table, or the JSON document, goes to stdout, progress to stderr. Nothing is"
            " left running or lying about."
        ),
    )
    parser.add_argument(
        "--memory-mb",
        type=_number(_LEAST_MB, _MOST_MB),
        default=512,
        metavar="MB",
        help="the guest's RAM, nearly all of it filled; a freeze grows with it (default: 512, which the goals are for)",
    )
    parser.add_argument(
        "--runs",
        type=_number(1, 1000),
        default=7,
        metavar="N",
        help="measured snapshots of each way, after one that is not; more of them even out a busy machine (default: 7)",
    )
    parser.add_argument(
        "--ways",
        nargs="+",
        choices=TITLES,
        default=list(TITLES),
        metavar="WAY",
        help=f"which to take, of {', '.join(TITLES)}; ratios need their other side as well (default: all)",
    )
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path(tempfile.gettempdir()),
        metavar="DIR",
        help=(
            "where the disks and the snapshots lie meanwhile, some four times the RAM; its filesystem is part of what"
            " is measured. For root, libvirt's guest runs as nobody, who must be able to get there"
            " (default: %(default)s)"
        ),
    )
    parser.add_argument(
        "--whole-pages",
        action="store_true",
        help=(
            "have the kernel put the guest's RAM back into huge pages before each snapshot (root, Linux 6.1 or later);"
            " without it, a background snapshot finds them broken up by the one before"
        ),
    )
    parser.add_argument(
        "--engine",
        action="store_true",
        help=(
            "measure something else: what runs of a daemon add to the freeze of each backend, over the bare calls of"
            " its hypervisor; of the options above, --runs and --directory count"
        ),
    )
    parser.add_argument("--json", action="store_true", help="one JSON document, with every single snapshot in it")
    given = parser.parse_args(argv)
    if not given.directory.is_dir():
        parser.error(f"argument --directory: {str(given.directory)!r} is no directory")
    # In the table's order, each once.
    ways = [way for way in TITLES if way in given.ways]
    return Options(
        memory_mb=given.memory_mb,
        runs=given.runs,
        ways=ways,
        directory=given.directory.absolute(),
        as_json=given.json,
        whole_pages=given.whole_pages,
        engine=given.engine,
    )


def _number(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not (text.isdecimal() and least <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least} to {most}")
        return int(text)

    return parse
