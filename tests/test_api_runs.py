"""A run over the API: waited for, or told step by step while it goes on."""

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import trio
import trio.testing
from starlette.types import ASGIApp
from structlog.typing import EventDict
from trio.testing import MockClock

from hypemand.backends.base import BackendUnavailable
from hypemand.config import ScheduleEntry
from hypemand.core.model import Outcome
from hypemand.engine.requests import Requests
from hypemand.state.codec import line_document
from hypemand.surface.api.app import api_routes, make_app
from tests.asking import Answer, ask
from tests.world import World, entry, world

HOUR = timedelta(hours=1)
RUN = "/instances/web-1/snapshot-schedule/run"
STREAM = {"accept": "application/x-ndjson"}


@asynccontextmanager
async def served(tmp_path: Path, *entries: ScheduleEntry, **options: Any) -> AsyncIterator[tuple[World, ASGIApp]]:
    async with world(tmp_path, *entries or [entry("web-1", HOUR, max_count=1)], **options) as made:
        await made.engine.scheduler.serving.wait()
        yield made, make_app(api_routes(Requests(made.engine)))


async def test_a_run_is_waited_for_and_answered_with_its_line_of_the_history(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with served(tmp_path) as (made, app):
        answer = await ask(app, "POST", RUN)
        assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
        (run,) = made.history()
        assert answer.json == line_document(run)
        assert (answer.json["outcome"], answer.json["trigger"]) == ("succeeded", "manual")


async def test_a_run_that_fails_is_an_answer_too(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with served(tmp_path) as (made, app):
        made.backend.unavailable = True
        answer = await ask(app, "POST", RUN)
        assert (answer.status, answer.json["outcome"]) == (200, "failed")
        assert answer.json["error"]


async def test_the_steps_of_a_run_are_told_as_they_happen(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with served(tmp_path) as (made, app):
        await ask(app, "POST", RUN)
        began = trio.current_time()
        answer = await ask(app, "POST", RUN, headers=STREAM)
        assert (answer.status, answer.headers["content-type"]) == (200, "application/x-ndjson")
        steps = [line["step"] for line in answer.lines]
        assert steps == ["begun", "paused", "captured", "resumed", "listed", "pruned", "finished"]
        run = made.history()[-1]
        assert answer.lines[-1] == {"step": "finished", "run": line_document(run)}
        assert answer.lines[0] == {"step": "begun", "snapshot_name": run.snapshot_name, "kind": "Standby"}
        times = [at - began for at, part in answer.parts if part]
        assert times == [0, 0, 1, 1, 1, 1, 1]


async def test_a_stream_begins_at_once_and_is_kept_alive(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with served(tmp_path, max_freeze=timedelta(minutes=5)) as (made, app):
        made.backend.capture_s = 65
        answer = Answer()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: ask(app, "POST", RUN, headers=STREAM, answer=answer))
            await trio.testing.wait_all_tasks_blocked()
            assert (answer.status, [line["step"] for line in answer.lines]) == (200, ["begun", "paused"])
        times = [at for at, _ in answer.parts]
        assert max(later - earlier for earlier, later in itertools.pairwise(times)) <= 10
        assert answer.lines[-1]["run"]["outcome"] == "succeeded"


async def test_a_run_goes_on_when_its_listener_has_gone(
    tmp_path: Path, heard_log: list[EventDict], autojump_clock: MockClock
) -> None:
    async with served(tmp_path) as (made, app):
        made.backend.capture_s = 5
        began = trio.current_time()
        answer = await ask(app, "POST", RUN, headers=STREAM, leaves_after=1)
        assert (answer.over, trio.current_time() - began) == (False, 1)
        assert made.engine.events._listeners == []
        assert made.outcomes() == []
        await trio.sleep(10)
        with trio.move_on_after(1):  # the server ends, and with it the request
            await ask(app, "POST", RUN)
        await trio.sleep(10)
        assert made.outcomes() == ["succeeded", "succeeded"]
    assert not [line for line in heard_log if line["log_level"] in ("error", "critical")]


async def test_who_reads_slowly_hears_the_whole_run_and_nothing_of_the_next(
    tmp_path: Path, heard_log: list[EventDict], autojump_clock: MockClock
) -> None:
    async with served(tmp_path) as (made, app), trio.open_nursery() as nursery:
        slow = Answer()
        nursery.start_soon(lambda: ask(app, "POST", RUN, headers=STREAM, slow_s=7, answer=slow))
        await trio.sleep(5)
        began = trio.current_time()
        assert (await ask(app, "POST", RUN)).json["outcome"] == "succeeded"
        assert trio.current_time() - began == 1
        await trio.sleep(100)
        steps = [line["step"] for line in slow.lines]
        assert steps == ["begun", "paused", "captured", "resumed", "listed", "finished"]
        assert slow.lines[-1]["run"]["run_id"] == made.history()[0].run_id
    assert not [line for line in heard_log if line["log_level"] in ("error", "critical")]


async def test_what_refuses_a_run_is_told_before_a_stream_begins(tmp_path: Path, autojump_clock: MockClock) -> None:
    entries = entry("web-1", HOUR), entry("off-1", HOUR, enabled=False)
    async with served(tmp_path, *entries) as (_, app), trio.open_nursery() as nursery:
        for headers in (STREAM, None):
            gone = await ask(app, "POST", RUN.replace("web-1", "web-2"), headers=headers)
            assert (gone.status, gone.json["code"]) == (404, "not_found")
            off = await ask(app, "POST", RUN.replace("web-1", "off-1"), headers=headers)
            assert (off.status, off.headers.get("x-should-retry")) == (409, "false")
        nursery.start_soon(ask, app, "POST", RUN)
        await trio.testing.wait_all_tasks_blocked()
        for headers in (STREAM, None):
            busy = await ask(app, "POST", RUN, headers=headers)
            assert (busy.status, busy.json["code"]) == (409, "conflict")
            assert "x-should-retry" not in busy.headers


async def test_a_run_that_is_left_open_is_told_so(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with served(tmp_path) as (made, app):
        made.backend.fail("capture", "web-1", BackendUnavailable("gone silent"))
        made.backend.fail("settle", "web-1", BackendUnavailable("gone silent"))
        answer = await ask(app, "POST", RUN, headers=STREAM)
        assert answer.lines[-1].keys() == {"step", "message"}
        assert answer.lines[-1]["step"] == "left open"
        made.backend.heal("settle", "web-1")
        await trio.sleep(120)
        assert made.outcomes() == ["interrupted"]
        made.backend.fail("settle", "web-1", BackendUnavailable("gone silent"))
        refused = await ask(app, "POST", RUN)
        assert (refused.status, refused.json["code"]) == (503, "unavailable")
        assert "left open until its hypervisor answers" in refused.json["message"]
        assert refused.headers["x-should-retry"] == "false"


async def test_a_run_that_the_end_of_hypemand_cuts_short_is_told_so(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with served(tmp_path) as (made, app):
        made.backend.capture_s = 600
        answer = Answer()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: ask(app, "POST", RUN, headers=STREAM, answer=answer))
            await trio.sleep(1)
            made.engine.stop(0)
        assert answer.lines[-1]["step"] == "left open"
        assert made.history()[-1].outcome is Outcome.INTERRUPTED
        late = await ask(app, "POST", RUN)
        assert (late.status, late.json["code"]) == (503, "unavailable")


async def test_steps_of_other_instances_are_not_told(tmp_path: Path, autojump_clock: MockClock) -> None:
    entries = [entry(name, HOUR) for name in ("web-1", "web-2")]
    async with served(tmp_path, *entries, concurrency=2) as (_, app):
        answers: list[Answer] = []

        async def run(target: str) -> None:
            answers.append(await ask(app, "POST", target, headers=STREAM))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, RUN)
            nursery.start_soon(run, RUN.replace("web-1", "web-2"))
        assert sorted(answer.lines[-1]["run"]["instance_id"] for answer in answers) == ["web-1", "web-2"]
        assert all(len(answer.lines) == 6 for answer in answers)


async def test_a_run_takes_no_body(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with served(tmp_path) as (made, app):
        refused = await ask(app, "POST", RUN, {"name": "mine"})
        assert (refused.status, refused.json["code"]) == (400, "invalid_request")
        assert "name: unknown key" in refused.json["message"]
        assert (await ask(app, "POST", RUN, [])).status == 400
        assert made.outcomes() == []
        assert (await ask(app, "POST", RUN, {})).status == 200
