"""Schedules and log lines as JSON: the API's keys, nothing lost on the way."""

from datetime import timedelta
from typing import Any

import orjson
import pytest
from attrs import evolve, fields_dict
from hypothesis import given
from hypothesis import strategies as st

from hypemand.core.errors import InvalidInput
from hypemand.core.model import (
    Freezer,
    InstanceState,
    ManagedBy,
    Outcome,
    Pruned,
    Retention,
    RunFinished,
    RunStarted,
    Schedule,
    Settings,
    SnapshotKind,
    Trigger,
)
from hypemand.state.codec import (
    FORMAT,
    Line,
    NewerFormatError,
    decode_line,
    decode_schedule,
    encode_line,
    encode_schedule,
    line_document,
    schedule_document,
)
from tests.strategies import NOW, WEB, extras, instance_ids, instants, json_values, metadata, schedules
from tests.test_runlog import finished, started

BARE = Schedule(
    instance_id=WEB,
    interval=timedelta(hours=24),
    retention=Retention(),
    created_at=NOW,
    updated_at=NOW,
    next_run_at=NOW + timedelta(microseconds=1),
)
FULL = evolve(
    BARE,
    retention=Retention(timedelta(hours=168), 7),
    last_run_at=NOW,
    last_error="invalid state transition",
    last_snapshot_id="run-1",
    metadata={"team": "backend"},
    name_prefix="nightly",
    backend="lab",
    managed_by=ManagedBy.CONFIG,
    settings=Settings("02:00", timedelta(seconds=30), enabled=False),
)
seconds = st.floats(0, 1e9)


