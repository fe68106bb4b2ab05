"""Durations read and written as Go does."""

import json
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hypemand.core.duration import format_duration, format_ns, parse_duration, parse_ns, to_ns
from hypemand.core.errors import RuleBroken
from tests.strategies import durations, int64s

US, MS, S, M, H = 10**3, 10**6, 10**9, 60 * 10**9, 3600 * 10**9
VECTORS = Path(__file__).parent / "vectors" / "durations.json"


def verdict(text: str) -> int | None:
    try:
        return parse_ns(text)
    except RuleBroken:
        return None


def test_every_text_gets_the_verdict_of_go() -> None:
    vectors = json.loads(VECTORS.read_text(encoding="utf-8"))
    assert len(vectors) > 700
    assert [(row, verdict(row["text"])) for row in vectors if verdict(row["text"]) != row["ns"]] == []


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        ("1ns", 1),
        ("1us", US),
        ("1\u00b5s", US),
        ("1\u03bcs", US),
        ("1ms", MS),
        ("1s", S),
        ("1m", M),
        ("1h", H),
        ("+5s", 5 * S),
        ("-5s", -5 * S),
        ("-1h30m", -90 * M),
        (".5s", S // 2),
        ("-.5s", -S // 2),
        ("1.s", S),
        ("0", 0),
        ("+0", 0),
        ("-0", 0),
        ("0s", 0),
        ("00.00h", 0),
        ("1h1h", 2 * H),
        ("1s1h", H + S),
        ("0.5ns", 0),
        ("9223372036854775807ns", 2**63 - 1),
        ("-9223372036854775808ns", -(2**63)),
        ("2562047h47m16.854775807s", 2**63 - 1),
        ("0.3333333333333333333h", 20 * M),
        ("0.100000000000000000000h", 6 * M),
        ("0.830103483285477580700h", 49 * M + 48_372_539_827),
        ("0.9223372036854775809h", 3_320_413_933_267),
        ("9007199254740993ns", 9007199254740993),
        ("9007199254.740993ms", 9007199254740993),
        ("39h9m14.425s", 39 * H + 9 * M + 14_425 * MS),
    ],
)
def test_durations_are_read_to_the_nanosecond(text: str, nanoseconds: int) -> None:
    assert parse_ns(text) == nanoseconds


@pytest.mark.parametrize(
    "text",
    ["", "-", "+", ".", "-.", ".s", "s", "h", "+-1s", "--1s", "1h-1m", "1s.", "1..5s", "\u0661s", "\uff11s", "1,5s"],
)
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(RuleBroken):
        parse_ns(text)


@pytest.mark.parametrize("text", ["1", "-1", "00", "0.0", "1.5", "1h30"])
def test_a_number_without_a_unit_is_refused_and_says_so(text: str) -> None:
    with pytest.raises(RuleBroken, match="has a number without a unit; write for example"):
        parse_ns(text)


@pytest.mark.parametrize("unit", ["S", "H", "M", "Ms", "sec", " s", "s ", "\u00b5", "s\n", "\u0661s", "es"])
def test_an_unknown_unit_is_refused_with_those_known(unit: str) -> None:
    with pytest.raises(RuleBroken) as caught:
        parse_ns(f"1{unit}")
    assert str(caught.value) == f"{'1' + unit!r} has the unknown unit {unit!r} (known: ns, us, ms, s, m, h)"


@pytest.mark.parametrize("text", ["1d", "2w", "1h1d"])
def test_days_and_weeks_are_refused_with_the_way_to_write_them(text: str) -> None:
    with pytest.raises(RuleBroken, match="no days or weeks, write 24h or 168h"):
        parse_ns(text)


@pytest.mark.parametrize(
    "text",
    [
        "3000000h",
        "-3000000h",
        "9223372036854775808ns",
        "-9223372036854775809ns",
        "9223372036854775807ns1ns",
        "9223372036854775807.9ns1ns",
        "2562047h60m",
        "18446744073709551617ns",
        # Go's sum of two halves wraps to zero here and passes; two ages of the universe are no 0s.
        "-9223372036854775808ns9223372036854775808ns",
    ],
)
def test_more_than_64_bits_of_nanoseconds_is_refused(text: str) -> None:
    with pytest.raises(RuleBroken, match="is too large"):
        parse_ns(text)


def test_thousands_of_digits_are_a_number_like_any_other() -> None:
    assert parse_ns("0" * 5000 + "1s") == S
    assert parse_ns("0." + "3" * 5000 + "h") == 20 * M
    with pytest.raises(RuleBroken, match="is too large"):
        parse_ns("9" * 5000 + "s")


@given(st.text("0123456789.+-nu\u00b5\u03bcmshd ", max_size=30))
def test_any_text_is_64_bits_of_nanoseconds_or_refused(text: str) -> None:
    found = verdict(text)
    assert found is None or -(2**63) <= found < 2**63


@given(int64s | st.integers(-(10**12), 10**12))
@example(0)
@example(2**63 - 1)
@example(-(2**63))
def test_what_is_written_reads_back_the_same(nanoseconds: int) -> None:
    assert parse_ns(format_ns(nanoseconds)) == nanoseconds


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (0, "0s"),
        (1, "1ns"),
        (1500, "1.5us"),
        (100 * MS, "100ms"),
        (MS + 1, "1.000001ms"),
        (1500 * MS, "1.5s"),
        (90 * S, "1m30s"),
        (60 * S, "1m"),
        (90 * M, "1h30m"),
        (24 * H, "24h"),
        (168 * H, "168h"),
        (H + 1, "1h0.000000001s"),
        (-90 * M, "-1h30m"),
        (-1, "-1ns"),
        (-(2**63), "-2562047h47m16.854775808s"),
    ],
)
def test_durations_are_written_short(nanoseconds: int, text: str) -> None:
    assert format_ns(nanoseconds) == text


@pytest.mark.parametrize(
    ("text", "micros"),
    [("1999ns", 1), ("-1999ns", -1), ("999ns", 0), ("-999ns", 0), ("1.5ms", 1500), ("-24h", -86400 * 10**6)],
)
def test_parts_finer_than_a_microsecond_are_cut_off_towards_zero(text: str, micros: int) -> None:
    assert parse_duration(text) == timedelta(microseconds=micros)


@given(durations(-timedelta(days=106_000), timedelta(days=106_000)))
def test_a_timedelta_survives_being_written_and_read(duration: timedelta) -> None:
    assert parse_duration(format_duration(duration)) == duration
    assert to_ns(duration) == ((duration.days * 86400 + duration.seconds) * 10**6 + duration.microseconds) * 1000
