"""What instances, prefixes, snapshots and tags may be called."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypemand.core.errors import RuleBroken, RulesBroken
from hypemand.core.model import InstanceId
from hypemand.core.naming import (
    INSTANCE_TAG,
    SCHEDULED_TAG,
    check_instance_id,
    check_metadata,
    check_prefix,
    is_scheduled,
    scheduled_tags,
    snapshot_name,
)
from tests.strategies import WEB, instance_ids, instants, metadata, prefixes

AT = datetime(2026, 3, 9, 1, 2, 3, 999_999, tzinfo=UTC)
ID_RULE = "must be 1 to 128 of A-Z a-z 0-9 . _ - without a leading dot"
TAG_CHARS = "A-Z a-z 0-9 space _ . : / = + @ -"


@given(instance_ids())
def test_instance_ids_are_accepted_as_they_are(instance: InstanceId) -> None:
    assert check_instance_id(instance) == instance


@pytest.mark.parametrize(
    "value", ["a", "A", "0", "_", "-", "web-1", "a.b", "a..", "x" * 128, "qilviffnqzck2jrim1x6s2b1"]
)
def test_letters_digits_dots_underscores_and_dashes_name_an_instance(value: str) -> None:
    assert check_instance_id(value) == value


@pytest.mark.parametrize(
    "value",
    [
        "",
        ".",
        "..",
        ".a",
        "a/b",
        "../a",
        "a b",
        "a\n",
        "a\0",
        "\u00e4",
        "\u0661",
        "a*",
        "x" * 129,
        None,
        3,
        True,
        ["a"],
        b"a",
    ],
)
def test_what_could_be_an_unsafe_path_names_no_instance(value: object) -> None:
    with pytest.raises(RuleBroken) as caught:
        check_instance_id(value)
    assert str(caught.value).endswith(ID_RULE)


def test_a_long_value_is_shortened_in_the_message() -> None:
    with pytest.raises(RuleBroken) as caught:
        check_instance_id("x" * 5000)
    assert str(caught.value) == f"'{'x' * 39}... (5000 characters) {ID_RULE}"


@given(prefixes())
def test_prefixes_are_accepted_as_they_are(prefix: str) -> None:
    assert check_prefix(prefix) == prefix


@pytest.mark.parametrize("value", ["", "a", "7", "nightly", "a-b", "a--b", "x" * 47])
def test_lower_case_letters_digits_and_inner_dashes_make_a_prefix(value: str) -> None:
    assert check_prefix(value) == value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "None must be a string"),
        (7, "7 must be a string"),
        ("x" * 48, "has 48 characters, 47 at most are allowed"),
        *[
            (text, f"{text!r} must be lower-case letters, digits and dashes, no dash at either end")
            for text in ("-", "-a", "a-", "A", "a_b", "a.b", "a b", "a\n", "\u00e4", "\u0661")
        ],
    ],
)
def test_any_other_prefix_is_refused_with_the_rule(value: object, message: str) -> None:
    with pytest.raises(RuleBroken) as caught:
        check_prefix(value)
    assert str(caught.value) == message


@given(metadata())
def test_metadata_is_accepted_as_it_is(tags: dict[str, str]) -> None:
    assert check_metadata(tags) == tags


def test_metadata_up_to_its_limits_is_accepted() -> None:
    tags = {f"{number:0128}": "v" * 256 for number in range(49)} | {"a Z9_.:/=+@-": ""}
    assert check_metadata(tags) == tags


@pytest.mark.parametrize("value", [None, "a=b", 3, [], [("a", "b")]])
def test_metadata_that_is_no_table_is_refused(value: object) -> None:
    with pytest.raises(RuleBroken, match="must be a table of strings"):
        check_metadata(value)


@pytest.mark.parametrize("key", ["", "k" * 129, "a\tb", "a\n", "\u00e4", "a,b", 3, None])
def test_a_bad_tag_key_is_refused_and_named(key: object) -> None:
    with pytest.raises(RulesBroken) as caught:
        check_metadata({"fine": "", key: "x"})
    (broken,) = caught.value.broken
    shown = repr(key) if key != "k" * 129 else f"'{'k' * 39}... (129 characters)"
    assert str(broken) == f"tag key {shown} must be 1 to 128 of {TAG_CHARS}"
    assert broken.subpath == ""


@pytest.mark.parametrize("text", ["v" * 257, "a\tb", "a\n", "\u00e4", "a,b", 3, True, None, ["a"]])
def test_a_bad_tag_value_is_refused_under_its_key(text: object) -> None:
    with pytest.raises(RulesBroken) as caught:
        check_metadata({"fine": "", "team": text})
    (broken,) = caught.value.broken
    assert str(broken).endswith(f" must be a string of 0 to 256 of {TAG_CHARS}")
    assert broken.subpath == "team"


def test_every_problem_of_the_metadata_is_listed() -> None:
    tags: dict[str, object] = {f"k{number}": "" for number in range(49)}
    with pytest.raises(RulesBroken) as caught:
        check_metadata({**tags, "a,b": "x\n", "team": 3})
    assert [one.subpath for one in caught.value.broken] == ["", "", "a,b", "team"]
    assert str(caught.value).startswith("has 51 tags, 50 at most are allowed; tag key 'a,b' must be")


@given(instance_ids(), metadata())
def test_scheduled_tags_hold_the_metadata_and_mark_the_snapshot(instance: InstanceId, tags: dict[str, str]) -> None:
    own = {key: text for key, text in tags.items() if key not in (SCHEDULED_TAG, INSTANCE_TAG)}
    found = scheduled_tags(instance, tags)
    assert is_scheduled(instance, found)
    assert found.items() >= own.items()
    assert len(found) == len(own) + 2


def test_metadata_cannot_unmark_a_scheduled_snapshot() -> None:
    tags = {"hypeman.scheduled": "false", "hypeman.schedule_instance_id": "web-2", "team": "backend"}
    assert scheduled_tags(WEB, tags) == {
        "hypeman.scheduled": "true",
        "hypeman.schedule_instance_id": "web-1",
        "team": "backend",
    }


@pytest.mark.parametrize(
    ("prefix", "name"),
    [
        (None, "scheduled-20260309-010203"),
        ("", "scheduled-20260309-010203"),
        ("nightly", "nightly-20260309-010203"),
    ],
)
def test_a_snapshot_is_named_by_prefix_and_second_of_the_run(prefix: str | None, name: str) -> None:
    assert snapshot_name(prefix, AT) == name


def test_a_taken_name_moves_to_the_next_free_second() -> None:
    taken = {"nightly-20260309-235959", "nightly-20260310-000000", "nightly-20260310-000002"}
    at = datetime(2026, 3, 9, 23, 59, 59, tzinfo=UTC)
    assert snapshot_name("nightly", at, taken) == "nightly-20260310-000001"
    assert snapshot_name("hourly", at, taken) == "hourly-20260309-235959"


@given(st.none() | prefixes(), instants(), st.integers(0, 5))
def test_snapshot_names_are_free_and_63_characters_at_most(prefix: str | None, at: datetime, busy: int) -> None:
    taken = [snapshot_name(prefix, at + timedelta(seconds=second)) for second in range(busy)]
    name = snapshot_name(prefix, at, taken)
    assert name not in taken
    assert name == snapshot_name(prefix, at + timedelta(seconds=busy))
    assert len(name) <= 63
