"""The API's promises, asked of its app over an engine in virtual time."""

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import trio
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message
from structlog.typing import EventDict
from trio.testing import MockClock

from hypemand.config import ScheduleEntry
from hypemand.core.errors import InvalidInput
from hypemand.core.model import InstanceId, InstanceState, Schedule
from hypemand.engine.requests import Requests
from hypemand.surface.api import app as app_module
from hypemand.surface.api.app import api_routes, make_app, schedule_answer
from hypemand.surface.api.bodies import _object
from tests.asking import Answer, ask
from tests.world import World, entry, world

HOUR = timedelta(hours=1)
WEB = "/instances/web-1/snapshot-schedule"
NIGHTLY = {
    "interval": "24h",
    "retention": {"max_age": "168h", "max_count": 7},
    "metadata": {"team": "backend", "env": "staging"},
    "name_prefix": "nightly",
}


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


async def test_however_many_ask_for_all_schedules_others_have_their_turn(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered, turns = 0, [0]

    def counting(schedule: Schedule) -> dict[str, Any]:
        nonlocal answered
        answered += 1
        return schedule_answer(schedule)

    async def take_turns() -> None:
        while True:
            await trio.lowlevel.checkpoint()
            turns.append(answered)

    monkeypatch.setattr(app_module, "schedule_answer", counting)
    entries = [entry(f"web-{number}", HOUR) for number in range(1, 201)]
    async with served(tmp_path, *entries) as (_, app), trio.open_nursery() as turning:
        turning.start_soon(take_turns)
        async with trio.open_nursery() as asking:
            for _ in range(10):
                asking.start_soon(ask, app, "GET", "/snapshot-schedules")
        turning.cancel_scope.cancel()
    assert answered == 10 * 200
    assert max(after - before for before, after in pairwise(turns)) <= 100


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
    ({}, ["interval: is missing; it is required"]),
    ({"retention": {}}, ["interval: is missing; it is required"]),
    ({"interval": "10s", "retention": {}}, ["interval: '10s' is too short: the interval must be at least 1m"]),
    ({"interval": 86400, "retention": {}}, ["interval: 86400 must be a string holding a duration"]),
    ({"interval": "1d", "retention": {}}, ["interval: '1d' has the unknown unit 'd'"]),
    ({"interval": None, "retention": {}}, ["interval: is null"]),
    ({"interval": "1h", "retention": None}, ["retention: is null"]),
    ({"interval": "1h", "retention": []}, ["retention: [] must be a table"]),
    ({"interval": "1h", "retention": {"max_age": None}}, ["retention.max_age: is null"]),
    ({"interval": "1h", "retention": {"max_age": "-1h"}}, ["retention.max_age: '-1h' must not be negative"]),
    ({"interval": "1h", "retention": {"max_count": -1}}, ["retention.max_count: -1 must be a whole number"]),
    ({"interval": "1h", "retention": {"max_count": 1.5}}, ["retention.max_count: 1.5 must be a whole number"]),
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
    (b'{"interval": "1h", "retention": {"max_count": 1e400}}', ["retention.max_count: inf must be a whole number"]),
    (b'{"interval": "1h", "retention": {"max_count": 1e-400}}', ["retention.max_count: 0.0 must be a whole number"]),
    (b'{"interval": "1h", "retention": {"max_count": 1e99999999}}', ["retention.max_count: inf must be a whole"]),
    (b'{"interval": "1h", "retention": {"max_count": 1e99999999999999999999}}', ["not JSON", "no number"]),
    (b'{"interval": "1h", "retention": {"max_count": 1e-99999999999999999999}}', ["not JSON", "no number"]),
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


def test_a_key_that_is_there_twice_is_not_looked_for_again_and_again() -> None:
    compared = 0

    class Key(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return str.__eq__(self, other)

    with pytest.raises(InvalidInput, match="k7: is there twice"):
        _object([(Key(f"k{number}"), 0) for number in [*range(2000), 7]])
    assert compared < 2000 * 10


async def test_a_whole_number_may_be_written_in_each_way_of_json(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with served(tmp_path) as (_, app):
        for number in (b"7", b"7.0", b"70e-1", b"0.7E+1"):
            made = await ask(app, "PUT", WEB, b'{"interval": "1h", "retention": {"max_count": %s}}' % number)
            assert made.json["retention"] == {"max_count": 7}


async def test_every_problem_is_told_at_once(tmp_path: Path, autojump_clock: MockClock) -> None:
    body = {"interval": "1s", "retention": {"max_age": "x", "max_count": -1}, "name_prefix": "A", "more": 1}
    async with served(tmp_path) as (_, app):
        message = (await ask(app, "PUT", WEB, body)).json["message"]
        assert all(f"{path}: " in message for path in ("interval", "retention.max_age", "retention.max_count", "more"))


async def test_an_id_is_one_segment_that_is_decoded_only_after_the_split(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    schedule = "snapshot-schedule"
    async with served(tmp_path) as (_, app):
        assert (await ask(app, "PUT", WEB, NIGHTLY)).status == 200
        assert (await ask(app, "GET", f"/instances/w%65b%2D1/{schedule}")).json["instance_id"] == "web-1"
        for target in (
            "x%2Fy",
            "web-1%2Fsnapshot-schedule",
            "%2e%2e",
            "..",
            ".",
            "a%00b",
            "w\u00e9b",
            "a%ff",
            "x" * 129,
        ):
            bad = await ask(app, "GET", f"/instances/{target}/{schedule}")
            assert (bad.status, bad.json["code"]) == (400, "invalid_request"), target
            assert bad.json["message"].startswith("id: "), target
            assert "must be 1 to 128 of A-Z a-z 0-9 . _ - without a leading dot" in bad.json["message"]


ELSEWHERE = [
    "",
    "/",
    "//health",
    "/health/",
    "/./health",
    "/x/../health",
    "/HEALTH",
    "/%68ealth",
    "/instances",
    "/instances/web-1",
    "/instances//snapshot-schedule",
    "/instances/web-1/snapshot-schedule/",
    "/instances/web-1//snapshot-schedule",
    "//instances/web-1/snapshot-schedule",
    "/instances/web-1/snapshot-schedule/run/",
    "/instances/web-1/./snapshot-schedule",
    "/instances/web-1/x/../snapshot-schedule",
    "/instances/web-1%2Fsnapshot-schedule",
    "/instances/web-1/snapshot-schedule%2Frun",
    "/snapshot-schedules/web-1",
]


@pytest.mark.parametrize("target", ELSEWHERE)
async def test_no_other_path_reaches_a_route(tmp_path: Path, target: str, autojump_clock: MockClock) -> None:
    async with served(tmp_path) as (_, app):
        await ask(app, "PUT", WEB, NIGHTLY)
        for method in ("GET", "PUT", "DELETE", "POST"):
            answer = await ask(app, method, target, NIGHTLY if method == "PUT" else None)
            assert (answer.status, answer.json["code"]) == (404, "not_found")
        assert (await ask(app, "GET", WEB)).status == 200


@pytest.mark.parametrize(
    ("target", "allowed"),
    [
        (WEB, "DELETE, GET, HEAD, PUT"),
        (f"{WEB}/run", "POST"),
        ("/health", "GET, HEAD"),
        ("/snapshot-schedules", "GET, HEAD"),
    ],
)
async def test_a_method_that_a_path_does_not_know_is_told_those_that_it_does(
    tmp_path: Path, target: str, allowed: str, autojump_clock: MockClock
) -> None:
    async with served(tmp_path) as (_, app):
        for method in {"GET", "PUT", "DELETE", "POST", "PATCH", "OPTIONS", "TRACE", "BREW"} - set(allowed.split(", ")):
            answer = await ask(app, method, target)
            assert (answer.status, answer.json["code"]) == (405, "method_not_allowed")
            assert answer.headers["allow"] == allowed


async def test_head_is_answered_as_get_is(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with served(tmp_path) as (_, app):
        await ask(app, "PUT", WEB, NIGHTLY)
        for target in (WEB, "/health", "/snapshot-schedules", "/instances/web-2/snapshot-schedule"):
            got, head = [await ask(app, method, target) for method in ("GET", "HEAD")]
            assert (head.status, head.headers) == (got.status, got.headers)


def _known(header: str | None) -> str | None:
    return {"Bearer one": "laptop"}.get(header or "")


async def test_only_who_is_known_gets_past_the_health_check(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with served(tmp_path) as (made, _):
        app = make_app(api_routes(Requests(made.engine)), _known)
        one, other = {"authorization": "Bearer one"}, {"authorization": "Bearer two"}
        for target in (WEB, "/snapshot-schedules", f"{WEB}/run", "/", "/nowhere", "/health/"):
            for headers in (None, other):
                answer = await ask(app, "POST", target, headers=headers)
                assert (answer.status, answer.json["code"]) == (401, "unauthorized"), target
                assert answer.headers["www-authenticate"] == "Bearer"
        assert (await ask(app, "PUT", WEB, NIGHTLY, headers=one)).status == 200
        assert (await ask(app, "GET", WEB, headers=one)).status == 200
        assert (await ask(app, "GET", "/health")).status == 200


async def test_on_the_socket_a_token_is_not_looked_at(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with served(tmp_path) as (_, app):
        assert (await ask(app, "PUT", WEB, NIGHTLY, headers={"authorization": "Bearer nonsense"})).status == 200


async def test_the_log_names_the_client_and_never_its_token(
    tmp_path: Path, heard_log: list[EventDict], autojump_clock: MockClock
) -> None:
    async with served(tmp_path) as (made, on_socket):
        app = make_app(api_routes(Requests(made.engine)), _known)
        await ask(app, "PUT", WEB, NIGHTLY, headers={"authorization": "Bearer one"})
        await ask(app, "GET", WEB, headers={"authorization": "Bearer two"})
        await ask(app, "POST", f"{WEB}/run", headers={"authorization": "Bearer one"})
        await ask(on_socket, "POST", f"{WEB}/run", headers={"accept": "application/x-ndjson"})
        await ask(on_socket, "DELETE", WEB)
    told = [(line["event"].partition(" by ")[0], line["client"]) for line in heard_log if "client" in line]
    assert told == [
        ("schedule made", "laptop"),
        ("run asked for", "laptop"),
        ("run asked for", "socket"),
        ("schedule deleted", "socket"),
    ]
    assert "Bearer" not in str(heard_log)


async def test_a_body_over_64_kib_is_refused_while_it_comes(tmp_path: Path, autojump_clock: MockClock) -> None:
    fits = json.dumps(NIGHTLY).encode().ljust(64 * 1024)
    async with served(tmp_path) as (made, app):
        assert (await ask(app, "PUT", WEB, fits)).status == 200
        before = made.schedule("web-1")
        for chunks in ([fits + b" "], [fits, b" "], [b" " * 1000] * 70, [b" " * 60_000] * 100):
            left = list(chunks)
            answer = await ask(app, "PUT", WEB, chunks=left)
            assert (answer.status, answer.json["code"]) == (413, "too_large")
        assert made.schedule("web-1") == before


async def test_a_client_that_leaves_in_mid_body_changes_nothing(
    tmp_path: Path, heard_log: list[EventDict], autojump_clock: MockClock
) -> None:
    async with served(tmp_path) as (made, app):
        heard_log.clear()
        answer = Answer()
        whole = json.dumps(NIGHTLY).encode()
        await ask(app, "PUT", WEB, chunks=[whole, b""], unfinished=True, leaves_after=5, answer=answer)
        assert (answer.status, trio.current_time()) == (0, 5)
        assert not made.engine.store.schedules
    assert heard_log == []


async def test_a_body_must_be_json_by_its_header_too(tmp_path: Path, autojump_clock: MockClock) -> None:
    body = json.dumps(NIGHTLY).encode()
    async with served(tmp_path) as (_, app):
        for kind in ("text/plain", "application/x-www-form-urlencoded", "application/json5", ""):
            answer = await ask(app, "PUT", WEB, body, headers={"content-type": kind})
            assert (answer.status, answer.json["code"]) == (415, "unsupported_media_type"), kind
        for kind in ("application/json; charset=utf-8", "Application/JSON"):
            assert (await ask(app, "PUT", WEB, body, headers={"content-type": kind})).status == 200


async def test_an_internal_error_tells_the_log_all_and_the_client_nothing(
    tmp_path: Path, heard_log: list[EventDict], autojump_clock: MockClock
) -> None:
    async def broken(_: Request) -> Response:
        raise RuntimeError("secret: /var/lib/x")

    answer = await ask(make_app([Route("/broken", broken)]), "GET", "/broken")
    assert (answer.status, answer.json["code"]) == (500, "internal_error")
    assert "secret" not in answer.body.decode()
    (line,) = heard_log
    assert (line["event"], line["path"]) == ("internal error in a request", "/broken")
    assert isinstance(line["exc_info"], RuntimeError)


async def test_a_conflict_that_lasts_is_not_to_be_tried_again(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with served(tmp_path, entry("web-1", HOUR)) as (_, app):
        for method in ("PUT", "DELETE"):
            answer = await ask(app, method, WEB, NIGHTLY)
            assert (answer.status, answer.json["code"]) == (409, "conflict")
            assert "managed by the config file" in answer.json["message"]
            assert answer.headers["x-should-retry"] == "false"


async def test_what_is_unavailable_now_may_be_tried_again(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with served(tmp_path) as (made, app):
        made.backend.unavailable = True
        answer = await ask(app, "PUT", WEB, NIGHTLY)
        assert (answer.status, answer.json["code"]) == (503, "unavailable")
        assert "x-should-retry" not in answer.headers


async def test_the_documented_example_with_an_error_beside_a_snapshot_is_told_whole(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with served(tmp_path) as (made, app):
        await ask(app, "PUT", WEB, NIGHTLY)
        await ask(app, "POST", f"{WEB}/run")
        good = made.schedule("web-1").last_snapshot_id
        made.backend.machines[InstanceId("web-1")].state = InstanceState.SHUTDOWN
        ran = await ask(app, "POST", f"{WEB}/run")
        assert (ran.status, ran.json["outcome"]) == (200, "failed")
        schedule = (await ask(app, "GET", WEB)).json
        assert schedule["last_snapshot_id"] == good
        assert "Shutdown" in schedule["last_error"]
        assert schedule.keys() >= {"last_run_at", "last_error", "last_snapshot_id", "metadata", "name_prefix"}


async def test_servers_may_tell_the_app_that_they_begin_and_end() -> None:
    told = ["lifespan.startup", "lifespan.shutdown"]
    answered = []

    async def receive() -> Message:
        return {"type": told.pop(0)}

    async def send(message: Message) -> None:
        answered.append(message["type"])

    await make_app([])({"type": "lifespan"}, receive, send)
    assert answered == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
