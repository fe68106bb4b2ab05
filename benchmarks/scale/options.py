"""The command line of ``python -m benchmarks``, and its help."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from attrs import evolve, frozen

from benchmarks.scale.machine import default_directory, filesystem_of, is_in_memory
from benchmarks.scale.setting import Figure

_EPILOG = """\
Progress goes to stderr, the table to stdout; --json FILE has everything that was
measured, with machine and versions. Each row has hypemand and its peer measured in
this run, so compare the ratio; times alone depend on the machine and on what else
it does. Goals are told, not enforced.

examples
  python -m benchmarks --json full.json          all of it, on an idle machine
  python -m benchmarks --only load run-log       two figures
  python -m benchmarks --quick                   does everything work? small sizes
  python -m benchmarks --quick --keep benchmarks/kept.json
                                                 keep the ratios of today
  python -m benchmarks --quick --check benchmarks/kept.json
                                                 is any of them much worse than kept?
  python -m benchmarks --read full.json --markdown
                                                 the table of a run before, for a document

exit status: 0 measured; 1 a figure failed to run, or a ratio is more than three times
as bad as kept; 2 wrong arguments; 130 interrupted. Nothing is left running or lying
about. APScheduler, the peer of most, comes with: pip install -e '.[bench]'
"""


@frozen(kw_only=True)
class Options:
    """What the command line asks for. *only* empty: all figures."""

    only: Sequence[str]
    quick: bool
    runs: int
    directory: Path
    json: Path | None
    markdown: bool
    read: Path | None
    keep: Path | None
    check: Path | None

    def with_only(self, names: Sequence[str]) -> "Options":
        """The same for these figures alone."""
        return evolve(self, only=names)


def parse_options(figures: Mapping[str, Figure], argv: Sequence[str] | None = None) -> Options:
    """The options in *argv*, or in the process's own arguments. Ends the process for ``--help`` and for mistakes."""
    parser = _parser(figures)
    given = parser.parse_args(argv)
    if not given.directory.is_dir():
        parser.error(f"argument --directory: {str(given.directory)!r} is no directory")
    if given.read is None and is_in_memory(given.directory):
        parser.error(
            f"{given.directory} is on {filesystem_of(given.directory)}, where nothing is durable:"
            " give --directory on a disk"
        )
    if given.runs is not None and given.runs < 1:
        parser.error("argument --runs: at least 1")
    return Options(
        only=[name for name in figures if name in (given.only or ())],
        quick=given.quick,
        runs=given.runs or (1 if given.quick else 5),
        directory=given.directory.absolute(),
        json=given.json,
        markdown=given.markdown,
        read=given.read,
        keep=given.keep,
        check=given.check,
    )


def _parser(figures: Mapping[str, Figure]) -> argparse.ArgumentParser:
    width = max(map(len, figures))
    listed = "\n".join(f"  {name:<{width}}  {figure.about}" for name, figure in figures.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=f"Speed and scale of hypemand, each figure beside something of its kind.\n\nfigures\n{listed}",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=figures, metavar="NAME", help="these figures alone")
    parser.add_argument("--quick", action="store_true", help="small sizes and one round: for a check, not for quoting")
    parser.add_argument("--runs", type=int, metavar="N", help="rounds of what is noisy (5; with --quick 1)")
    parser.add_argument(
        "--directory",
        type=Path,
        default=default_directory(),
        metavar="DIR",
        help="where states lie meanwhile; its filesystem is part of what is measured (%(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--read", type=Path, metavar="FILE", help="measure nothing; take what --json wrote")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="write the ratios there, for --check")
    parser.add_argument(
        "--check", type=Path, metavar="FILE", help="compare the ratios with those kept; measures what is kept alone"
    )
    return parser
