"""The parts of the benchmarks that measure nothing: what they make of what was measured."""

import json
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.__main__ import main
from benchmarks.plot import COLOURS, WHITE, Canvas, Line, Panel, plot, png, round_up
from benchmarks.scale.check import UnlikeError, at_best, compare, doubtful, kept_document, kept_figures
from benchmarks.scale.figures import FIGURES
from benchmarks.scale.options import parse_options
from benchmarks.scale.polling import polled_anywhere, polled_late_s
from benchmarks.scale.report import Report, ratio_text, report_of
from benchmarks.scale.rows import Better, Goal, Of, Row, Spread, late_row, percentile, short

MACHINE = {
    "cpus": 2,
    "cpu_model": "Some CPU",
    "kernel": "6.1",
    "filesystem": "ext4",
    "directory": "/var/tmp",
    "load_before": 0.25,
    "versions": {"hypemand": "0.1.0", "sqlite": "3.40"},
}
LATE = Row(
    figure="due", key="due/claimed", title="1,000 due", unit="ms", ours=40.0, peer="Peer", theirs=800.0, checked=True
)
RATE = Row(
    figure="runs",
    key="runs",
    title="runs",
    unit="/s",
    better=Better.MORE,
    ours=600.0,
    peer="Other",
    theirs=200.0,
    goal=Goal(2.0, Of.RATIO),
    checked=True,
)


def report(*rows: Row, quick: bool = True) -> Report:
    return Report(rows=[*rows], quick=quick, machine=MACHINE)


@pytest.mark.parametrize(("percent", "expected"), [(1, 1.0), (50, 50.0), (99, 99.0), (99.5, 100.0), (100, 100.0)])
def test_a_percentile_is_a_value_that_was_measured(percent: float, expected: float) -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert percentile(values, percent) == expected


@given(st.lists(st.floats(0, 1e6), min_size=1))
def test_no_more_than_the_rest_of_the_values_exceed_a_percentile(values: list[float]) -> None:
    p99 = percentile(values, 99)
    assert p99 in values
    assert sum(value > p99 for value in values) <= len(values) * 0.01


def test_rounds_are_told_by_their_median_and_their_worst() -> None:
    rounds = [Spread(1.0, 10.0, 11.0), Spread(2.0, 90.0, 99.0), Spread(3.0, 20.0, 21.0)]
    assert Spread.middle(rounds) == Spread(2.0, 20.0, 99.0)


def test_how_late_something_was_is_told_in_ms_by_its_p99() -> None:
    row = late_row(figure="due", key="x", title="due", ours=[[0.001, 0.002], [0.003, 0.004]], theirs=[[1.0]])
    assert (row.key, row.ours, row.theirs, row.unit) == ("due/x", 2.0, 1000.0, "ms")
    assert row.ours_text == "1.00 / 2.00 / 4.00"


@pytest.mark.parametrize(
    ("better", "goal", "ours", "theirs", "met"),
    [
        (Better.LESS, Goal(50.0), 50.0, None, True),
        (Better.LESS, Goal(50.0), 50.1, None, False),
        (Better.MORE, Goal(20_000.0), 19_999.0, None, False),
        (Better.MORE, Goal(2.0, Of.RATIO), 30.0, 10.0, True),
        (Better.MORE, Goal(2.0, Of.RATIO), 30.0, 20.0, False),
        (Better.LESS, Goal(1.25, Of.RATIO), 13.0, 10.0, False),
        (Better.LESS, Goal(1.25, Of.RATIO), 13.0, None, None),
        (Better.LESS, Goal(50.0), None, 1.0, None),
        (Better.LESS, None, 1.0, 1.0, None),
    ],
)
def test_a_goal_is_met_by_the_value_or_by_the_ratio(
    better: Better, goal: Goal | None, ours: float | None, theirs: float | None, met: bool | None
) -> None:
    row = Row(figure="f", key="k", title="t", unit="u", better=better, goal=goal, ours=ours, theirs=theirs)
    assert row.met is met


