"""Programs that were written for Hypeman, against a real daemon: its Python client, its curl line, its Go example."""

import asyncio
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import hypeman
import pytest
from attrs import define, field
from hypeman.types import SnapshotSchedule
from hypeman.types.snapshot_schedule_retention import SnapshotScheduleRetention

from tests.processes import PATIENCE_S
from tests.serving_lab import OTHER_TOKEN, TOKEN, ServingLab, serving_lab

MANAGED = """
[[schedules]]
instance = "managed-1"
interval = "24h"
retention = { max_count = 3 }
"""
REQUIRED = {"instance_id", "interval", "retention", "created_at", "updated_at", "next_run_at"}
WAYS = ["sync over TCP", "sync over the socket", "async over TCP", "async over the socket"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServingLab]:
    instances = ("id", "managed-1", *(f"vm-{number}" for number in range(len(WAYS))))
    with serving_lab(tmp_path_factory.mktemp("lab"), MANAGED, instances) as made:
        yield made


@define
class Program:
    """One of the four ways to use the client. *answers*: of the daemon, in order, retries included."""

    lab: ServingLab
    way: str
    key: str = TOKEN
    answers: list[httpx.Response] = field(factory=list)

    @property
    def instance(self) -> str:
        """One that no other way uses."""
        return f"vm-{WAYS.index(self.way)}"

    def get(self, instance: str) -> SnapshotSchedule:
        return self._checked(self._ask(lambda client: client.instances.snapshot_schedule.get(instance)))

    def update(self, instance: str, **body: Any) -> SnapshotSchedule:
        return self._checked(self._ask(lambda client: client.instances.snapshot_schedule.update(instance, **body)))

    def delete(self, instance: str) -> None:
        assert self._ask(lambda client: client.instances.snapshot_schedule.delete(instance)) is None

    def health(self) -> str:
        return str(self._ask(lambda client: client.health.check()).status)

    def _ask(self, call: Callable[[Any], Any]) -> Any:
        """The answer to *call*, by a client that checks what it gets."""
        options: dict[str, Any] = {"api_key": self.key, "base_url": self.lab.url, "_strict_response_validation": True}
        uds = str(self.lab.socket) if "socket" in self.way else None
        if self.way.startswith("sync"):
            http = httpx.Client(
                transport=httpx.HTTPTransport(uds=uds, verify=False), event_hooks={"response": [self._note]}
            )
            with hypeman.Hypeman(http_client=http, **options) as client:
                return call(client)
        return asyncio.run(self._ask_async(call, uds, options))

    async def _ask_async(self, call: Callable[[Any], Awaitable[Any]], uds: str | None, options: dict[str, Any]) -> Any:
        transport = httpx.AsyncHTTPTransport(uds=uds, verify=False)
        http = httpx.AsyncClient(transport=transport, event_hooks={"response": [self._note_async]})
        async with hypeman.AsyncHypeman(http_client=http, **options) as client:
            return await call(client)

    def _note(self, response: httpx.Response) -> None:
        response.read()
        self.answers.append(response)

    async def _note_async(self, response: httpx.Response) -> None:
        await response.aread()
        self.answers.append(response)

    def _checked(self, schedule: SnapshotSchedule) -> SnapshotSchedule:
        """*schedule*, whose document has the model's own keys, each of its type, and nothing beside."""
        document = self.answers[-1].json()
        assert REQUIRED <= document.keys() <= SnapshotSchedule.model_fields.keys()
        assert document["retention"].keys() <= SnapshotScheduleRetention.model_fields.keys()
        assert None not in [*document.values(), *document["retention"].values()]
        assert SnapshotSchedule.model_validate_json(self.answers[-1].content, strict=True) == schedule
        return schedule


@pytest.fixture(params=WAYS)
def program(request: pytest.FixtureRequest, lab: ServingLab) -> Program:
    return Program(lab, request.param)


@pytest.fixture
def stranger(program: Program) -> Program:
    """The same, with a token that nobody knows."""
    return Program(program.lab, program.way, key="wrong-0123456789abcdef")


