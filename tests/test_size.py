"""Sizes in bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypemand.core.errors import RuleBroken
from hypemand.core.size import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0),
        (4096, 4096),
        ("0B", 0),
        ("7B", 7),
        ("1KiB", 1024),
        ("1KB", 1000),
        ("16MiB", 16 * 1024**2),
        ("100MB", 10**8),
        ("1GiB", 1024**3),
        ("1 GiB", 1024**3),
        ("2GB", 2 * 10**9),
        ("3TiB", 3 * 1024**4),
        ("3TB", 3 * 10**12),
    ],
)
def test_sizes_are_read_in_bytes_with_or_without_a_unit(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "value",
    [
        -1,
        3.7,
        1.0,
        True,
        None,
        [],
        "",
        "1",
        "GiB",
        "1.5GiB",
        "-1GiB",
        "1gib",
        "1kB",
        "1PiB",
        "1  GiB",
        " 1GiB",
        "1GiB\n",
        "\u0661GiB",
    ],
)
def test_what_is_no_size_is_refused_with_an_example(value: object) -> None:
    with pytest.raises(RuleBroken) as caught:
        parse_size(value)
    assert str(caught.value) == f"{value!r} is not a size; write for example 512MiB or 1GiB"


def test_a_size_of_thousands_of_digits_is_refused() -> None:
    with pytest.raises(RuleBroken, match="is not a size"):
        parse_size("9" * 5000 + "B")


@given(st.integers(0, 10**18 - 1), st.sampled_from(["B", "KiB", "MiB", "GiB", "TiB"]))
def test_a_unit_multiplies_by_a_power_of_1024(number: int, unit: str) -> None:
    assert parse_size(f"{number}{unit}") == number * 1024 ** ["B", "KiB", "MiB", "GiB", "TiB"].index(unit)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (80 * 1024**2, "80.0 MiB"),
        (3 * 1024**3 // 2, "1.5 GiB"),
        (1024**4, "1.0 TiB"),
        (5000 * 1024**4, "5000.0 TiB"),
    ],
)
def test_sizes_are_written_in_the_largest_fitting_unit(size: int, text: str) -> None:
    assert format_size(size) == text