def test_a_report_comes_back_from_its_document_as_it_was() -> None:
    rows = [
        evolve(RATE, detail={"each": [1, 2]}, luck_below=1.0),
        evolve(LATE, ours=None, note="why", failed=True, ours_text="1 / 2"),
    ]
    written = report(*rows)
    assert report_of(json.loads(json.dumps(written.document()))) == written


def test_the_table_tells_values_ratio_goal_and_why_there_is_none() -> None:
    rows = [RATE, evolve(LATE, goal=Goal(20.0)), evolve(LATE, title="gone", ours=None, note="it is not installed")]
    lines = report(*rows).table().splitlines()
    (runs,) = (line.split() for line in lines if line.startswith("runs"))
    assert runs == ["runs", "600", "/s", "200", "/s", "Other", "3.00", "at", "least", "2", "x", "met"]
    (late,) = (line for line in lines if line.startswith("1,000 due"))
    assert "1/20.0" in late
    assert late.endswith("at most 20 ms  NOT met")
    assert lines[-1] == "gone: it is not installed"
    assert lines[0].startswith("QUICK")
    assert "ext4 at /var/tmp, load 0.25 before" in lines[1]


def test_a_note_that_several_rows_share_is_told_once() -> None:
    rows = [evolve(LATE, title=title, theirs=None, note="no peer here") for title in ("a", "b", "a")]
    assert report(*rows).table().splitlines()[-2:] == ["", "a; b: no peer here"]


def test_the_markdown_table_has_a_row_for_each() -> None:
    lines = report(RATE, LATE, quick=False).markdown().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 4
    assert {line.count("|") for line in table} == {8}
    assert "QUICK" not in lines[0]


@pytest.mark.parametrize(
    ("value", "text"), [(1234.5, "1,234"), (123.4, "123"), (12.34, "12.3"), (1.234, "1.23"), (0.1234, "0.123")]
)
def test_numbers_have_the_digits_that_count(value: float, text: str) -> None:
    assert short(value) == text


def test_small_ratios_are_told_as_fractions() -> None:
    assert [ratio_text(ratio) for ratio in (0.05, 0.2, 2.5, -0.1)] == ["1/20.0", "0.200", "2.50", "-0.100"]


KEPT = kept_document(report(LATE, RATE))


def bad(*rows: Row) -> list[str]:
    return [verdict.key for verdict in compare(report(*rows), KEPT) if not verdict.good]


def test_only_ratios_that_are_steady_are_kept_and_never_better_than_luck() -> None:
    kept = kept_document(report(LATE, evolve(RATE, checked=False), evolve(LATE, key="hung", luck_below=1.0)))
    assert kept == {
        "quick": True,
        "rows": {"due/claimed": {"figure": "due", "ratio": 0.05}, "hung": {"figure": "due", "ratio": 1.0}},
    }
    assert kept_figures(kept) == ["due"]


def test_ratios_within_the_margin_are_no_regression_in_either_direction() -> None:
    slower, fewer = evolve(LATE, ours=119.0), evolve(RATE, ours=201.0)
    assert bad(LATE, RATE) == bad(slower, fewer) == []
    assert bad(evolve(LATE, ours=1.0), evolve(RATE, ours=1e6)) == []


def test_a_ratio_beyond_the_margin_is_a_regression_whatever_the_absolute_times() -> None:
    assert bad(evolve(LATE, ours=121.0), RATE) == ["due/claimed"]
    assert bad(LATE, evolve(RATE, ours=199.0)) == ["runs"]
    assert bad(evolve(LATE, ours=121.0, theirs=1600.0), evolve(RATE, ours=199.0, theirs=100.0)) == []


