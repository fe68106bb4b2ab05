"""What the commands ask the daemon: documents of its own connections, that delay no run and no other answer."""

import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import trio
from starlette.types import ASGIApp
from trio.testing import MockClock

from hypemand.backends.base import BackendUnavailable
from hypemand.config import Config
from hypemand.core.model import Freezer, InstanceId, InstanceState, Outcome, RunFinished, Trigger
from hypemand.engine.requests import Requests
from hypemand.state.codec import line_document, run_of, schedule_of
from hypemand.surface import client as clients
from hypemand.surface.api.app import make_app
from hypemand.surface.api.control import Control, control_routes
from hypemand.surface.client import FORMAT, FORMAT_HEADER, Client, NoAnswerError, RefusedError, Silence, find_socket
from hypemand.surface.http.sockets import MOST_BYTES, SYSTEM_SOCKET, short_path
from hypemand.surface.metrics.kept import KeptSnapshots
from hypemand.surface.plan import plan_runs
from tests.asking import ask
from tests.fakes import FakeBackend, FakeClock
from tests.world import World, entry, world

HOUR = timedelta(hours=1)
WEB, DB = InstanceId("web-1"), InstanceId("db-1")


@asynccontextmanager
async def controlled(tmp_path: Path, *instances: str, **more: Any) -> AsyncIterator[tuple[World, Control, ASGIApp]]:
    """A world that runs, and the app for its unix socket."""
    entries = [entry(instance, HOUR) for instance in instances or ("web-1",)]
    async with world(tmp_path, *entries, **more) as made:
        kept = KeptSnapshots(made.engine)
        control = Control(made.engine, kept.of, made.disk)
        with made.engine.events.heard_by(control.hear):
            yield made, control, make_app(control_routes(control))


async def told(app: ASGIApp, target: str, method: str = "GET") -> Any:
    answer = await ask(app, method, target)
    assert (answer.status, answer.headers[FORMAT_HEADER]) == (200, FORMAT)
    return answer.json


async def run_now(made: World, instance: InstanceId = WEB) -> None:
    await made.engine.scheduler.serving.wait()
    await Requests(made.engine).run_now(instance)


# Documents.


