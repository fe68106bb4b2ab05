"""The API's doors and connections: what clients do wrong, or on purpose, over real sockets and against small apps."""

import random
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from structlog.typing import EventDict

from hypemand.surface.http.connection import Limits
from hypemand.surface.http.serving import Serving, open_tcp
from tests.processes import PATIENCE_S, wait_until
from tests.talking import Answer, answer, ask, connect, free_port, head, rest

TLS = Path(__file__).parent / "tls"
HEAD_BYTES = Limits().head_bytes
Handler = Callable[[Request], Awaitable[str]]


def app_of(handler: Handler) -> ASGIApp:
    """An app that answers every request with the text that *handler* makes of it."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        text = await handler(Request(scope, receive))
        await PlainTextResponse(text)(scope, receive, send)

    return app


async def say_path(request: Request) -> str:
    return request.url.path


HELLO = app_of(say_path)


@asynccontextmanager
async def serving(path: Path, app: ASGIApp = HELLO, *, retry_s: float = 0.02, **more: Any) -> AsyncIterator[Serving]:
    """Served at *path* within the block."""
    api = Serving(path=path, socket_app=app, retry_s=retry_s, **more)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(api.serve)
        yield api
        nursery.cancel_scope.cancel()
    assert api.over.is_set()


@asynccontextmanager
async def served(path: Path, app: ASGIApp = HELLO, **more: Any) -> AsyncIterator[Serving]:
    """The same, once it listens."""
    async with serving(path, app, **more) as api:
        await wait_until(path.is_socket, "socket made")
        if api.listen is not None:
            await listening(int(api.listen.rpartition(":")[2]))
        yield api


async def listening(port: int) -> None:
    """Wait until somebody listens at *port*."""
    with trio.fail_after(PATIENCE_S):
        while True:
            try:
                await (await connect(port)).aclose()
            except OSError:
                await trio.sleep(0.02)
            else:
                return


def nothing_worse_than_info(log: list[EventDict]) -> bool:
    return all(line["log_level"] in {"debug", "info"} for line in log)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "api.sock"


# Requests.


async def test_requests_are_answered_one_after_another_on_one_connection(path: Path) -> None:
    async with served(path), await connect(path) as client:
        for each in ("/a", "/b"):
            await client.send_all(head("GET", each))
            assert (await answer(client)).body == each.encode()
        await client.send_all(head("GET", "/c") + head("GET", "/d") + head("GET", "/e", "Connection: close"))
        assert [(await answer(client)).body for _ in range(3)] == [b"/c", b"/d", b"/e"]
        assert await rest(client) == b""


async def test_no_header_tells_what_serves(path: Path) -> None:
    async with served(path):
        given = await ask(path)
        assert (await ask(path, "/x", "Upgrade: h2c")).status == 200
    assert given.status == 200
    assert set(given.headers) == {"content-length", "content-type", "date"}


@pytest.mark.parametrize(
    "upgrade",
    [
        ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__"),
        ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", f"Sec-WebSocket-Key: {'A' * 22}=="),
    ],
    ids=["h2c", "websocket"],
)
async def test_an_upgrade_is_not_taken_and_the_request_is_answered_all_the_same(
    upgrade: tuple[str, ...], path: Path
) -> None:
    async with served(path):
        given = await ask(path, "/plain", *upgrade)
    assert (given.status, given.body) == (200, b"/plain")


GARBAGE = {
    "TLS": (b"\x16\x03\x01\x02\x00" + bytes(512) + b"\r\n\r\n", 400),
    "no HTTP": (b"hello\r\n\r\n", 400),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two lengths": (head("PUT", "/", "Content-Length: 3", "Content-Length: 4") + b"abc", 400),
    "chunk without a size": (head("PUT", "/", "Transfer-Encoding: chunked") + b"zz\r\n", 400),
    "a coding that nobody knows": (head("PUT", "/", "Transfer-Encoding: gzip"), 501),
    "endless header": (head("GET", "/", "A: " + "a" * 100_000), 431),
    "endless path": (head("GET", "/" + "a" * 100_000), 431),
    "long header, whole": (head("GET", "/", "A: " + "a" * HEAD_BYTES), 431),
    "many headers, whole": (head("PUT", "/", *["A: a"] * (HEAD_BYTES // 6), "Content-Length: 3") + b"abc", 431),
}


@pytest.mark.parametrize("case", GARBAGE)
async def test_what_is_no_request_is_refused_in_json_and_is_no_news(
    case: str, path: Path, heard_log: list[EventDict]
) -> None:
    async def whole_body(request: Request) -> str:
        return str(len(await request.body()))

    data, status = GARBAGE[case]
    async with served(path, app_of(whole_body)), await connect(path) as client:
        await client.send_all(data)
        given = await answer(client)
        assert await rest(client) == b""
    assert given.status == status
    assert given.json["code"] == "invalid_request"
    assert given.headers["connection"] == "close"
    assert nothing_worse_than_info(heard_log)


async def test_an_app_that_fails_is_one_bad_answer_and_told_in_the_log(path: Path, heard_log: list[EventDict]) -> None:
    async def fail(request: Request) -> str:
        if request.url.path == "/bad":
            raise ValueError("inner detail")
        return "good"

    async with served(path, app_of(fail)):
        bad = await ask(path, "/bad")
        good = await ask(path, "/good")
    assert (bad.status, bad.body) == (500, b"")
    assert (good.status, good.body) == (200, b"good")
    assert [line["path"] for line in heard_log if line["event"] == "request failed"] == ["/bad"]


async def test_requests_are_told_on_level_debug_without_query_and_headers(
    path: Path, heard_log: list[EventDict]
) -> None:
    async with served(path):
        await ask(path, "/here?secret=1", "Authorization: Bearer secret")
        await wait_until(lambda: any(line["event"] == "request" for line in heard_log), "request in the log")
    (line,) = [line for line in heard_log if line["event"] == "request"]
    assert (line["log_level"], line["method"], line["path"], line["status"]) == ("debug", "GET", "/here", 200)
    assert "secret" not in str(heard_log)


# Clients that take their time.


@pytest.mark.parametrize("sent", [b"GET / HTT", head("GET", "/")[:-2]], ids=["in the first line", "before the end"])
async def test_a_head_that_never_ends_is_given_up_also_when_it_trickles(sent: bytes, path: Path) -> None:
    async with served(path, limits=Limits(head_s=0.3)), await connect(path) as client, trio.open_nursery() as nursery:

        async def trickle() -> None:
            await client.send_all(sent)
            while True:
                await client.send_all(b"x")
                await trio.sleep(0.05)

        nursery.start_soon(_until_broken, trickle)
        given = await answer(client)
        assert await rest(client) == b""
        nursery.cancel_scope.cancel()
    assert (given.status, given.json["code"]) == (408, "invalid_request")


async def _until_broken(work: Callable[[], Awaitable[None]]) -> None:
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        await work()


async def test_a_body_that_never_ends_is_given_up_and_the_app_is_told(path: Path, heard_log: list[EventDict]) -> None:
    ended: list[str] = []

    async def read(request: Request) -> str:
        with suppress(ClientDisconnect):
            await request.body()
        ended.append("yes")
        return "an answer too late"

    async with served(path, app_of(read), limits=Limits(body_s=0.3)), await connect(path) as client:
        await client.send_all(head("PUT", "/", "Content-Length: 100") + b"some")
        given = await answer(client)
        assert await rest(client) == b""
        await wait_until(lambda: ended, "app told")
    assert given.status == 408
    assert nothing_worse_than_info(heard_log)


async def test_a_client_that_says_nothing_is_sent_away_without_a_word(path: Path) -> None:
    async with served(path, limits=Limits(idle_s=0.2)):
        async with await connect(path) as client:
            assert await rest(client) == b""
        async with await connect(path) as client:
            await client.send_all(head())
            assert (await answer(client)).status == 200
            assert await rest(client) == b""


async def test_a_client_that_does_not_read_its_answer_holds_nothing_up(path: Path) -> None:
    ended: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await PlainTextResponse("x" * 16 * 1024**2)(scope, receive, send)
        finally:
            ended.append(scope["path"])

    async with served(path, app, limits=Limits(send_s=0.2)) as api, await connect(path) as client:
        await client.send_all(head())
        await wait_until(lambda: ended, "app let go")
        api.stop()
        with trio.fail_after(PATIENCE_S):
            await api.over.wait()
    assert ended == ["/health"]


async def test_an_answer_may_take_longer_than_a_request(path: Path) -> None:
    async def think(request: Request) -> str:
        await trio.sleep(0.3)
        return "thought"

    limits = Limits(idle_s=0.1, head_s=0.1, body_s=0.1, handshake_s=0.1)
    async with served(path, app_of(think), limits=limits), await connect(path) as client:
        await client.send_all(head() + head())  # the second one lies in wait meanwhile
        assert [(await answer(client)).body for _ in range(2)] == [b"thought"] * 2


async def test_a_body_nobody_reads_is_not_held_and_does_not_hide_the_answer(path: Path) -> None:
    taken = 0

    async def refuse(request: Request) -> str:
        return "no"

    async with served(path, app_of(refuse), limits=Limits(linger_s=0.5)), await connect(path) as client:
        given: list[Answer] = []
        async with trio.open_nursery() as nursery:

            async def listen() -> None:
                given.append(await answer(client))

            nursery.start_soon(listen)
            await client.send_all(head("PUT", "/", "Transfer-Encoding: chunked"))
            try:
                while taken < 64 * 1024**2:
                    await client.send_all(b"10000\r\n" + bytes(0x10000) + b"\r\n")
                    taken += 0x10000
            except trio.BrokenResourceError:
                pass
    assert given[0].body == b"no"
    assert taken < 8 * 1024**2


# Clients that leave.


async def test_what_a_client_asked_for_is_done_although_it_left(path: Path) -> None:
    begun, go_on, done = trio.Event(), trio.Event(), trio.Event()

    async def work(request: Request) -> str:
        begun.set()
        await go_on.wait()
        done.set()
        return "done"

    async with served(path, app_of(work)):
        client = await connect(path)
        await client.send_all(head("PUT", "/", "Content-Length: 0"))
        with trio.fail_after(PATIENCE_S):
            await begun.wait()
            await client.aclose()
            assert (await _many(path, 3, app_waits=go_on)) == 3
            await done.wait()
    assert done.is_set()


async def _many(path: Path, number: int, app_waits: trio.Event) -> int:
    """Others come in meanwhile."""
    clients = [await connect(path) for _ in range(number)]
    app_waits.set()
    for client in clients:
        await client.aclose()
    return len(clients)


async def test_who_says_no_more_but_listens_gets_an_answer(path: Path) -> None:
    async def think(request: Request) -> str:
        await trio.sleep(0.1)
        return "here"

    async with served(path, app_of(think)), await connect(path) as client:
        await client.send_all(head())
        await client.send_eof()
        assert (await answer(client)).body == b"here"
        assert await rest(client) == b""


async def test_a_client_that_breaks_off_in_its_body_is_no_news(path: Path, heard_log: list[EventDict]) -> None:
    ended: list[str] = []

    async def read(request: Request) -> str:
        try:
            return str(await request.body())
        finally:
            ended.append("yes")

    async with served(path, app_of(read)):
        for _ in range(3):
            async with await connect(path) as client:
                await client.send_all(head("PUT", "/", "Content-Length: 100") + b"some")
                await trio.sleep(0.02)
        await wait_until(lambda: len(ended) == 3, "apps told")
    assert nothing_worse_than_info(heard_log)


async def test_clients_that_break_off_and_spoil_what_they_say_anywhere_are_no_news(
    path: Path, heard_log: list[EventDict]
) -> None:
    chance = random.Random(1)  # the same each time
    whole = [
        head("PUT", "/", "Content-Length: 20") + b"twenty bytes or less",
        head("PUT", "/", "Transfer-Encoding: chunked") + b"5\r\nabcde\r\n0\r\n\r\n",
        head("GET", "/", "Connection: close"),
        head(),
    ]

    async def one_after_another() -> None:
        for _ in range(60):
            said = bytearray(b"".join(chance.choices(whole, k=4)))
            for _ in range(chance.randrange(4)):
                said[chance.randrange(len(said))] = chance.randrange(256)
            async with await connect(path) as client:
                with trio.move_on_after(0.02), suppress(trio.BrokenResourceError):
                    await client.send_all(said[: chance.randrange(len(said))])
                    if chance.random() < 0.5:
                        await client.send_eof()
                    await client.receive_some(chance.randrange(1, 1000))

    async with served(path):
        async with trio.open_nursery() as clients:
            for _ in range(8):
                clients.start_soon(one_after_another)
        assert (await ask(path)).status == 200
    assert nothing_worse_than_info(heard_log)


# More of them than there is room for.


async def test_who_is_idle_the_longest_makes_room_and_who_waits_for_an_answer_stays(path: Path) -> None:
    begun, go_on = trio.Event(), trio.Event()

    async def work(request: Request) -> str:
        if request.url.path == "/slow":
            begun.set()
            await go_on.wait()
        return request.url.path

    async with served(path, app_of(work), limits=Limits(connections=4, settle_s=0)):
        busy = await connect(path)
        await busy.send_all(head("GET", "/slow"))
        with trio.fail_after(PATIENCE_S):
            await begun.wait()
        idle = [await connect(path) for _ in range(40)]
        for client in idle[:-3]:
            assert await rest(client) == b""
        assert (await ask(path, "/new")).body == b"/new"
        go_on.set()
        assert (await answer(busy)).body == b"/slow"
        for client in (busy, *idle):
            await client.aclose()


async def test_where_all_wait_for_answers_the_next_one_waits_for_the_first_of_them(path: Path) -> None:
    begun: list[str] = []
    go_on = {"/a": trio.Event(), "/b": trio.Event()}

    async def work(request: Request) -> str:
        begun.append(request.url.path)
        if request.url.path in go_on:
            await go_on[request.url.path].wait()
        return request.url.path

    async with (
        served(path, app_of(work), limits=Limits(connections=2, settle_s=0)),
        await connect(path) as first,
        await connect(path) as second,
    ):
        await first.send_all(head("GET", "/a"))
        await second.send_all(head("GET", "/b"))
        await wait_until(lambda: len(begun) == 2, "two begun")
        async with await connect(path) as third:
            await third.send_all(head("GET", "/c"))
            await trio.sleep(0.1)
            assert "/c" not in begun
            go_on["/b"].set()
            assert (await answer(third)).body == b"/c"
        go_on["/a"].set()
        assert (await answer(first)).body == b"/a"


async def test_a_crowd_that_behaves_is_served_without_anybody_sent_away(path: Path) -> None:
    given: list[bytes] = []

    async def come(number: int) -> None:
        given.append((await ask(path, f"/{number}")).body)

    async with served(path, limits=Limits(connections=4)), trio.open_nursery() as crowd:
        for number in range(60):
            crowd.start_soon(come, number)
    assert sorted(given) == sorted(f"/{number}".encode() for number in range(60))


# The end.


async def test_at_the_end_nobody_comes_in_idle_ones_go_and_an_answer_is_still_given(path: Path) -> None:
    begun, go_on = trio.Event(), trio.Event()

    async def work(request: Request) -> str:
        begun.set()
        await go_on.wait()
        return "last"

    async with served(path, app_of(work)) as api:
        busy, idle = await connect(path), await connect(path)
        await busy.send_all(head())
        with trio.fail_after(PATIENCE_S):
            await begun.wait()
        api.stop()
        assert await rest(idle) == b""
        assert not path.exists()
        assert not api.over.is_set()
        go_on.set()
        assert (await answer(busy)).body == b"last"
        assert await rest(busy) == b""
        with trio.fail_after(PATIENCE_S):
            await busy.aclose()
            await api.over.wait()
        await idle.aclose()


async def test_stopped_before_it_serves_it_lets_nobody_in(path: Path) -> None:
    api = Serving(path=path, socket_app=HELLO)
    api.stop()
    with trio.fail_after(PATIENCE_S):
        await api.serve()
    assert api.over.is_set()
    assert not path.exists()


# Doors that can't be opened.


async def test_a_path_that_is_taken_is_told_once_and_tried_until_it_is_free(
    path: Path, heard_log: list[EventDict]
) -> None:
    path.write_text("precious")
    async with serving(path):
        await trio.sleep(0.2)
        errors = [line for line in heard_log if line["log_level"] == "error"]
        assert len(errors) == 1
        assert "is no socket and is left alone: move it away, or set api.socket" in errors[0]["error"]
        assert path.read_text() == "precious"
        path.unlink()
        await wait_until(path.is_socket, "socket made")
        assert (await ask(path)).status == 200


async def test_a_socket_that_somebody_removes_is_made_again(path: Path, heard_log: list[EventDict]) -> None:
    async with served(path):
        path.unlink()
        await wait_until(path.is_socket, "socket made again")
        assert (await ask(path)).status == 200
    assert not path.exists()
    assert [line["log_level"] for line in heard_log if "making it again" in line["event"]] == ["warning"]


async def test_a_port_in_use_is_told_and_taken_once_it_is_free(path: Path, heard_log: list[EventDict]) -> None:
    holder = socket.create_server(("127.0.0.1", 0))
    port = holder.getsockname()[1]
    async with serving(path, listen=f"127.0.0.1:{port}", tcp_app=HELLO) as api:
        await wait_until(lambda: [line for line in heard_log if line["log_level"] == "error"], "told")
        assert (await ask(path)).status == 200  # the other door is open
        assert ["another program listens" in why for why in api.unreachable.values()] == [True]
        holder.close()
        await listening(port)
        assert (await ask(port)).status == 200
        assert not api.unreachable
    (told,) = [line for line in heard_log if line["log_level"] == "error"]
    assert (told["at"], "another program listens" in told["error"]) == (f"127.0.0.1:{port}", True)


async def test_localhost_is_every_address_of_it_that_this_machine_has() -> None:
    port = free_port()
    listeners = await open_tcp(f"localhost:{port}")
    try:
        addresses = {listener.getsockname()[0] for listener in listeners}
    finally:
        for listener in listeners:
            listener.close()
    assert "127.0.0.1" in addresses
    assert addresses <= {"127.0.0.1", "::1"}


async def test_an_address_of_another_machine_is_refused_by_name() -> None:
    with pytest.raises(OSError, match="Cannot assign requested address"):
        await open_tcp(f"192.0.2.1:{free_port()}")


# TLS.


def server_tls() -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(TLS / "cert.pem", TLS / "key.pem")
    return context


async def tls_client(port: int) -> trio.SSLStream[trio.SocketStream]:
    context = ssl.create_default_context(cafile=TLS / "cert.pem")
    return trio.SSLStream(await connect(port), context, server_hostname="localhost", https_compatible=True)


async def test_with_tls_requests_are_answered_and_who_speaks_none_is_sent_away(
    path: Path, heard_log: list[EventDict]
) -> None:
    port, context = free_port(), server_tls()
    limits = Limits(handshake_s=0.3)
    async with served(path, listen=f"127.0.0.1:{port}", tcp_app=HELLO, tls=lambda: context, limits=limits):
        async with await connect(port) as plain:
            await plain.send_all(head())
            assert b"HTTP" not in await rest(plain)
        async with await connect(port) as silent:
            assert await rest(silent) == b""
        async with await tls_client(port) as client:
            for each in ("/a", "/b"):
                await client.send_all(head("GET", each))
                assert (await answer(client)).body == each.encode()
            await client.send_all(head("PUT", "/", "Content-Length: 100000") + bytes(50000))
            assert (await answer(client)).body == b"/"
            assert await rest(client) == b""
    assert nothing_worse_than_info(heard_log)