def test_a_regression_says_what_was_found_and_what_was_kept() -> None:
    (late, _) = compare(report(evolve(LATE, ours=160.0), RATE), KEPT)
    assert late.text == "REGRESSION: 0.200 of Peer, kept 1/20.0: 4.00 x as bad, more than 3 x"


def test_a_kept_ratio_that_was_not_measured_is_bad_and_says_why() -> None:
    verdicts = compare(report(evolve(LATE, theirs=None, note="no peer here"), evolve(RATE, key="other")), KEPT)
    assert [(verdict.key, verdict.text, verdict.good) for verdict in verdicts] == [
        ("due/claimed", "not measured: no peer here", False),
        ("runs", "not measured", False),
    ]


def test_figures_that_were_left_out_are_not_compared() -> None:
    assert [verdict.key for verdict in compare(report(LATE), KEPT)] == ["due/claimed"]


def test_ratios_of_other_sizes_are_not_compared() -> None:
    with pytest.raises(UnlikeError, match="--quick"):
        compare(report(LATE, quick=False), KEPT)


def test_what_is_measured_again_counts_where_it_is_better() -> None:
    slow = report(evolve(LATE, ours=400.0), evolve(RATE, ours=1.0))
    assert doubtful(slow, KEPT) == ["due", "runs"]
    best = at_best(slow, report(evolve(LATE, ours=41.0), evolve(RATE, ours=0.5)))
    assert [row.ours for row in best.rows] == [41.0, 1.0]
    assert doubtful(best, KEPT) == ["runs"]


def test_what_has_no_peer_here_is_not_measured_again() -> None:
    without = report(evolve(LATE, theirs=None, note="no peer here"), evolve(RATE, ours=1.0))
    assert doubtful(without, KEPT) == ["runs"]


def test_a_figure_that_failed_once_counts_by_its_second_try() -> None:
    failed = Row(figure="due", key="due", title="due", unit="", note="failed", failed=True)
    first = report(failed, RATE)
    assert first.failed
    again = at_best(first, report(LATE))
    assert sorted(row.key for row in again.rows) == ["due/claimed", "runs"]
    assert not again.failed


def written(path: Path, document: Any) -> str:
    path.write_text(json.dumps(document))
    return str(path)


def test_the_check_of_a_run_before_fails_by_its_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = written(tmp_path / "kept.json", KEPT)
    good = written(tmp_path / "good.json", report(LATE, RATE).document())
    slow = written(tmp_path / "slow.json", report(evolve(LATE, ours=400.0), RATE).document())
    other = written(tmp_path / "other.json", report(LATE, RATE, quick=False).document())
    assert main(["--read", good, "--check", kept]) == 0
    assert "none is much worse" in capsys.readouterr().out
    assert main(["--read", slow, "--check", kept]) == 1
    assert "BAD due/claimed: REGRESSION" in capsys.readouterr().out
    assert main(["--read", other, "--check", kept]) == 1
    assert "not compared" in capsys.readouterr().out


def test_a_run_before_is_printed_as_markdown_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = written(tmp_path / "before.json", report(LATE, RATE).document())
    kept = tmp_path / "kept.json"
    assert main(["--read", before, "--markdown", "--keep", str(kept), "--json", str(tmp_path / "again.json")]) == 0
    assert "| 1,000 due | 40.0 ms | 800 ms | Peer | 1/20.0 |" in capsys.readouterr().out
    assert json.loads(kept.read_text()) == KEPT
    assert json.loads((tmp_path / "again.json").read_text()) == report(LATE, RATE).document()


def test_the_ratios_in_the_repository_are_of_figures_that_there_are() -> None:
    kept = json.loads((Path(__file__).parent.parent / "benchmarks" / "kept.json").read_text())
    assert kept["quick"]
    assert kept_figures(kept)
    assert set(kept_figures(kept)) <= FIGURES.keys()
    assert all(row["ratio"] > 0 for row in kept["rows"].values())


