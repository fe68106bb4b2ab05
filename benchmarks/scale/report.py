"""What was measured, as a table for people, as Markdown for the documents, and as a document for programs. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attrs import frozen

from benchmarks.scale.rows import Better, Of, Row, row_of, short

_HEAD = ("figure", "hypemand", "beside", "", "ratio", "goal", "met?")


@frozen(kw_only=True)
class Report:
    """Everything about one run of the benchmarks.

    Attributes:
        quick: Small sizes; to be compared with others of that kind alone.
        machine: As `machine.machine` tells it.
    """

    rows: Sequence[Row]
    quick: bool
    machine: Mapping[str, Any]

    @property
    def failed(self) -> bool:
        """Whether something could not be measured that should have been."""
        return any(row.failed for row in self.rows)

    def document(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {"quick": self.quick, "machine": dict(self.machine), "rows": [row.document() for row in self.rows]}

    def table(self) -> str:
        """To be read on a terminal."""
        cells = [_HEAD, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[column]) for line in cells) for column in range(len(_HEAD))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
        return "\n".join(line.rstrip() for line in [*self._about(), "", *lines, *self._notes()])

    def markdown(self) -> str:
        """The same, for a document."""
        lines = [_HEAD, ("---",) * len(_HEAD), *(_cells(row) for row in self.rows)]
        table = [f"| {' | '.join(line)} |" for line in lines]
        return "\n".join([*(f"{line}  " for line in self._about()), "", *table, *self._notes()])

    def _about(self) -> Iterator[str]:
        machine = self.machine
        if self.quick:
            yield "QUICK: small sizes, to see that it works and to compare ratios; no figures to be quoted."
        yield (
            f"{machine['cpus']} CPUs ({machine['cpu_model']}), Linux {machine['kernel']}, {machine['filesystem']} at"
            f" {machine['directory']}, load {machine['load_before']:.2f} before"
        )
        yield ", ".join(f"{name} {version}" for name, version in machine["versions"].items())

    def _notes(self) -> Iterator[str]:
        noted: dict[str, list[str]] = {}
        for row in self.rows:
            if row.note:
                noted.setdefault(row.note, []).append(row.title)
        if noted:
            yield ""
        for note, titles in noted.items():
            yield f"{'; '.join(dict.fromkeys(titles))}: {note}"


def report_of(document: Mapping[str, Any]) -> Report:
    """The report that `Report.document` was made of."""
    rows = [row_of(row) for row in document["rows"]]
    return Report(rows=rows, quick=document["quick"], machine=document["machine"])


def _cells(row: Row) -> tuple[str, ...]:
    met = {None: "", True: "met", False: "NOT met"}[row.met]
    ratio = "" if row.ratio is None else ratio_text(row.ratio)
    ours, theirs = _value(row, row.ours, row.ours_text), _value(row, row.theirs, row.theirs_text)
    return (row.title, ours, theirs, row.peer, ratio, _goal(row), met)


def _value(row: Row, value: float | None, text: str) -> str:
    if value is None:
        return "-" if not row.note else "(see below)"
    return f"{text or short(value)} {row.unit}".rstrip()


def ratio_text(ratio: float) -> str:
    """*ratio*; where it is small, as a fraction, which is easier to grasp."""
    return f"1/{short(1 / ratio)}" if 0 < ratio < 0.2 else short(ratio)


def _goal(row: Row) -> str:
    if row.goal is None:
        return ""
    most = "at most" if row.better is Better.LESS else "at least"
    unit = row.unit if row.goal.of is Of.VALUE else "x"
    return f"{most} {row.goal.limit:,g} {unit}"
