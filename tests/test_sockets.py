"""The control socket's file: whose it is, who may come in, and what is never removed."""

import fcntl
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from attrs import evolve

from hypemand.config import ApiConfig, Config
from hypemand.surface.http.sockets import (
    ControlSocket,
    SocketRefusedError,
    open_control_socket,
    short_path,
    socket_path,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "api.sock"


@pytest.fixture
def made(path: Path) -> Iterator[ControlSocket]:
    control = open_control_socket(path)
    yield control
    control.close()


def connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client, short_path(path) as name:
        try:
            client.connect(name)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        return True


def make_stale(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left, short_path(path) as name:
        left.bind(name)
        left.listen()
    assert path.is_socket()
    assert not connects(path)


def test_each_state_directory_has_its_own_socket_and_the_systems_is_in_run() -> None:
    config = Config(Path("/home/me/state"))
    assert socket_path(config) == Path("/home/me/state/api.sock")
    assert socket_path(evolve(config, state_dir=Path("/var/lib/hypemand"))) == Path("/run/hypemand/api.sock")
    assert socket_path(evolve(config, api=ApiConfig(socket=Path("/x/y")))) == Path("/x/y")


@pytest.mark.parametrize("umask", [0o000, 0o077, 0o777])
def test_owner_and_group_alone_may_come_in_whatever_the_umask(umask: int, tmp_path: Path) -> None:
    path = tmp_path / "missing" / "directory" / "api.sock"
    path.parent.parent.mkdir()
    before = os.umask(umask)
    try:
        made = open_control_socket(path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o660
    assert path.parent.stat().st_mode & 0o777 == 0o755
    assert connects(path)
    made.close()


def test_the_directory_that_is_there_keeps_its_mode(tmp_path: Path) -> None:
    folder = tmp_path / "private"
    folder.mkdir(mode=0o700)
    open_control_socket(folder / "api.sock").close()
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_stale_socket_is_replaced(path: Path) -> None:
    make_stale(path)
    made = open_control_socket(path)
    assert connects(path)
    made.close()


def test_a_live_one_never_is_also_when_nobody_accepts_there(path: Path, made: ControlSocket) -> None:
    with pytest.raises(SocketRefusedError, match=r"another program listens at .*: stop it, or set api\.socket"):
        open_control_socket(path)
    assert not made.is_lost()
    assert connects(path)


def test_a_live_one_whose_queue_is_full_never_is(path: Path) -> None:
    waiting = []
    with socket.socket(socket.AF_UNIX) as hanging:
        hanging.bind(str(path))
        hanging.listen(0)
        for _ in range(3):
            client = socket.socket(socket.AF_UNIX)
            client.setblocking(False)
            waiting.append(client)
            try:
                client.connect(str(path))
            except BlockingIOError:
                break
        else:
            pytest.fail("the queue is never full")
        with pytest.raises(SocketRefusedError, match="another program listens"):
            open_control_socket(path)
    for client in waiting:
        client.close()


def test_a_socket_of_another_kind_is_somebodys_too(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslog:
        syslog.bind(str(path))
        with pytest.raises(SocketRefusedError, match="another program listens"):
            open_control_socket(path)
        assert path.is_socket()


@pytest.mark.parametrize("kind", ["file", "folder", "link to a file", "link to nothing", "link to a stale socket"])
def test_what_is_no_socket_is_never_removed(kind: str, path: Path) -> None:
    target = path.with_name("target")
    match kind:
        case "file":
            path.write_text("precious")
        case "folder":
            path.mkdir()
        case "link to a stale socket":
            make_stale(target)
            path.symlink_to(target)
        case _:
            path.symlink_to(target)
            if kind == "link to a file":
                target.write_text("precious")
    before = path.lstat().st_ino, target.exists()
    with pytest.raises(SocketRefusedError, match=r"is no socket and is left alone: move it away, or set api\.socket"):
        open_control_socket(path)
    assert (path.lstat().st_ino, target.exists()) == before


@pytest.mark.parametrize("stale", [True, False])
def test_of_many_that_try_at_once_one_gets_it_and_keeps_it(stale: bool, path: Path) -> None:
    if stale:
        make_stale(path)
    got: list[ControlSocket] = []
    refused: list[SocketRefusedError] = []
    together = threading.Barrier(8)

    def attempt() -> None:
        together.wait()
        try:
            got.append(open_control_socket(path))
        except SocketRefusedError as error:
            refused.append(error)

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = got
    assert len(refused) == 7
    assert not winner.is_lost()
    assert connects(path)
    winner.close()


def test_closed_it_removes_its_file_and_never_that_of_another(path: Path) -> None:
    first = open_control_socket(path)
    path.unlink()
    second = open_control_socket(path)
    assert first.is_lost()
    first.close()
    assert connects(path)
    second.close()
    second.close()
    assert not path.exists()


def test_a_path_may_be_longer_than_the_kernel_takes(tmp_path: Path) -> None:
    path = tmp_path / ("d" * 120) / ("e" * 120) / "api.sock"
    made = open_control_socket(path)
    assert connects(path)
    with pytest.raises(SocketRefusedError, match="another program listens"):
        open_control_socket(path)
    made.close()
    assert not path.exists()
    make_stale(path)
    open_control_socket(path).close()


def test_the_lock_of_somebody_on_the_directory_is_not_waited_for_without_end(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hypemand.surface.http.sockets._LOCK_S", 0.1)
    holder = os.open(path.parent, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    with pytest.raises(SocketRefusedError, match="is locked by another program"):
        open_control_socket(path)
    os.close(holder)
    open_control_socket(path).close()


def test_no_child_process_inherits_it(made: ControlSocket) -> None:
    assert not made.socket.get_inheritable()
