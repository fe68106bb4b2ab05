"""Sockets of the service manager: what is taken, what is refused, and that nothing of them is removed."""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from starlette.responses import PlainTextResponse
from structlog.typing import EventDict

from hypemand.surface.http import inherited as inherited_module
from hypemand.surface.http.inherited import Inherited, take_inherited
from hypemand.surface.http.serving import Serving, open_tcp
from tests.processes import PATIENCE_S
from tests.talking import ask


@pytest.fixture
def made(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "api.sock"))
        listener.listen()
        yield listener


@pytest.fixture
def tcp() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener


def environ(count: int, **more: str) -> dict[str, str]:
    return {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(count), "LISTEN_FDNAMES": "a:b", **more}


def first(monkeypatch: pytest.MonkeyPatch, *descriptors: int) -> None:
    """Have *descriptors* handed over; they are in a row, as the real ones are."""
    assert list(descriptors) == list(range(descriptors[0], descriptors[0] + len(descriptors)))
    monkeypatch.setattr(inherited_module, "_FIRST", descriptors[0])


def in_a_row(*sockets: socket.socket) -> list[int]:
    return [os.dup2(one.fileno(), 200 + number) for number, one in enumerate(sockets)]


def test_what_is_another_process_s_is_left_alone() -> None:
    told = environ(1, LISTEN_PID="1")
    assert take_inherited(told).sockets == []
    assert told == {}
    assert take_inherited({}).sockets == []


def test_a_control_socket_is_taken_and_stays_when_it_is_closed(
    tmp_path: Path, made: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    first(monkeypatch, *in_a_row(made))
    inherited = take_inherited(environ(1))
    assert not os.get_inheritable(200)
    assert inherited.take_control_socket(tmp_path / "other.sock") is None
    taken = inherited.take_control_socket(tmp_path / "api.sock")
    assert taken is not None
    assert not taken.is_lost()
    taken.close()
    assert taken.socket.fileno() == -1
    assert (tmp_path / "api.sock").is_socket()
    again = inherited.take_control_socket(tmp_path / "api.sock")
    assert again is not None
    again.close()
    (tmp_path / "api.sock").rename(tmp_path / "moved.sock")
    (tmp_path / "api.sock").touch()
    assert inherited.take_control_socket(tmp_path / "api.sock") is None
    inherited.close()


def test_a_path_through_a_link_is_the_same(
    tmp_path: Path, made: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").symlink_to(tmp_path)
    taken = Inherited([made]).take_control_socket(tmp_path / "run" / "api.sock")
    assert taken is not None
    assert taken.path == tmp_path / "run" / "api.sock"
    taken.close()


def test_one_whose_file_is_gone_is_closed_for_nobody_finds_it(tmp_path: Path, made: socket.socket) -> None:
    (tmp_path / "api.sock").unlink()
    inherited = Inherited([made])
    assert inherited.take_control_socket(tmp_path / "api.sock") is None
    assert made.fileno() == -1
    assert inherited.sockets == []


async def test_tcp_is_taken_where_the_config_listens_there(tcp: socket.socket) -> None:
    port = tcp.getsockname()[1]
    inherited = Inherited([tcp])
    (listener,) = await open_tcp(f"localhost:{port}", inherited)
    assert listener.getsockname() == tcp.getsockname()
    assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert inherited.sockets == []
    listener.close()


async def test_tcp_elsewhere_is_refused_and_told_of(tcp: socket.socket, heard_log: list[EventDict]) -> None:
    inherited = Inherited([tcp])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    for listener in await open_tcp(f"127.0.0.1:{free}", inherited):
        listener.close()
    place = "{}:{}".format(*tcp.getsockname())
    inherited.refuse_rest()
    assert tcp.fileno() == -1
    assert [line["at"] for line in heard_log] == [place]


def test_a_descriptor_that_is_not_there_is_told_of(heard_log: list[EventDict], monkeypatch: pytest.MonkeyPatch) -> None:
    first(monkeypatch, 200)
    assert take_inherited(environ(1)).sockets == []
    assert [line["descriptor"] for line in heard_log] == [200]


@pytest.mark.parametrize("kind", ["datagrams", "not listening", "no socket"])
def test_what_is_no_socket_that_listens_is_told_of(
    kind: str, tmp_path: Path, heard_log: list[EventDict], monkeypatch: pytest.MonkeyPatch
) -> None:
    makers: dict[str, Callable[[], Any]] = {
        "datagrams": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM),
        "not listening": socket.socket,
        "no socket": lambda: (tmp_path / "file").open("wb"),
    }
    opened = makers[kind]()
    with opened:
        first(monkeypatch, *in_a_row(opened))
        assert take_inherited(environ(1)).sockets == []
    assert len(heard_log) == 1
    assert heard_log[0]["descriptor"] == 200
    if kind == "no socket":
        os.close(200)
    else:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(200)


async def test_they_are_served_again_after_the_api_has_failed(
    tmp_path: Path, made: socket.socket, tcp: socket.socket
) -> None:
    port = tcp.getsockname()[1]
    inherited = Inherited([made.dup(), tcp.dup()])
    api = Serving(
        path=tmp_path / "api.sock",
        socket_app=PlainTextResponse("here"),
        listen=f"127.0.0.1:{port}",
        tcp_app=PlainTextResponse("there"),
        inherited=inherited,
        retry_s=0.02,
    )
    with trio.fail_after(PATIENCE_S), contextlib.closing(inherited):
        for _ in range(2):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(api.serve)
                assert (await ask(tmp_path / "api.sock")).body == b"here"
                assert (await ask(port)).body == b"there"
                assert api.unreachable == {}
                nursery.cancel_scope.cancel()


async def test_the_loop_can_accept_from_it(tmp_path: Path, made: socket.socket) -> None:
    taken = Inherited([made]).take_control_socket(tmp_path / "api.sock")
    assert taken is not None
    listener = trio.socket.from_stdlib_socket(taken.socket)
    with trio.fail_after(10):
        async with await trio.open_unix_socket(tmp_path / "api.sock") as client:
            accepted, _ = await listener.accept()
            with accepted:
                await client.send_all(b"x")
                assert await accepted.recv(1) == b"x"
    listener.close()