async def test_the_status_is_of_the_engines_own_knowledge_and_backends(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with controlled(tmp_path, "web-1", "db-1") as (made, _, app):
        await run_now(made)
        made.backend.add("app-1")
        status = await told(app, "/control/status")
        assert (status["answered_by"], status["daemon"]["running"]) == ("daemon", True)
        views = {view["instance_id"]: view for view in status["instances"]}
        assert {name: view["covered"] for name, view in views.items()} == {"app-1": False, "db-1": True, "web-1": True}
        assert views["web-1"]["last_run"]["trigger"] == "manual"
        assert views["web-1"]["snapshots_kept"] == 1
        assert views["web-1"]["last_good_at"] == views["web-1"]["last_run"]["started_at"]
        assert schedule_of(views["db-1"]["schedule"]) == made.schedule("db-1")
        alone = await told(app, "/control/status?instance=db-1")
        assert [view["instance_id"] for view in alone["instances"]] == ["db-1"]
        assert (await told(app, "/control/status?instance=nobody"))["instances"] == []


async def test_the_history_is_that_of_the_run_log(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with controlled(tmp_path, "web-1", "db-1") as (made, _, app):
        await run_now(made)
        await run_now(made, DB)
        document = await told(app, "/control/history")
        assert [run_of(run) for run in document["runs"]] == made.history()
        document = await told(app, "/control/history?instance=db-1")
        assert [run_of(run) for run in document["runs"]] == made.history("db-1")
        assert (document["damaged"], document["known"]) == ([], True)
        assert (await told(app, "/control/history?instance=nobody")) == {"runs": [], "damaged": [], "known": False}
        with (tmp_path / "runs.jsonl").open("a") as log:
            log.write('gibberish\n{"event": "started"}\n7\n' + '{"event":"finished","instance_id":"web-1"}\n')
        document = await told(app, "/control/history")
        assert [line.partition(":")[0] for line in document["damaged"]] == ["runs.jsonl"] * 2
        assert len(document["runs"]) == 3  # what is in it is for whoever reads it


async def test_a_plan_can_be_worked_out_from_what_is_told(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with controlled(tmp_path) as (made, _, app):
        await run_now(made)
        plan = plan_runs(await told(app, "/control/forecast"), within=timedelta(hours=4))
        (first, *_) = plan.runs
        assert len(plan.runs) == 3
        assert first[1].at == made.schedule("web-1").next_run_at


async def test_what_an_error_names_may_be_no_utf_8(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with controlled(tmp_path) as (made, _, app):
        made.backend.fail("state", "web-1", BackendUnavailable("no file \udcff"))
        (view,) = (await told(app, "/control/status"))["instances"]
        assert view["trouble"].startswith("no file ")


# Backends that hang, or have a bug.


async def test_a_hung_backend_delays_an_answer_by_a_few_seconds_and_hides_no_other(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    clock = FakeClock()
    hung, well = FakeBackend(clock, "hung"), FakeBackend(clock, "well")
    names = [f"web-{number}" for number in range(100)]
    hung.add(*names)
    well.add("db-1")
    async with controlled(tmp_path, "db-1", backends=[well, hung]) as (_, _, app):
        for call in ("state", "list_snapshots"):
            hung.fail(call, "*")
        began = trio.current_time()
        views = {view["instance_id"]: view for view in (await told(app, "/control/status"))["instances"]}
        assert trio.current_time() - began <= 10.1
        assert views["db-1"]["state"] == "Running"
        assert any("did not answer" in views[name]["trouble"] for name in names)
        assert all(views[name]["state"] is None and "answer" in views[name]["trouble"] for name in names)


async def test_a_backend_that_hangs_altogether_is_told_as_a_problem(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with controlled(tmp_path) as (made, _, app):
        await run_now(made)
        for call in ("state", "list_snapshots", "instances"):
            made.backend.fail(call, "*")
        began = trio.current_time()
        status = await told(app, "/control/status")
        assert trio.current_time() - began <= 15.1
        assert "did not answer" in status["problems"][0]
        assert status["instances"][0]["last_good_at"]  # of the run log


async def test_a_bug_of_one_backend_hides_no_other_instance(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with controlled(tmp_path, "web-1", "db-1") as (made, _, app):
        made.backend.fail("state", "web-1", RuntimeError("a bug"))
        views = {view["instance_id"]: view for view in (await told(app, "/control/status"))["instances"]}
        assert "a bug" in views["web-1"]["trouble"]
        assert (views["db-1"]["state"], views["db-1"]["trouble"]) == ("Running", None)


async def test_those_who_ask_at_once_share_a_look(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with controlled(tmp_path, "web-1", "db-1") as (made, _, app):
        made.backend.fail("state", "web-1")
        answers: list[Any] = []

        async def ask_one(number: int) -> None:
            answers.append(await told(app, f"/control/status{'?instance=db-1' if number % 2 else ''}"))

        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for number in range(40):
                nursery.start_soon(ask_one, number)
        assert trio.current_time() - began <= 10.2  # one that was under way, and one for all who came meanwhile
        assert sorted(len(answer["instances"]) for answer in answers) == [1] * 20 + [2] * 20
        assert len(made.backend.times("state", "db-1")) <= 2


async def test_who_asks_during_a_look_is_told_of_what_happened_since_it_began(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with controlled(tmp_path, "web-1", "db-1") as (made, _, app):
        made.backend.fail("state", "db-1", times=1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(told, app, "/control/status")
            await trio.sleep(1)
            await run_now(made)
            later = await told(app, "/control/status?instance=web-1")
        assert later["instances"][0]["last_run"]["outcome"] == "succeeded"
        assert later["instances"][0]["snapshots_kept"] == 1


async def test_a_client_that_goes_away_leaves_the_look_to_those_who_wait(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with controlled(tmp_path) as (made, control, _):
        made.backend.fail("state", "web-1", times=1)
        seen = []

        async def wait() -> None:
            seen.append(await control.overview())

        async with trio.open_nursery() as nursery:
            with trio.move_on_after(1):
                nursery.start_soon(wait)
                await control.overview()
        assert [view.instance_id for view in seen[0].instances] == ["web-1"]


# Runs under way.


async def test_an_instance_with_a_run_under_way_is_not_asked_about(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with controlled(tmp_path) as (made, _, app), trio.open_nursery() as nursery:
        made.backend.capture_s = 20
        nursery.start_soon(run_now, made)
        await trio.sleep(5)
        calls = len(made.backend.calls)
        (view,) = (await told(app, "/control/status"))["instances"]
        assert [call for _, call, _ in made.backend.calls[calls:]] == ["instances"]
        assert (view["state"], view["under_way"], view["trouble"]) == ("Paused", True, None)
        assert view["current_run"]["frozen_s"] == pytest.approx(5, abs=0.1)
        await trio.sleep(30)
        (view,) = (await told(app, "/control/status"))["instances"]
        assert (view["state"], view["current_run"]) == ("Running", None)
        assert view["snapshots_kept"] == 1


async def test_its_snapshots_are_those_that_were_listed_last(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path, entry("web-1", HOUR)) as made, trio.open_nursery() as nursery:
        kept = KeptSnapshots(made.engine)
        control = Control(made.engine, kept.of, made.disk)
        await run_now(made)
        kept.heard(WEB, tuple(await made.backend.list_snapshots(WEB)))
        made.backend.capture_s = 20
        nursery.start_soon(run_now, made)
        await trio.sleep(5)
        (view,) = (await control.overview()).instances
        assert view.snapshots is not None
        assert len(view.snapshots) == 1


async def test_a_guest_that_its_hypervisor_freezes_is_told_as_frozen(tmp_path: Path, autojump_clock: MockClock) -> None:
    clock = FakeClock()
    backend = FakeBackend(clock, freezes=Freezer.HYPERVISOR, capture_s=20)
    async with controlled(tmp_path, clock=clock, backends=[backend]) as (made, _, app), trio.open_nursery() as nursery:
        nursery.start_soon(run_now, made)
        await trio.sleep(5)
        (view,) = (await told(app, "/control/status"))["instances"]
        assert (view["state"], view["current_run"]["frozen_s"]) == ("Paused", pytest.approx(5, abs=0.1))


async def test_a_guest_seen_paused_by_a_run_that_began_meanwhile_is_not_called_frozen(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with controlled(tmp_path, "web-1", "db-1") as (made, control, _), trio.open_nursery() as nursery:
        made.backend.fail("list_snapshots", "db-1", times=1)  # the look lasts for 5 s
        made.backend.capture_s = 1
        seen = []

        async def look() -> None:
            seen.append(await control.overview())

        machine = made.backend.machines[WEB]
        machine.state = InstanceState.PAUSED  # as if the answer came in mid-capture
        nursery.start_soon(look)
        await trio.sleep(0.1)
        machine.state = InstanceState.RUNNING
        await run_now(made)
        await trio.sleep(10)
        web = next(view for view in seen[0].instances if view.instance_id == WEB)
        assert web.state is None
        assert web.open_run is None


async def test_a_run_that_waits_to_begin_is_not_disturbed(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with controlled(tmp_path) as (made, _, app):
        made.backend.fail("state", "web-1", BackendUnavailable("away"))
        await trio.sleep(HOUR.total_seconds() + 310)  # due, and waiting for its next try
        assert made.engine.scheduler.running == {WEB}
        calls = len(made.backend.times("state", "web-1"))
        (view,) = (await told(app, "/control/status"))["instances"]
        assert (view["state"], view["open_run"]) == (None, False)
        assert len(made.backend.times("state", "web-1")) == calls


# Recover.


async def left_open(made: World) -> None:
    """A run whose hypervisor answers no more, so that it could not be settled."""
    made.backend.fail("capture", "web-1", BackendUnavailable("away"))
    made.backend.fail("settle", "web-1", BackendUnavailable("still away"))
    await run_now(made)
    assert made.engine.runlog.open_runs


async def test_recover_has_open_runs_settled_at_once(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with controlled(tmp_path) as (made, _, app):
        await left_open(made)
        await trio.sleep(300)  # by now it is tried every 30 s
        made.backend.heal("settle", "web-1")
        began = trio.current_time()
        answer = await told(app, "/control/recover", "POST")
        assert (answer["left"], answer["under_way"]) == ([], [])
        assert trio.current_time() - began < 1
        assert made.outcomes() == ["interrupted"]


async def test_recover_names_what_can_not_be_settled_and_why(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with controlled(tmp_path) as (made, _, app):
        await left_open(made)
        began = trio.current_time()
        answer = await told(app, "/control/recover", "POST")
        assert trio.current_time() - began == pytest.approx(5, abs=0.1)
        (left,) = answer["left"]
        assert left.startswith("web-1: run ")
        assert "still away" in left
        (view,) = (await told(app, "/control/status"))["instances"]
        assert (view["open_run"], view["under_way"]) == (True, False)
        assert "still away" in view["current_run"]["error"]


async def test_recover_waits_for_runs_under_way_and_names_them(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with controlled(tmp_path) as (made, _, app), trio.open_nursery() as nursery:
        made.backend.capture_s = 3
        nursery.start_soon(run_now, made)
        await trio.sleep(1)
        assert (await told(app, "/control/recover", "POST"))["under_way"] == []
        assert made.outcomes() == ["succeeded"]
        made.backend.capture_s = 30
        nursery.start_soon(run_now, made)
        await trio.sleep(1)
        (under_way,) = (await told(app, "/control/recover", "POST"))["under_way"]
        assert under_way.startswith("web-1: run ")


async def test_recover_is_no_get(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with controlled(tmp_path) as (_, _, app):
        assert (await ask(app, "GET", "/control/recover")).status == 405


# The client.

HEALTHY = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"


@contextmanager
def listening(path: Path, *answers: bytes | None) -> Iterator[Client]:
    """Somebody who gives these answers, one for each request of a connection; None: none at all, for good."""
    path.parent.mkdir(parents=True, exist_ok=True)
    over = threading.Event()
    with socket.socket(socket.AF_UNIX) as listener:
        with short_path(path) as name:
            listener.bind(name)
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                for answer in answers:
                    while b"\r\n\r\n" not in connection.recv(65536):
                        pass
                    if answer is None:
                        over.wait(30)
                        return
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield Client(path)
        finally:
            over.set()
            thread.join()


def answered(body: bytes, status: str = "200 OK", headers: str = f"{FORMAT_HEADER}: {FORMAT}") -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n{headers}\r\n\r\n".encode() + body


def test_a_document_comes_through_a_socket_whose_path_is_longer_than_the_kernel_takes(tmp_path: Path) -> None:
    path = tmp_path / ("long-" * 20) / ("name-" * 10) / "api.sock"
    assert len(str(path)) > MOST_BYTES
    with listening(path, HEALTHY, answered(b'{"a": 1}')) as client:
        assert client.get("/control/status", instance="a b/c") == {"a": 1}


STRANGE = {
    "no such path": answered(b'{"code": "not_found", "message": "there is nothing"}', "404 Not Found"),
    "an internal error": answered(b"{}", "500 Internal Server Error"),
    "documents of another version": answered(b"{}", headers=f"{FORMAT_HEADER}: 99"),
    "documents of no version": answered(b"{}", headers="x: y"),
    "no JSON": answered(b"{"),
    "no document": answered(b"[]"),
    "no HTTP": b"hello\r\n\r\n",
}


@pytest.mark.parametrize("answer", STRANGE.values(), ids=STRANGE.keys())
def test_an_answer_that_this_version_does_not_know_is_no_answer(tmp_path: Path, answer: bytes) -> None:
    with listening(tmp_path / "s", HEALTHY, answer) as client, pytest.raises(NoAnswerError) as error:
        client.get("/control/status")
    assert error.value.why is Silence.STRANGE
    assert str(tmp_path / "s") in str(error.value)


@pytest.mark.parametrize("answers", [(None,), (HEALTHY, None), (HEALTHY,), ()], ids=["hung", "later", "cut", "at once"])
def test_a_daemon_that_does_not_answer_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: tuple[bytes | None, ...]
) -> None:
    monkeypatch.setattr(clients, "ALIVE_S", 0.2)
    monkeypatch.setattr(clients, "ANSWER_S", 0.2)
    with listening(tmp_path / "s", *answers) as client, pytest.raises(NoAnswerError) as error:
        client.get("/control/status")
    assert error.value.why is Silence.HUNG


def test_nobody_there_is_told_apart_from_somebody_who_does_not_answer(tmp_path: Path) -> None:
    left = tmp_path / "left"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(left))
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "missing", tmp_path / "no" / "where", left, tmp_path / "file" / "s"):
        with pytest.raises(NoAnswerError) as error:
            Client(path).get("/control/status")
        assert error.value.why is Silence.ABSENT


def test_who_may_not_open_the_socket_is_told_who_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(clients, "short_path", refuse)
    with pytest.raises(NoAnswerError, match="owner and group") as error:
        Client(tmp_path / "s").get("/control/status")
    assert error.value.why is Silence.FORBIDDEN


def test_a_refused_run_is_told_in_the_daemons_words(tmp_path: Path) -> None:
    refusal = answered(b'{"code": "conflict", "message": "busy"}', "409 Conflict")
    with listening(tmp_path / "s", HEALTHY, refusal) as client, pytest.raises(RefusedError, match="busy") as error:
        list(client.run_now("web-1"))
    assert error.value.status == 409


def test_a_run_is_told_line_by_line_and_blank_ones_are_passed_over(tmp_path: Path) -> None:
    steps = answered(b'\n{"step": "paused"}\n\n{"step": "finished"}\n')
    with listening(tmp_path / "s", HEALTHY, steps) as client:
        assert list(client.run_now("web-1")) == [{"step": "paused"}, {"step": "finished"}]


def test_the_systems_config_without_a_state_dir_means_the_systems_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "etc.toml"
    monkeypatch.setattr(clients, "SYSTEM_CONFIG", theirs)
    monkeypatch.setattr(clients, "default_state_dir", lambda: ours)
    assert find_socket(theirs, Config(ours)) == SYSTEM_SOCKET
    assert find_socket(theirs, Config(tmp_path / "told")) == tmp_path / "told" / "api.sock"
    assert find_socket(tmp_path / "mine.toml", Config(ours)) == ours / "api.sock"
    ours.mkdir()
    (ours / "api.sock").write_text("")
    assert find_socket(theirs, Config(ours)) == ours / "api.sock"


def test_a_line_of_an_earlier_version_has_every_key_when_it_is_read() -> None:
    written = {
        "event": "finished",
        "run_id": "r1",
        "instance_id": "web-1",
        "due_at": "2026-03-09T01:00:00Z",
        "started_at": "2026-03-09T01:00:00Z",
        "finished_at": "2026-03-09T01:00:01Z",
        "outcome": "failed",
        "colour": "red",
    }
    run = run_of(written)
    assert isinstance(run, RunFinished)
    assert (run.outcome, run.trigger) == (Outcome.FAILED, Trigger.SCHEDULE)
    assert line_document(run)["colour"] == "red"