def line_extras(cls: type[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return extras(cls).map(lambda extra: {key: value for key, value in extra.items() if key != "event"})


def started_lines() -> st.SearchStrategy[RunStarted]:
    return st.builds(
        RunStarted,
        run_id=st.text(),
        instance_id=instance_ids(),
        backend=st.text(),
        trigger=st.sampled_from(Trigger),
        kind=st.sampled_from(SnapshotKind),
        state_before=st.sampled_from(InstanceState),
        due_at=instants(),
        next_run_at=instants(),
        started_at=instants(1, 9999),
        snapshot_name=st.text(),
        tags=metadata() | st.dictionaries(st.text(), st.text(), max_size=2),
        max_freeze_s=seconds,
        freezes=st.none() | st.sampled_from(Freezer),
        boot_id=st.text(),
        connection=st.dictionaries(st.text(), json_values(), max_size=3),
        extra=line_extras(RunStarted),
    )


def finished_lines() -> st.SearchStrategy[RunFinished]:
    texts = st.none() | st.text()
    pruned = st.builds(Pruned, st.text(), st.lists(st.text(), max_size=2).map(tuple))
    return st.builds(
        RunFinished,
        run_id=st.text(),
        instance_id=instance_ids(),
        due_at=instants(),
        started_at=instants(),
        finished_at=instants(),
        outcome=st.sampled_from(Outcome),
        kind=st.none() | st.sampled_from(SnapshotKind),
        snapshot_id=texts,
        snapshot_name=texts,
        size_bytes=st.none() | st.integers(0, 2**63 - 1),
        freeze_s=st.none() | seconds,
        found_frozen=st.booleans(),
        capture_s=st.none() | seconds,
        late_s=seconds,
        missed=st.integers(0, 2**40),
        pruned=st.lists(pruned, max_size=3).map(tuple),
        error=texts,
        warnings=st.lists(st.text(), max_size=3).map(tuple),
        extra=line_extras(RunFinished),
    )


def test_a_bare_schedule_has_the_required_keys_and_ours() -> None:
    assert schedule_document(BARE) == {
        "instance_id": "web-1",
        "interval": "24h",
        "retention": {},
        "created_at": "2026-03-09T01:00:00Z",
        "updated_at": "2026-03-09T01:00:00Z",
        "next_run_at": "2026-03-09T01:00:00.000001Z",
        "managed_by": "api",
        "settings": {},
        "format": 1,
    }


def test_a_full_schedule_has_the_keys_of_the_api_and_ours() -> None:
    assert schedule_document(FULL) == {
        "instance_id": "web-1",
        "interval": "24h",
        "retention": {"max_age": "168h", "max_count": 7},
        "created_at": "2026-03-09T01:00:00Z",
        "updated_at": "2026-03-09T01:00:00Z",
        "next_run_at": "2026-03-09T01:00:00.000001Z",
        "last_run_at": "2026-03-09T01:00:00Z",
        "last_error": "invalid state transition",
        "last_snapshot_id": "run-1",
        "metadata": {"team": "backend"},
        "name_prefix": "nightly",
        "backend": "lab",
        "managed_by": "config",
        "settings": {"first_run": "02:00", "max_freeze": "30s", "enabled": False},
        "format": 1,
    }


@given(schedules())
def test_schedules_round_trip(made: Schedule) -> None:
    made = evolve(made, extra={key: value for key, value in made.extra.items() if key != "format"})
    assert decode_schedule(encode_schedule(made), made.instance_id) == made


def test_a_schedule_file_is_for_people_too() -> None:
    assert encode_schedule(BARE).count(b"\n") == len(schedule_document(BARE)) + 2


@pytest.mark.parametrize("newer", [FORMAT + 1, 10**6, 2**63])
def test_a_newer_format_is_told_from_an_invalid_one(newer: int) -> None:
    document = {"format": newer, "nothing": "else"}
    with pytest.raises(NewerFormatError, match=str(newer)):
        decode_schedule(orjson.dumps(document), WEB)


def test_every_problem_of_a_schedule_is_told() -> None:
    document = {**schedule_document(BARE), "interval": "1s", "retention": {"max_count": -1}, "settings": {"enabled": 1}}
    with pytest.raises(InvalidInput) as caught:
        decode_schedule(orjson.dumps(document), WEB)
    assert {problem.path for problem in caught.value.problems} == {
        "interval",
        "retention.max_count",
        "settings.enabled",
    }


@given(started_lines() | finished_lines())
def test_lines_round_trip(line: Line) -> None:
    data = encode_line(line)
    assert data.count(b"\n") == 1
    assert data.endswith(b"\n")
    assert decode_line(data) == line


@pytest.mark.parametrize(("line", "event"), [(started(1), "started"), (finished(1), "finished")])
def test_a_line_has_every_key_whatever_its_value(line: Line, event: str) -> None:
    document = orjson.loads(encode_line(line))
    assert document.pop("event") == event
    assert document.keys() == fields_dict(type(line)).keys() - {"extra"}
    assert document == orjson.loads(orjson.dumps(line_document(line)))


def test_a_finished_line_is_the_one_of_the_design() -> None:
    line = evolve(
        finished(1),
        outcome=Outcome.SUCCEEDED,
        kind=SnapshotKind.STANDBY,
        snapshot_id="run-1",
        freeze_s=0.25,
        pruned=(Pruned("run-0", ("max_count 7: it is number 8", "max_age")),),
        error=None,
        warnings=("frozen while its memory is saved: no userfaultfd",),
    )
    assert orjson.loads(encode_line(line)) == {
        "event": "finished",
        "run_id": "run-1",
        "instance_id": "web-1",
        "due_at": "2026-03-09T01:00:00Z",
        "started_at": "2026-03-09T01:00:00Z",
        "finished_at": "2026-03-09T01:01:00Z",
        "outcome": "succeeded",
        "trigger": "schedule",
        "kind": "Standby",
        "snapshot_id": "run-1",
        "snapshot_name": None,
        "size_bytes": None,
        "freeze_s": 0.25,
        "found_frozen": False,
        "capture_s": None,
        "late_s": 0.0,
        "missed": 0,
        "pruned": [{"snapshot_id": "run-0", "reasons": ["max_count 7: it is number 8", "max_age"]}],
        "error": None,
        "warnings": ["frozen while its memory is saved: no userfaultfd"],
    }


def test_a_finished_line_from_before_there_were_warnings_has_none() -> None:
    line = evolve(finished(1), warnings=("one",))
    document = orjson.loads(encode_line(line))
    del document["warnings"]
    assert decode_line(orjson.dumps(document)) == evolve(line, warnings=())


@pytest.mark.parametrize("bad", ["one", [1], {"one": 1}, None])
def test_warnings_are_a_list_of_texts(bad: object) -> None:
    document = {**orjson.loads(encode_line(finished(1))), "warnings": bad}
    with pytest.raises(InvalidInput, match=r"^warnings"):
        decode_line(orjson.dumps(document))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'{"event": "paused"}',
        b'{"event": ["started"]}',
        b'{"event": "started"}',
    ],
)
def test_what_is_no_line_is_invalid_and_nothing_worse(data: bytes) -> None:
    with pytest.raises(InvalidInput):
        decode_line(data)


@given(st.binary(max_size=40) | json_values().map(orjson.dumps))
def test_whatever_is_in_a_file_is_decoded_or_invalid(data: bytes) -> None:
    for decode in (decode_line, lambda content: decode_schedule(content, WEB)):
        with pytest.raises((InvalidInput, NewerFormatError)):
            decode(data)


def test_texts_that_are_no_utf_8_are_written_readably_not_refused() -> None:
    line = evolve(
        finished(1), error="no file \udcff", pruned=(Pruned("x", ("\udc80",)),), extra={"\udcff": {"a": ["\udcff"]}}
    )
    again = decode_line(encode_line(line))
    assert isinstance(again, RunFinished)
    assert again.error == "no file \\udcff"
    assert again.pruned == (Pruned("x", ("\\udc80",)),)
    assert again.extra == {"\\udcff": {"a": ["\\udcff"]}}
    made = evolve(BARE, last_error="no file \udcff")
    assert decode_schedule(encode_schedule(made), WEB).last_error == "no file \\udcff"
