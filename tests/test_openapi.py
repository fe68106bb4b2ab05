"""The OpenAPI document is true: its patterns are the rules, and what it says is what a daemon does."""

import json
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypemand.core.duration import format_duration
from hypemand.core.errors import RuleBroken
from hypemand.core.fields import check_interval, check_max_age
from hypemand.core.naming import check_instance_id, check_metadata, check_prefix
from hypemand.surface.api import openapi
from hypemand.surface.api import openapi_schemas as patterns
from tests.processes import ROOT, environment
from tests.serving_lab import TOKEN, serving_lab

DOCUMENTED = "qilviffnqzck2jrim1x6s2b1"
TEXT = st.text(st.sampled_from("aZ0-._/ +@:=\n\u00e9"), max_size=8) | st.text(st.sampled_from("aZ0-._"), max_size=300)


@given(st.from_regex(patterns.INTERVAL.replace("$", r"\Z")))
def test_each_interval_that_the_pattern_admits_is_taken(text: str) -> None:
    assert check_interval(text) >= timedelta(minutes=1)


@given(st.from_regex(patterns.MAX_AGE.replace("$", r"\Z")))
def test_each_max_age_that_the_pattern_admits_is_taken(text: str) -> None:
    assert check_max_age(text) >= timedelta(0)


@given(st.integers(60, 3 * 365 * 86400))
def test_whole_seconds_as_hypemand_writes_them_are_in_both_patterns(seconds: int) -> None:
    written = format_duration(timedelta(seconds=seconds))
    assert re.search(patterns.INTERVAL, written)
    assert re.search(patterns.MAX_AGE, written)


@pytest.mark.parametrize("text", ["1m", "60s", "90s", "24h", "168h", "1h30m", "1.5h", "604800s", "30s1m", "1m0.5s"])
def test_what_people_write_is_in_the_pattern(text: str) -> None:
    assert re.search(patterns.INTERVAL, text)


@given(st.timedeltas(timedelta(0), timedelta(days=100_000)))
def test_answers_have_durations_that_their_pattern_admits(duration: timedelta) -> None:
    assert re.search(patterns.WRITTEN_DURATION, format_duration(duration))


def _passes(check: Any, value: object) -> bool:
    try:
        check(value)
    except (RuleBroken, ValueError):
        return False
    return True


@given(TEXT)
def test_patterns_of_names_and_tags_admit_exactly_what_the_rules_do(text: str) -> None:
    def admits(pattern: str) -> bool:
        return re.search(pattern.replace("$", r"\Z"), text) is not None

    assert admits(patterns.INSTANCE_ID) == _passes(check_instance_id, text)
    assert admits(patterns.NAME_PREFIX) == _passes(check_prefix, text)
    assert admits(patterns.TAG_KEY) == _passes(check_metadata, {text: ""})
    assert admits(patterns.TAG_VALUE) == _passes(check_metadata, {"key": text})


def test_schemathesis_finds_nothing(tmp_path: Path) -> None:
    with serving_lab(tmp_path, "", (DOCUMENTED, "id")) as lab:
        ran = subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli", "run", f"{lab.url}/openapi.json"),
                *("--header", f"Authorization: Bearer {TOKEN}", "--checks", "all", "--seed", "1"),
                *("--max-examples", "15", "--phases", "examples,coverage,fuzzing,stateful", "--no-color"),
                *("--generation-database", "none"),
            ],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment(PYTHONPATH=str(ROOT)),
            check=False,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert "internal error" not in lab.log
        told = ["schedule made by a client", "schedule changed by a client", "snapshot taken", "deleted by a client"]
        assert [event for event in told if event not in lab.log] == []
    assert re.search(r"[1-9][0-9]+ generated, [1-9][0-9]+ passed", ran.stdout), ran.stdout
    assert "No issues found" in ran.stdout


def test_the_document_names_every_route() -> None:
    document = openapi.document()
    assert {
        (path, method) for path, item in document["paths"].items() for method in item if method != "parameters"
    } == {
        ("/instances/{id}/snapshot-schedule", "get"),
        ("/instances/{id}/snapshot-schedule", "put"),
        ("/instances/{id}/snapshot-schedule", "delete"),
        ("/instances/{id}/snapshot-schedule/run", "post"),
        ("/snapshot-schedules", "get"),
        ("/metrics", "get"),
        ("/health", "get"),
        ("/openapi.json", "get"),
    }
    assert json.loads(json.dumps(document)) == document