def test_help_names_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parse_options(FIGURES, ["--help"])
    told = capsys.readouterr().out
    assert [name for name, figure in FIGURES.items() if name not in told or figure.about not in told] == []


@pytest.mark.parametrize("arguments", [["--only", "nothing"], ["--runs", "0"], ["--directory", "/nowhere"]])
def test_wrong_arguments_measure_nothing(arguments: Sequence[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_options(FIGURES, arguments)


def test_a_polling_loop_runs_one_after_the_other_from_its_next_look_on() -> None:
    assert polled_late_s(3, 2.0, 0.75) == [15.0, 17.0, 19.0]
    late = polled_anywhere(1000, 2.0)
    assert min(late) >= 0
    assert max(late) == pytest.approx(60 * (1 - 0.5 / 60) + 999 * 2.0)
    assert sum(late) / len(late) == pytest.approx(30 + 999)


# The plot


def chunks(data: bytes) -> dict[bytes, bytes]:
    """Of a PNG file, each with its checksum checked."""
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    found, at = {}, 8
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, content = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", data, at + 8 + length) == (zlib.crc32(kind + content),)
        found[kind] = content
        at += 12 + length
    return found


def decoded(data: bytes) -> tuple[int, int, list[bytes]]:
    """Width, height and rows of pixels."""
    parts = chunks(data)
    assert list(parts) == [b"IHDR", b"IDAT", b"IEND"]
    width, height, *kind = struct.unpack(">IIBBBBB", parts[b"IHDR"])
    assert kind == [8, 2, 0, 0, 0]
    lines = zlib.decompress(parts[b"IDAT"])
    stride = 3 * width + 1
    assert len(lines) == stride * height
    rows = [lines[row * stride : (row + 1) * stride] for row in range(height)]
    assert all(row[0] == 0 for row in rows)
    return width, height, [row[1:] for row in rows]


def test_a_png_file_holds_its_pixels() -> None:
    pixels = bytes(range(18))
    assert decoded(png(2, 3, pixels)) == (2, 3, [pixels[0:6], pixels[6:12], pixels[12:18]])
    with pytest.raises(ValueError, match="18 bytes are not 3 x 3 pixels"):
        png(3, 3, pixels)


def test_what_is_drawn_beyond_the_edge_is_left_out() -> None:
    canvas = Canvas(4, 4)
    canvas.line((-3, -3), (8, 8), (1, 2, 3))
    canvas.text(-5, 2, "Late, ms ~")
    assert len(canvas.pixels) == 48
    assert canvas.pixels[:3] == bytes((1, 2, 3))


def colours(data: bytes) -> set[tuple[int, ...]]:
    _, _, rows = decoded(data)
    return {tuple(row[at : at + 3]) for row in rows for at in range(0, len(row), 3)}


def test_a_plot_is_a_png_file_with_a_stroke_for_each_line() -> None:
    panels = [Panel("memory, MB", [Line("a", [1.0, None, 3.0]), Line("b", [2.0, 2.0, 2.0])]), Panel("none", [])]
    data = plot([0.0, 1.0, 2.0], panels, "min")
    width, height, _ = decoded(data)
    assert (width, height) == (900, 300)
    assert {WHITE, COLOURS[0], COLOURS[1]} < colours(data)
    assert COLOURS[2] not in colours(data)


def test_one_moment_and_nothing_but_zeros_can_be_plotted() -> None:
    assert decoded(plot([0.0], [Panel("late", [Line("p50", [0.0]), Line("p99", [None])])], "s"))[0] == 900


@given(st.floats(1e-9, 1e12))
def test_an_axis_ends_at_a_round_number_that_is_not_far_above(value: float) -> None:
    top = round_up(value)
    assert value * (1 - 1e-9) <= top <= 5.01 * value
    mantissa = top / 10 ** math.floor(math.log10(top) + 1e-6)
    assert min(abs(mantissa - wanted) for wanted in (1, 2, 5)) < 1e-3
