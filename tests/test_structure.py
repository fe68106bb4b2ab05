"""Documents to values and back: strictly, with every problem and where it is."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, timezone
from enum import StrEnum
from pathlib import Path
from typing import Any

import orjson
import pytest
from attrs import Factory, evolve, field, frozen
from cattrs import Converter
from hypothesis import given
from hypothesis import strategies as st

from hypemand.core.errors import HypemandError, InvalidInput, Problem, RuleBroken, join_path
from hypemand.core.fields import check_backend_name, check_instant, check_path, format_instant
from hypemand.core.model import (
    FirstRun,
    Freezer,
    InstanceId,
    InstanceState,
    Interval,
    ManagedBy,
    MaxAge,
    MaxCount,
    Metadata,
    NamePrefix,
    Outcome,
    PositiveDuration,
    PositiveInt,
    Pruned,
    RestoreAction,
    Retention,
    RunFinished,
    RunStarted,
    Schedule,
    Settings,
    Size,
    Snapshot,
    SnapshotKind,
    Trigger,
)
from hypemand.core.structure import new_converter, resolve_paths, share_equal, structure
from tests.strategies import NOW, WEB, instants, schedules, snapshots

CONVERTER = new_converter()
HOUR = timedelta(hours=1)
WHOLE = "must be a whole number of"
NO_DAYS = "has the unknown unit 'd' (known: ns, us, ms, s, m, h); Go durations have no days or weeks, write 24h or 168h"


@frozen
class Part:
    """A field for each rule."""

    flag: bool = True
    count: int = 0
    word: str = ""
    amount: float = 0.0
    lasts: timedelta | None = None
    at: datetime | None = None
    file: Path | None = None
    instance: InstanceId | None = None
    interval: Interval | None = None
    freeze: PositiveDuration | None = None
    age: MaxAge | None = None
    keep: MaxCount | None = None
    slots: PositiveInt | None = None
    prefix: NamePrefix | None = None
    first: FirstRun | None = None
    size: Size | None = None
    tags: Metadata | None = None
    kind: SnapshotKind | None = None
    words: tuple[str, ...] = ()
    numbers: list[int] = Factory(list)
    table: Mapping[str, int] = Factory(dict)
    guests: dict[InstanceId, bool] = Factory(dict)


@frozen
class Whole:
    """Parts at every kind of place."""

    part: Part
    parts: tuple[Part, ...] = ()
    named: Mapping[str, Part] = Factory(dict)
    settings: Settings = Factory(Settings)


def problems(document: object, cls: type[Any] = Whole) -> list[tuple[str, str]]:
    with pytest.raises(InvalidInput) as caught:
        structure(CONVERTER, document, cls)
    return [(problem.path, problem.message) for problem in caught.value.problems]


def schedule_document(**changes: Any) -> dict[str, Any]:
    document = {
        "instance_id": "web-1",
        "interval": "24h0m0s",
        "retention": {"max_age": "168h", "max_count": 7},
        "created_at": "2026-03-09T01:00:00Z",
        "updated_at": "2026-03-09T01:30:00Z",
        "next_run_at": "2026-03-10T02:00:00Z",
    }
    return document | changes


GOOD: list[tuple[str, object, object]] = [
    ("flag", False, False),
    ("count", -3, -3),
    ("count", 2**63, 2**63),
    ("word", "", ""),
    ("amount", 0.5, 0.5),
    ("amount", 3, 3.0),
    ("lasts", "-1h30m", -1.5 * HOUR),
    ("lasts", None, None),
    ("at", "2026-03-09T01:00:00Z", NOW),
    ("file", "a/b", Path("a/b")),
    ("instance", "web-1", "web-1"),
    ("interval", "1m", timedelta(minutes=1)),
    ("interval", "24h0m0s", 24 * HOUR),
    ("freeze", "1us", timedelta.resolution),
    ("age", "0", timedelta(0)),
    ("age", "168h", 168 * HOUR),
    ("keep", 0, 0),
    ("keep", 7, 7),
    ("slots", 1, 1),
    ("prefix", "nightly", "nightly"),
    ("prefix", "", ""),
    ("first", "now", "now"),
    ("first", "02:00", "02:00"),
    ("size", "16MiB", 16 * 1024**2),
    ("size", 4096, 4096),
    ("tags", {"team": "backend"}, {"team": "backend"}),
    ("kind", "Standby", SnapshotKind.STANDBY),
    ("words", ["a", ""], ("a", "")),
    ("words", [], ()),
    ("numbers", [1, 2], [1, 2]),
    ("table", {"a": 1}, {"a": 1}),
    ("guests", {"web-1": True}, {WEB: True}),
]

BAD: list[tuple[str, object, str, str]] = [
    *[("flag", bad, "", f"{bad!r} must be true or false") for bad in (1, 0, 1.0, "true", "false", None)],
    *[("count", bad, "", f"{bad!r} must be a whole number") for bad in (3.7, 1.0, True, "1", None)],
    *[("word", bad, "", f"{bad!r} must be a string") for bad in (1, True, None, ["a"])],
    *[("amount", bad, "", f"{bad!r} must be a number") for bad in (True, "0.5", None)],
    *[
        ("lasts", bad, "", f'{bad!r} must be a string holding a duration, like "90s", "15m" or "24h"')
        for bad in (90, 1.5, True, ["1h"])
    ],
    ("lasts", "24", "", "'24' has a number without a unit; write for example 90s, 15m or 24h"),
    ("lasts", "soon", "", "'soon' is not a duration; write for example 90s, 15m or 24h"),
    ("lasts", "3000000h", "", "'3000000h' is too large: durations end at about 292 years"),
    *[
        ("at", bad, "", f'{bad!r} must be a time with its offset, like "2026-03-09T01:00:00Z"')
        for bad in (
            "2026-03-09T01:00:00",
            "2026-03-09",
            "01:00:00Z",
            "",
            "tomorrow",
            "2026-02-30T01:00:00Z",
            "2026-03-09T24:00:01Z",
            "2026-03-09T01:00:60Z",
            "0001-01-01T00:00:00+01:00",
            "9999-12-31T23:59:59-01:00",
            1773018000,
            1773018000.5,
            True,
        )
    ],
    *[("file", bad, "", f"{bad!r} must be a path") for bad in ("", "a\0b", 3, True, ["a"])],
    ("instance", "../a", "", "'../a' must be 1 to 128 of A-Z a-z 0-9 . _ - without a leading dot"),
    ("interval", "59.999999999s", "", "'59.999999999s' is too short: the interval must be at least 1m"),
    ("interval", "-24h", "", "'-24h' is too short: the interval must be at least 1m"),
    ("interval", 60, "", '60 must be a string holding a duration, like "90s", "15m" or "24h"'),
    ("interval", "1d", "", f"'1d' {NO_DAYS}"),
    *[("freeze", bad, "", f"{bad!r} must be more than zero") for bad in ("0", "0s", "-1s")],
    ("age", "-1h", "", "'-1h' must not be negative; leave max_age out for no limit by age"),
    *[("keep", bad, "", f"{bad!r} {WHOLE} 0 or more (0 is no limit by count)") for bad in (-1, 3.7, 1.0, True, "7")],
    ("keep", 2**63, "", "must be 9223372036854775807 at most; leave it out for no limit by count"),
    *[("slots", bad, "", f"{bad!r} {WHOLE} 1 or more") for bad in (0, -1, 3.7, 1.0, True, "7")],
    ("prefix", "Nightly", "", "'Nightly' must be lower-case letters, digits and dashes, no dash at either end"),
    ("prefix", "x" * 48, "", "has 48 characters, 47 at most are allowed"),
    ("first", "2:00", "", "'2:00' must be \"now\" or a local time of day like \"02:00\""),
    *[("size", bad, "", f"{bad!r} is not a size; write for example 512MiB or 1GiB") for bad in (-1, 1.0, True, "1")],
    ("tags", {"team": 3}, ".team", "3 must be a string of 0 to 256 of A-Z a-z 0-9 space _ . : / = + @ -"),
    ("tags", {"a,b": ""}, "", "tag key 'a,b' must be 1 to 128 of A-Z a-z 0-9 space _ . : / = + @ -"),
    ("tags", [], "", "[] must be a table of strings"),
    *[("kind", bad, "", f"{bad!r} must be one of Standby, Stopped") for bad in ("standby", "", 1, True, ["Standby"])],
    ("words", ["a", 3], "[1]", "3 must be a string"),
    *[("words", bad, "", f"{bad!r} must be a list") for bad in ("/bin/page-me", "", {}, {"a": 1}, 3, None)],
    ("numbers", [1, 2, True], "[2]", "True must be a whole number"),
    *[("numbers", bad, "", f"{bad!r} must be a list") for bad in ("12", {"1": 2}, None)],
    ("table", {"a": 1, "b": "2"}, ".b", "'2' must be a whole number"),
    *[("table", bad, "", f"{bad!r} must be a table of keys and values") for bad in ([], [["a", 1]], "a", 3, None)],
    ("guests", {"a/b": True}, ".a/b", "'a/b' must be 1 to 128 of A-Z a-z 0-9 . _ - without a leading dot"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "wanted"), GOOD)
def test_what_the_rules_allow_is_read(name: str, value: object, wanted: object) -> None:
    found = getattr(structure(CONVERTER, {name: value}, Part), name)
    assert found == wanted
    assert type(found) is type(wanted)


@pytest.mark.parametrize(("name", "value", "inside", "message"), BAD)
def test_what_breaks_a_rule_is_refused_with_its_message_and_path(
    name: str, value: object, inside: str, message: str
) -> None:
    part = {name: value}
    assert problems(part, Part) == [(name + inside, message)]
    assert problems({"part": part}) == [(f"part.{name}{inside}", message)]
    assert problems({"part": {}, "parts": [{}, part]}) == [(f"parts[1].{name}{inside}", message)]
    assert problems({"part": {}, "named": {"a.b": part}}) == [(f"named.a.b.{name}{inside}", message)]


def test_every_problem_is_listed_at_once() -> None:
    document = {
        "part": {"flag": 1, "tags": {"a": 1, "b": 2}},
        "parts": [{"count": 1.0}, {}, {"words": [1, "x", 2], "wrods": []}],
        "settings": {"max_freeze": "0"},
        "prat": {},
    }
    assert [path for path, _ in problems(document)] == [
        "part.flag",
        "part.tags.a",
        "part.tags.b",
        "parts[0].count",
        "parts[2].words[0]",
        "parts[2].words[2]",
        "parts[2].wrods",
        "settings.max_freeze",
        "prat",
    ]


def test_a_missing_key_is_named() -> None:
    assert problems({}) == [("part", "is missing; it is required")]
    document = schedule_document()
    del document["interval"], document["next_run_at"]
    assert problems(document, Schedule) == [
        ("interval", "is missing; it is required"),
        ("next_run_at", "is missing; it is required"),
    ]


@pytest.mark.parametrize("value", [None, 3, "text", [], [["part", {}]]])
def test_a_document_or_part_that_is_no_table_is_refused(value: object) -> None:
    message = f"{value!r} must be a table of keys and values"
    assert problems(value) == [("", message)]
    assert problems({"part": value}) == [("part", message)]


def test_unknown_keys_are_refused_with_a_suggestion_or_all_that_are_known() -> None:
    document = {"id": "a", "kind": "Standby", "nmae": "n", "bogus_": 1, "extra": {}}
    found = dict(problems(document, Snapshot))
    assert found["nmae"] == "unknown key; did you mean 'name'?"
    known = "created_at, id, instance_id, kind, name, restore, size_bytes, tags"
    assert found["bogus_"] == f"unknown key; known here: {known}"
    assert found["extra"] == f"unknown key; known here: {known}"
    assert problems({"snapshot_id": "a", "reasons": [], "why": ""}, Pruned) == [
        ("why", "unknown key; known here: reasons, snapshot_id")
    ]


def test_unknown_keys_of_classes_with_extra_are_kept_and_written_again() -> None:
    document = schedule_document(
        retention={"max_count": 7, "min_count": 1},
        settings={"enabled": False, "colour": {"of": ["hat", None, 1.5]}},
        kind="Standby",
        extra={"extra": 1},
    )
    schedule = structure(CONVERTER, document, Schedule)
    assert schedule.extra == {"kind": "Standby", "extra": {"extra": 1}}
    assert schedule.retention == Retention(max_count=7, extra={"min_count": 1})
    assert schedule.settings == Settings(enabled=False, extra={"colour": {"of": ["hat", None, 1.5]}})
    assert CONVERTER.unstructure(schedule) == document | {"interval": "24h"}


def test_the_documented_schedule_is_read_and_written_as_it_was() -> None:
    document = schedule_document(
        interval="24h",
        last_error="invalid state transition: stopped snapshot requires source in Stopped, got Running",
        last_run_at="2026-03-09T02:00:00Z",
        last_snapshot_id="q7z1w7l2af4l8y7q1h7g2m3s",
        metadata={"team": "backend", "env": "staging"},
        name_prefix="nightly",
    )
    schedule = structure(CONVERTER, document, Schedule)
    assert schedule == Schedule(
        instance_id=WEB,
        interval=24 * HOUR,
        retention=Retention(168 * HOUR, 7),
        created_at=NOW,
        updated_at=NOW + HOUR / 2,
        next_run_at=NOW + 25 * HOUR,
        last_run_at=NOW + HOUR,
        last_error="invalid state transition: stopped snapshot requires source in Stopped, got Running",
        last_snapshot_id="q7z1w7l2af4l8y7q1h7g2m3s",
        metadata={"team": "backend", "env": "staging"},
        name_prefix="nightly",
    )
    assert CONVERTER.unstructure(schedule) == document


@given(schedules())
def test_schedules_survive_being_written_and_read_with_keys_that_nobody_knows(schedule: Schedule) -> None:
    written = orjson.dumps(CONVERTER.unstructure(schedule))
    assert structure(CONVERTER, orjson.loads(written), Schedule) == schedule


@given(schedules())
def test_defaults_can_be_written_out_and_read_the_same(schedule: Schedule) -> None:
    complete = new_converter(omit_defaults=False)
    document = complete.unstructure(schedule)
    names = {"last_run_at", "last_error", "metadata", "managed_by", "settings"}
    assert document.keys() >= names
    assert structure(complete, orjson.loads(orjson.dumps(document)), Schedule) == schedule


@given(snapshots())
def test_snapshots_survive_being_written_and_read(snapshot: Snapshot) -> None:
    written = orjson.dumps(CONVERTER.unstructure(snapshot))
    assert structure(CONVERTER, orjson.loads(written), Snapshot) == snapshot


def test_lines_of_the_run_log_survive_being_written_and_read() -> None:
    started = RunStarted(
        run_id="r1",
        instance_id=WEB,
        backend="lab",
        trigger=Trigger.MANUAL,
        kind=SnapshotKind.STANDBY,
        state_before=InstanceState.RUNNING,
        due_at=NOW,
        next_run_at=NOW + HOUR,
        started_at=NOW + timedelta(microseconds=5),
        snapshot_name="nightly-20260309-010000",
        tags={"team": "backend"},
        max_freeze_s=1.5,
        freezes=Freezer.ENGINE,
        boot_id="b",
        connection={"type": "qemu", "disks": ["a", "b"], "port": 1},
    )
    finished = RunFinished(
        run_id="r1",
        instance_id=WEB,
        due_at=NOW,
        started_at=NOW,
        finished_at=NOW,
        outcome=Outcome.SUCCEEDED,
        kind=SnapshotKind.STOPPED,
        freeze_s=0.25,
        missed=2,
        pruned=(Pruned("r0", ("max_count 1", "max_age 1h")), Pruned("q", ("max_count 1",))),
        warnings=("its memory was saved with the guest standing still", "two"),
    )
    for line in (started, evolve(started, freezes=None), finished):
        document = orjson.loads(orjson.dumps(CONVERTER.unstructure(line)))
        assert structure(CONVERTER, document, type(line)) == line


@pytest.mark.parametrize("words", [Freezer, InstanceState, ManagedBy, Outcome, RestoreAction, SnapshotKind, Trigger])
def test_words_are_read_exactly_as_they_are_written(words: type[StrEnum]) -> None:
    for word in words:
        assert structure(CONVERTER, CONVERTER.unstructure(word), words) is word
        assert problems(word.value.swapcase(), words) == [
            ("", f"{word.value.swapcase()!r} must be one of {', '.join(words)}")
        ]


def test_a_converter_takes_words_of_its_own() -> None:
    class Colour(StrEnum):
        RED = "red"
        BLUE = "blue"

    own = new_converter(words=[Colour])
    assert structure(own, "red", Colour) is Colour.RED
    with pytest.raises(InvalidInput, match=r"^'RED' must be one of red, blue$"):
        structure(own, "RED", Colour)


@pytest.mark.parametrize(
    ("text", "instant"),
    [
        ("2026-03-09T01:00:00Z", NOW),
        ("2026-03-09T03:00:00+02:00", NOW),
        ("2026-03-08T19:30:00-05:30", NOW),
        ("2026-03-09T01:00:00.5Z", NOW + timedelta(seconds=0.5)),
        ("2026-03-09T01:00:00.123456789Z", NOW + timedelta(microseconds=123_456)),
        ("2026-03-09T03:00:00.000001999+02:00", NOW + timedelta.resolution),
        ("2026-03-09T01:00:00.999999999Z", NOW + timedelta(microseconds=999_999)),
        ("0001-01-01T00:00:00Z", datetime(1, 1, 1, tzinfo=UTC)),
        ("9999-12-31T23:59:59.999999999Z", datetime.max.replace(tzinfo=UTC)),
    ],
)
def test_times_of_go_are_read_as_utc_and_cut_to_microseconds(text: str, instant: datetime) -> None:
    found = check_instant(text)
    assert found == instant
    assert found.tzinfo is UTC


@given(instants(1, 9999))
def test_instants_survive_being_written_and_read(instant: datetime) -> None:
    written = format_instant(instant)
    assert written.endswith("Z")
    assert check_instant(written) == instant


def test_instants_of_other_zones_are_written_in_utc() -> None:
    assert format_instant(NOW.astimezone(timezone(2 * HOUR))) == "2026-03-09T01:00:00Z"
    assert format_instant(NOW + timedelta(microseconds=1500)) == "2026-03-09T01:00:00.001500Z"


def test_a_tilde_stands_for_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/operator")
    assert check_path("~/images") == Path("/home/operator/images")
    assert check_path("images/~") == Path("images/~")


def test_the_home_directory_of_nobody_is_refused() -> None:
    with pytest.raises(
        RuleBroken, match=r"^'~no-such-user/images' must be a path, but there is no such home directory$"
    ):
        check_path("~no-such-user/images")


def test_other_faults_of_a_value_are_told_in_their_own_words() -> None:
    @frozen
    class Picky:
        even: int = field(default=0)
        odd: int = field(default=1)

        def __attrs_post_init__(self) -> None:
            if self.even % 2:
                raise ValueError("even must be even")
            if not self.odd % 2:
                raise ValueError

    @frozen
    class Holder:
        picky: Picky

    assert problems({"picky": {"even": 1}}, Holder) == [("picky", "even must be even")]
    assert problems({"picky": {"odd": 2}}, Holder) == [("picky", "ValueError")]


def test_relative_paths_at_any_depth_are_taken_from_the_directory() -> None:
    @frozen
    class Disk:
        file: Path
        label: str = "relative"

    @frozen
    class Guest:
        socket: Path
        disk: Disk
        spare: Disk | None = None
        images: tuple[Path, ...] = ()
        more: tuple[Disk, ...] = ()
        names: tuple[str, ...] = ()

    guest = Guest(Path("a.sock"), Disk(Path("/abs/b.img")))
    base = Path("/etc/hypemand")
    assert resolve_paths(guest, base) == Guest(base / "a.sock", Disk(Path("/abs/b.img")))
    full = evolve(
        guest,
        spare=Disk(Path("c")),
        images=(Path("d"), Path("/abs/e")),
        more=(Disk(Path("f")),),
        names=("relative",),
    )
    assert resolve_paths(full, base) == Guest(
        base / "a.sock",
        Disk(Path("/abs/b.img")),
        Disk(base / "c"),
        (base / "d", Path("/abs/e")),
        (Disk(base / "f"),),
        ("relative",),
    )


@pytest.mark.parametrize(
    ("prefix", "rest", "path"),
    [("a", "b", "a.b"), ("a", "[0]", "a[0]"), ("a[0]", "b", "a[0].b"), ("", "b", "b"), ("a", "", "a"), ("", "", "")],
)
def test_paths_are_joined_by_dots_but_for_an_index(prefix: str, rest: str, path: str) -> None:
    assert join_path(prefix, rest) == path
    assert Problem(rest, "x").under(prefix) == Problem(path, "x")


def test_invalid_input_reads_as_all_its_problems_in_their_order() -> None:
    error = InvalidInput([Problem("b", "is missing"), Problem("", "is empty"), Problem("a[1].c", "is wrong")])
    assert isinstance(error, HypemandError)
    assert str(error) == "b: is missing; is empty; a[1].c: is wrong"
    assert min(error.problems).path == ""


@given(st.text(), st.text())
def test_a_problem_is_shown_with_its_path_when_it_has_one(path: str, message: str) -> None:
    assert str(Problem(path, message)) == (f"{path}: {message}" if path else message)


def sharing() -> Converter:
    converter = new_converter()
    share_equal(converter, Retention)
    return converter


def test_tables_that_say_the_same_are_one_object_and_others_are_not() -> None:
    converter = sharing()
    made = [structure(converter, {"max_age": "24h", "max_count": 7}, Retention) for _ in range(2)]
    assert made[0] is made[1]
    assert made[0] == Retention(max_age=timedelta(hours=24), max_count=7)
    assert structure(converter, {"max_count": 7}, Retention) is not made[0]
    mixed = {"max_count": 7, "notes": [{"by": "hand"}]}  # keys of a later version, which are kept
    assert structure(converter, mixed, Retention) == Retention(max_count=7, extra={"notes": [{"by": "hand"}]})


def test_what_is_shared_is_no_less_strict() -> None:
    converter = sharing()
    structure(converter, {"max_count": 1}, Retention)
    for wrong in ({"max_count": True}, {"max_count": 1.0}, {"max_age": "a day"}, ["max_count"], None):
        with pytest.raises(InvalidInput):
            structure(converter, wrong, Retention)


def test_a_backend_is_named_by_a_string_of_which_there_is_one() -> None:
    first, second = (str(b"vms", "ascii") for _ in range(2))
    assert first is not second
    assert check_backend_name(first) is check_backend_name(second)
    with pytest.raises(RuleBroken, match="7 must be a string"):
        check_backend_name(7)