def refused(program: Program, error: type[hypeman.APIStatusError], call: Callable[[], object]) -> str:
    """The message of the *error* that *call* ends with, after one answer alone."""
    program.answers.clear()
    with pytest.raises(error) as raised:
        call()
    assert len(program.answers) == 1
    assert program.answers[0].json().keys() == {"code", "message"}
    assert raised.value.body == program.answers[0].json()
    return str(program.answers[0].json()["message"])


def test_the_life_of_a_schedule(program: Program) -> None:
    began = datetime.now(UTC)
    refused(program, hypeman.NotFoundError, lambda: program.get(program.instance))
    made = program.update(
        program.instance,
        interval="24h",
        retention={"max_age": "168h", "max_count": 7},
        metadata={"team": "backend", "env": "staging"},
        name_prefix="nightly",
    )
    assert (made.instance_id, made.interval, made.name_prefix) == (program.instance, "24h", "nightly")
    assert (made.retention.max_age, made.retention.max_count) == ("168h", 7)
    assert made.metadata == {"team": "backend", "env": "staging"}
    assert began <= made.created_at == made.updated_at <= datetime.now(UTC)
    day = timedelta(days=1)
    assert day <= made.next_run_at - made.created_at <= day + timedelta(minutes=5)
    assert program.get(program.instance) == made

    kept = program.update(program.instance, interval="24h", retention={"max_count": 2})
    assert kept.next_run_at == made.next_run_at
    assert (kept.created_at, kept.metadata, kept.name_prefix) == (made.created_at, None, None)
    assert kept.updated_at > made.updated_at
    assert (kept.retention.max_age, kept.retention.max_count) == (None, 2)

    named = program.update(
        program.instance, interval="24h0m0s", retention={"max_count": 2}, metadata={"a": ""}, name_prefix="x"
    )
    assert (named.next_run_at, named.metadata, named.name_prefix) == (made.next_run_at, {"a": ""}, "x")

    often = program.update(program.instance, interval="90m", retention={}, name_prefix=None)
    assert (often.interval, often.name_prefix) == ("1h30m", None)
    until = often.next_run_at - often.updated_at
    assert timedelta(minutes=90) <= until <= timedelta(minutes=95)
    assert often.created_at == made.created_at

    program.delete(program.instance)
    refused(program, hypeman.NotFoundError, lambda: program.get(program.instance))
    refused(program, hypeman.NotFoundError, lambda: program.delete(program.instance))


def test_what_cannot_be_is_refused_at_once_and_never_retried(program: Program) -> None:
    good: dict[str, Any] = {"interval": "24h", "retention": {"max_count": 1}}
    told = refused(
        program, hypeman.BadRequestError, lambda: program.update(program.instance, **good | {"interval": "1s"})
    )
    assert told == "interval: '1s' is too short: the interval must be at least 1m"
    told = refused(
        program, hypeman.BadRequestError, lambda: program.update(program.instance, interval="24h", retention={"max": 1})
    )
    assert told.startswith("retention.max: unknown key")
    told = refused(program, hypeman.BadRequestError, lambda: program.get("../health"))
    assert told.startswith("id: '../health' must be 1 to 128 of")
    told = refused(program, hypeman.NotFoundError, lambda: program.update("vm-99", **good))
    assert told == "no backend knows an instance 'vm-99'"
    told = refused(program, hypeman.ConflictError, lambda: program.update("managed-1", **good))
    assert told == "the schedule of 'managed-1' is managed by the config file: change it there"
    refused(program, hypeman.ConflictError, lambda: program.delete("managed-1"))
    assert program.get("managed-1").retention.max_count == 3


def test_only_tcp_asks_for_a_token_and_never_for_the_health(program: Program, stranger: Program) -> None:
    assert program.health() == stranger.health() == "ok"
    if "TCP" in program.way:
        told = refused(stranger, hypeman.AuthenticationError, lambda: stranger.get("managed-1"))
        assert told == "a valid token is required"
    else:
        assert stranger.get("managed-1") == program.get("managed-1")


