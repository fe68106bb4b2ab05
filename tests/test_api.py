"""The API's promises, asked of its app over an engine in virtual time."""

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from starlette.types import ASGIApp
from trio.testing import MockClock

from hypemand.config import ScheduleEntry
from hypemand.engine.requests import Requests
from hypemand.surface.api import api_routes, make_app
from tests.asking import ask
from tests.world import World, entry, world

HOUR = timedelta(hours=1)
WEB = "/instances/web-1/snapshot-schedule"
NIGHTLY = {
    "interval": "24h",
    "retention": {"max_age": "168h", "max_count": 7},
    "metadata": {"team": "backend", "env": "staging"},
    "name_prefix": "nightly",
}
NDJSON = {"accept": "application/x-ndjson"}


@asynccontextmanager
async def served(tmp_path: Path, *entries: ScheduleEntry, **options: Any) -> AsyncIterator[tuple[World, ASGIApp]]:
    """A world with the instances web-1 and web-2, and the app over it, once runs can begin."""
    async with world(tmp_path, *entries, **options) as made:
        made.backend.add(*({"web-1", "web-2"} - made.backend.machines.keys()))
        await made.engine.scheduler.serving.wait()
        yield made, make_app(api_routes(Requests(made.engine)))


async def test_a_schedule_is_made_read_listed_and_deleted(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with served(tmp_path) as (_, app):
        made = await ask(app, "PUT", WEB, NIGHTLY)
        assert (made.status, made.headers["content-type"]) == (200, "application/json")
        assert {key: made.json[key] for key in NIGHTLY} == NIGHTLY
        assert (await ask(app, "GET", WEB)).json == made.json
        assert (await ask(app, "GET", "/snapshot-schedules")).json == [made.json]
        gone = await ask(app, "DELETE", WEB)
        assert (gone.status, gone.body) == (204, b"")
        assert (await ask(app, "GET", WEB)).json["code"] == "not_found"
        assert (await ask(app, "DELETE", WEB)).status == 404
        assert (await ask(app, "GET", "/snapshot-schedules")).json == []


async def test_an_answer_has_the_documented_keys_alone_and_times_in_utc(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with served(tmp_path) as (_, app):
        bare = (await ask(app, "PUT", WEB, {"interval": "90s", "retention": {}})).json
        assert set(bare) == {"instance_id", "interval", "retention", "created_at", "updated_at", "next_run_at"}
        assert (bare["interval"], bare["retention"]) == ("1m30s", {})
        await ask(app, "PUT", WEB, NIGHTLY)
        await ask(app, "POST", f"{WEB}/run")
        full = (await ask(app, "GET", WEB)).json
        assert set(full) == set(bare) | {"last_run_at", "last_snapshot_id", "metadata", "name_prefix"}
        times = [full[key] for key in full if key.endswith("_at")]
        assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", time) for time in times)


async def test_what_is_internal_stays_inside(tmp_path: Path, autojump_clock: MockClock) -> None:
    kept = entry("web-1", HOUR, max_count=3, first_run="02:00", max_freeze=timedelta(seconds=9))
    async with served(tmp_path, kept) as (_, app):
        schedule = (await ask(app, "GET", WEB)).json
        assert set(schedule) == {"instance_id", "interval", "retention", "created_at", "updated_at", "next_run_at"}
        assert schedule["retention"] == {"max_count": 3}


async def test_unset_is_left_out_and_a_null_prefix_is_unset(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with served(tmp_path) as (_, app):
        for prefix in ("", None):
            made = await ask(app, "PUT", WEB, NIGHTLY | {"name_prefix": prefix, "metadata": {}})
            assert made.status == 200
            assert not {"name_prefix", "metadata"} & made.json.keys()


async def test_health_is_told(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with served(tmp_path) as (_, app):
        answer = await ask(app, "GET", "/health")
        assert (answer.status, answer.json) == (200, {"status": "ok"})


BAD = [
    ({}, ["interval: is missing", "retention: is missing"]),
    ({"interval": "24h"}, ["retention: is missing; it is required"]),
    ({"interval": "10s", "retention": {}}, ["interval: '10s' is too short: the interval must be at least 1m"]),
    ({"interval": 86400, "retention": {}}, ["interval: 86400 must be a string holding a duration"]),
    ({"interval": "1d", "retention": {}}, ["interval: '1d' has the unknown unit 'd'"]),
    ({"interval": None, "retention": {}}, ["interval: is null"]),
    ({"interval": "1h", "retention": None}, ["retention: is null"]),
    ({"interval": "1h", "retention": []}, ["retention: [] must be a table"]),
    ({"interval": "1h", "retention": {"max_age": None}}, ["retention.max_age: is null"]),
    ({"interval": "1h", "retention": {"max_age": "-1h"}}, ["retention.max_age: '-1h' must not be negative"]),
    ({"interval": "1h", "retention": {"max_count": -1}}, ["retention.max_count: -1 must be a whole number"]),
    ({"interval": "1h", "retention": {"max_count": 1.0}}, ["retention.max_count: 1.0 must be a whole number"]),
    ({"interval": "1h", "retention": {"max_count": True}}, ["retention.max_count: True must be a whole number"]),
    (
        {"interval": "1h", "retention": {"max_count": 2**63}},
        ["retention.max_count: must be 9223372036854775807"],
    ),
    ({"interval": "1h", "retention": {"max_size": 1}}, ["retention.max_size: unknown key"]),
    ({"interval": "1h", "retention": {}, "metadata": None}, ["metadata: is null"]),
    ({"interval": "1h", "retention": {}, "metadata": {"a": None}}, ["metadata.a: is null"]),
    ({"interval": "1h", "retention": {}, "metadata": {"a": 1}}, ["metadata.a: 1 must be a string"]),
    ({"interval": "1h", "retention": {}, "metadata": {"": "x"}}, ["metadata: tag key ''"]),
    ({"interval": "1h", "retention": {}, "metadata": {f"k{n}": "" for n in range(51)}}, ["metadata: has 51 tags"]),
    ({"interval": "1h", "retention": {}, "name_prefix": "-x"}, ["name_prefix: '-x' must be lower-case"]),
    ({"interval": "1h", "retention": {}, "name_prefix": "x" * 48}, ["name_prefix: has 48 characters"]),
    ({"interval": "1h", "retention": {}, "intervall": "2h"}, ["intervall: unknown key; did you mean 'interval'?"]),
    ({"interval": "1h", "retention": {}, "first_run": "now"}, ["first_run: unknown key"]),
    ({"interval": "1h", "retention": {}, "\ud800": 1}, ["\\ud800: unknown key"]),
    ({"interval": "x" * 60_000, "retention": {}}, ["interval: "]),
    ([], ["must be a JSON object"]),
    ("text", ["must be a JSON object"]),
    (b"", ["the body is empty"]),
    (b"{", ["the body is not JSON"]),
    (b"\xff", ["the body is not JSON"]),
    (b'{"interval": "1h", "retention": {"max_count": NaN}}', ["NaN is no number"]),
    (b'{"interval": "1h", "retention": {"max_count": -Infinity}}', ["Infinity is no number"]),
    (b'{"interval": "1h", "retention": {"max_count": ' + b"9" * 5000 + b"}}", ["not JSON"]),
    (b'{"interval": "1h", "interval": "1h", "retention": {}}', ["interval: is there twice"]),
    (b'{"interval": "1h", "retention": {}, "metadata": {"a": "1", "a": "2"}}', ["a: is there twice"]),
    (b'{"interval": "1h", "retention": ' + b"[" * 60_000, ["nested too deeply"]),
    (b'{"interval": "1h", "retention": ' + b"[" * 900 + b"]" * 900 + b"}", ["retention"]),
    (json.dumps({f"key{n}": n for n in range(3000)}).encode(), ["has 3000 keys"]),
    (json.dumps({f"intervat{n}": n for n in range(90)}).encode(), ["unknown key", "and 7"]),
]


@pytest.mark.parametrize(("body", "told"), BAD)
async def test_a_body_that_breaks_rules_is_refused_by_field_and_rule(
    tmp_path: Path, body: Any, told: list[str], autojump_clock: MockClock
) -> None:
    async with served(tmp_path) as (made, app):
        answer = await ask(app, "PUT", WEB, body)
        assert (answer.status, answer.json["code"]) == (400, "invalid_request")
        assert [one for one in told if one not in answer.json["message"]] == [], answer.json["message"]
        assert len(answer.body) < 8000
        assert not made.engine.store.schedules


async def test_every_problem_is_told_at_once(tmp_path: Path, autojump_clock: MockClock) -> None:
    body = {"interval": "1s", "retention": {"max_age": "x", "max_count": -1}, "name_prefix": "A", "more": 1}
    async with served(tmp_path) as (_, app):
        message = (await ask(app, "PUT", WEB, body)).json["message"]
        assert all(f"{path}: " in message for path in ("interval", "retention.max_age", "retention.max_count", "more"))
