"""Has anything become much slower? Ratios that were measured in one run, against those that are kept. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attrs import evolve, frozen

from benchmarks.scale.report import Report, ratio_text
from benchmarks.scale.rows import Better, Row

MARGIN = 3.0
"""So much worse than kept is a regression; what a busy machine does to a ratio is less."""


class UnlikeError(Exception):
    """What is kept can't be compared with what was measured; the text says why."""


@frozen
class Verdict:
    """What the comparison says of one ratio."""

    key: str
    text: str
    good: bool


def kept_document(report: Report) -> dict[str, Any]:
    """What is kept of *report*: ratios alone, which mean something on other machines, too."""
    kept = {row.key: {"figure": row.figure, "ratio": _rounded(row)} for row in report.rows if row.checked and row.ratio}
    return {"quick": report.quick, "rows": kept}


def _rounded(row: Row) -> float:
    assert row.ratio is not None
    return float(f"{max(row.ratio, row.luck_below):.3g}")


def kept_figures(kept: Mapping[str, Any]) -> list[str]:
    """The figures that have to be measured to be compared with *kept*, each once."""
    return list(dict.fromkeys(row["figure"] for row in kept["rows"].values()))


def compare(report: Report, kept: Mapping[str, Any], margin: float = MARGIN) -> list[Verdict]:
    """Hold the ratios of *report* against *kept*, those of the figures that were measured.

    Raises:
        UnlikeError: The sizes are others.
    """
    if report.quick != kept["quick"]:
        sizes = "small ones (--quick)" if kept["quick"] else "full ones"
        raise UnlikeError(f"the kept ratios were measured with other sizes: {sizes}")
    return [*_verdicts(report.rows, kept["rows"], margin)]


def _verdicts(rows: Sequence[Row], kept: Mapping[str, Any], margin: float) -> Iterator[Verdict]:
    measured = {row.key: row for row in rows}
    figures = {row.figure for row in rows}
    for key, entry in kept.items():
        row = measured.get(key)
        if row is not None and row.ratio is not None:
            yield _judged(row, row.ratio, entry["ratio"], margin)
        elif row is not None or entry["figure"] in figures:
            yield Verdict(key, f"not measured{': ' + row.note if row is not None and row.note else ''}", good=False)


def doubtful(report: Report, kept: Mapping[str, Any], margin: float = MARGIN) -> list[str]:
    """The figures with a ratio that looks like a regression, each once; they are worth a second look.

    A peer that is not there won't be there when it is looked for again.
    """
    missing = {row.key for row in report.rows if row.ratio is None and not row.failed}
    bad = [verdict.key for verdict in compare(report, kept, margin) if not verdict.good and verdict.key not in missing]
    return list(dict.fromkeys(kept["rows"][key]["figure"] for key in bad))


def at_best(first: Report, again: Report) -> Report:
    """*first* with the better one of both ratios in each row: noise passes, and a regression does not.

    *again* is of some of its figures; what failed there the first time counts no more.
    """
    others = {row.key: row for row in again.rows}
    failed = {row.figure for row in first.rows if row.failed} & {row.figure for row in again.rows}
    rows = [_better(row, others.pop(row.key, None)) for row in first.rows if row.figure not in failed]
    return evolve(first, rows=[*rows, *others.values()])


def _better(row: Row, other: Row | None) -> Row:
    if other is None or other.ratio is None:
        return row
    if row.ratio is None:
        return other
    return min(row, other, key=_badness)


def _badness(row: Row) -> float:
    assert row.ratio is not None
    return row.ratio if row.better is Better.LESS else -row.ratio


def _judged(row: Row, ratio: float, kept: float, margin: float) -> Verdict:
    worse = ratio / kept if row.better is Better.LESS else kept / ratio
    found = f"{ratio_text(ratio)} of {row.peer}, kept {ratio_text(kept)}: {worse:.2f} x as bad"
    if worse <= margin:
        return Verdict(row.key, found, good=True)
    return Verdict(row.key, f"REGRESSION: {found}, more than {margin:g} x", good=False)