CURL = r"""curl http://localhost:8080/instances/$ID/snapshot-schedule \
    -H "Authorization: Bearer $HYPEMAN_API_KEY"
"""
"""As it stands in Hypeman's documents."""

AS_CURL_SENDS_IT = f"""\
GET /instances/managed-1/snapshot-schedule HTTP/1.1
Host: localhost:8080
User-Agent: curl/7.88.1
Accept: */*
Authorization: Bearer {TOKEN}

"""

AS_GO_SENDS_IT = f"""\
PUT /instances/id/snapshot-schedule HTTP/1.1
Host: localhost:8080
User-Agent: Hypeman/Go 0.28.0
Content-Length: %d
Accept: application/json
Authorization: Bearer {OTHER_TOKEN}
Content-Type: application/json
X-Stainless-Arch: x64
X-Stainless-Lang: go
X-Stainless-Os: Linux
X-Stainless-Package-Version: 0.28.0
X-Stainless-Retry-Count: 0
X-Stainless-Runtime: go
X-Stainless-Runtime-Version: go1.26.8
Accept-Encoding: gzip

"""


def exchange(lab: ServingLab, head: str, body: str = "") -> httpx.Response:
    """The answer to these very bytes."""
    request = head.replace("8080", str(lab.port)).replace("\n", "\r\n") + body
    with socket.create_connection(("localhost", lab.port), timeout=60) as connection:
        connection.sendall(request.encode())
        received = b""
        while b"\r\n\r\n" not in received:
            received += connection.recv(65536)
        top, _, content = received.partition(b"\r\n\r\n")
        status, *lines = top.decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        while len(content) < int(headers["content-length"]):
            content += connection.recv(65536)
    return httpx.Response(int(status.split()[1]), headers=headers, content=content)


def test_the_documented_curl_line_works_word_for_word(lab: ServingLab) -> None:
    answer = exchange(lab, AS_CURL_SENDS_IT)
    assert answer.status_code == 200
    assert answer.json()["instance_id"] == "managed-1"
    if shutil.which("curl"):
        ran = subprocess.run(
            ["bash", "-c", CURL.replace("8080", str(lab.port))],
            env={"ID": "managed-1", "HYPEMAN_API_KEY": TOKEN, "PATH": os.environ["PATH"]},
            capture_output=True,
            check=True,
        )
        assert ran.stdout == answer.content


@pytest.mark.parametrize("body", ['{"interval":"24h"}', '{"interval":"24h","retention":{}}'])
def test_the_documented_go_example_works_with_its_empty_retention(lab: ServingLab, body: str) -> None:
    # Go's client leaves a struct out that has nothing set: the first is what the example really sends.
    answer = exchange(lab, AS_GO_SENDS_IT % len(body), body)
    assert answer.status_code == 200, answer.text
    assert (answer.json()["instance_id"], answer.json()["retention"]) == ("id", {})
    SnapshotSchedule.model_validate_json(answer.content, strict=True)


async def test_the_async_client_works_on_trio_too(lab: ServingLab) -> None:
    async with hypeman.AsyncHypeman(api_key=TOKEN, base_url=lab.url) as client:
        assert (await client.instances.snapshot_schedule.get("managed-1")).instance_id == "managed-1"


def test_no_token_is_in_the_log(program: Program, stranger: Program) -> None:
    program.update(
        "id", interval="24h", retention={}, metadata={"by": program.way}
    )  # one that changes nothing is no news
    with suppress(hypeman.AuthenticationError):
        stranger.get("id")
    name = "laptop" if "TCP" in program.way else "socket"
    until = time.monotonic() + PATIENCE_S
    while f'"client":"{name}"' not in program.lab.log:  # it is written by a thread of its own
        assert time.monotonic() < until, program.lab.log
        time.sleep(0.01)
    assert "0123456789abcdef" in TOKEN
    assert "0123456789abcdef" not in program.lab.log
