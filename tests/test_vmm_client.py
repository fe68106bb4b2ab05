"""Connections to a VMM: lost, cut, kept, replaced; and what is never asked twice."""

import socket as sockets
from pathlib import Path

import pytest
import trio

from hypemand.backends.base import BackendUnavailable
from hypemand.core.model import InstanceState
from tests.vmm_backend import captured, connect, frozen, opened, published, request, run_of, running
from tests.vmm_guest import CLOUD_HYPERVISOR, FIRECRACKER, KINDS, running_guest

both = pytest.mark.parametrize("kind", KINDS)


@both
@pytest.mark.parametrize("cut", ["before", "after", "answer"])
async def test_a_question_whose_answer_is_lost_is_asked_again(kind: str, cut: str, tmp_path: Path) -> None:
    async with running(kind, tmp_path) as (guest, backend):
        guest.fail_look(cut=cut)
        assert (await backend.state(guest.instance_id)).state is InstanceState.RUNNING
        guest.fail_look(cut=cut, times=2)
        with pytest.raises(BackendUnavailable, match="connection broke"):
            await backend.state(guest.instance_id)


@both
@pytest.mark.parametrize("cut", ["before", "after", "answer"])
async def test_a_save_whose_answer_is_lost_fails_and_is_never_asked_for_twice(
    kind: str, cut: str, tmp_path: Path
) -> None:
    async with running(kind, tmp_path) as (guest, backend):
        guest.fail_save(cut=cut, status=500 if cut == "answer" else None, body="x" * 100)
        with pytest.raises(BackendUnavailable, match="connection broke"):
            await captured(backend, guest)
        assert guest.saves() == (cut != "before")
        assert guest.state() == "Running"
        assert (await backend.settle(run_of(backend, guest), ours=False)).snapshot is None
        assert list((tmp_path / "catalog").glob("*/.*")) == []
        assert (await published(backend, guest, request("run-2"))).id == "run-2"


@both
@pytest.mark.parametrize("cut", ["before", "after", "answer"])
async def test_a_pause_whose_answer_is_lost_may_have_taken_hold_and_is_undone(
    kind: str, cut: str, tmp_path: Path
) -> None:
    async with running(kind, tmp_path) as (guest, backend):
        guest.fail_pause(cut=cut, status=500 if cut == "answer" else None, body="x" * 100)
        with pytest.raises(BackendUnavailable, match="connection broke"):
            await frozen(backend, guest)
        await backend.resume(guest.instance_id)
        assert await guest.ticks()


@both
async def test_a_connection_that_the_vmm_closed_meanwhile_fails_no_capture(kind: str, tmp_path: Path) -> None:
    look = "GET /api/v1/vm.info" if kind == CLOUD_HYPERVISOR else "GET /"
    async with running(kind, tmp_path) as (guest, backend):
        guest.fail({"request": look, "close": True, "times": 100})
        for number in range(3):
            await published(backend, guest, request(f"run-{number}"))
        assert guest.saves() == 3


@both
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ({"raw": "this is no HTTP\r\n\r\n", "times": 2}, "connection broke"),
        ({"raw": 'HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n{"no"'}, "no JSON"),
        ({"raw": "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]"}, ""),
        ({"huge": 9 << 20}, "more than 8 MiB"),
        ({"raw": "HTTP/1.1 200 OK\r\n\r\n" + "x" * (9 << 20)}, "more than 8 MiB"),
    ],
)
async def test_an_answer_that_makes_no_sense_is_no_state(
    kind: str, fault: dict[str, object], told: str, tmp_path: Path
) -> None:
    async with running(kind, tmp_path) as (guest, backend):
        guest.fail_look(**fault)
        if told:
            with pytest.raises(BackendUnavailable, match=told):
                await backend.state(guest.instance_id)
        else:
            assert (await backend.state(guest.instance_id)).state is InstanceState.UNKNOWN
        assert (await backend.state(guest.instance_id)).state is InstanceState.RUNNING


@both
async def test_an_answer_without_an_end_is_not_read_for_ever(kind: str, tmp_path: Path) -> None:
    async with running(kind, tmp_path) as (guest, backend):
        guest.fail_look(endless=True)
        with trio.fail_after(30), pytest.raises(BackendUnavailable, match="more than 8 MiB"):
            await backend.state(guest.instance_id)
        assert (await backend.state(guest.instance_id)).state is InstanceState.RUNNING


@both
async def test_nothing_stays_open_between_questions(kind: str, tmp_path: Path) -> None:
    async with running(kind, tmp_path) as (guest, backend):
        await backend.state(guest.instance_id)
        before = len(list(Path("/proc/self/fd").iterdir()))
        for _ in range(5):
            await backend.state(guest.instance_id)
        await published(backend, guest)
        assert len(list(Path("/proc/self/fd").iterdir())) <= before
        with trio.fail_after(10):
            while connections(guest.socket):
                await trio.sleep(0.01)
        assert guest.state() == "Running"


def connections(socket: Path) -> list[str]:
    """Connections to *socket* that its process has accepted."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    return [line for line in lines if line.endswith(f" {socket}") and line.split()[5] == "03"]


@both
async def test_a_cancelled_question_closes_its_connection(kind: str, tmp_path: Path) -> None:
    async with running(kind, tmp_path) as (guest, backend):
        guest.fail_look(wait_s=0.3)
        with trio.move_on_after(0.1) as scope:
            await backend.state(guest.instance_id)
        assert scope.cancelled_caught
        assert (await backend.state(guest.instance_id)).state is InstanceState.RUNNING
        with trio.fail_after(10):
            while len(connections(guest.socket)) > 1:
                await trio.sleep(0.01)


@both
async def test_a_cancelled_pause_is_over_before_the_guest_is_resumed(kind: str, tmp_path: Path) -> None:
    async with running(kind, tmp_path) as (guest, backend):
        guest.fail_pause(wait_s=0.3)
        with trio.move_on_after(0.1) as scope:
            await frozen(backend, guest)
        assert scope.cancelled_caught
        await backend.resume(guest.instance_id)
        assert await guest.ticks()
        assert guest.state() == "Running"


@both
async def test_a_cancelled_save_is_over_before_the_guest_is_resumed(kind: str, tmp_path: Path) -> None:
    async with running(kind, tmp_path, save_s=0.4) as (guest, backend):
        asked = await frozen(backend, guest)
        with trio.move_on_after(0.1):
            await backend.capture(guest.instance_id, asked)
        await backend.resume(guest.instance_id)
        assert guest.saves() == 1  # the answer to the resume came after it
        assert await guest.ticks()
        assert (await backend.settle(run_of(backend, guest), ours=False)).snapshot is None
        assert list((tmp_path / "catalog").glob("*/.*")) == []


@both
async def test_a_vmm_that_hangs_holds_up_no_other(kind: str, tmp_path: Path) -> None:
    async with (
        running_guest(kind, tmp_path / "a", socket=tmp_path / "web-1.sock") as hung,
        running_guest(kind, tmp_path / "b", instance_id="web-2", socket=tmp_path / "web-2.sock") as other,
        opened(hung, tmp_path) as backend,
        trio.open_nursery() as nursery,
    ):
        hung.fail_look(wait_s=3600)
        for _ in range(20):
            nursery.start_soon(backend.state, hung.instance_id)
        with trio.fail_after(20):
            await published(backend, other)
        nursery.cancel_scope.cancel()
    assert other.saves() == 1


@both
async def test_a_socket_path_of_any_length_is_reached(kind: str, tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    async with running_guest(kind, tmp_path) as guest:
        guest.socket.rename(deep / guest.socket.name)
        guest.socket = deep / guest.socket.name
        async with opened(guest, tmp_path) as backend:
            assert (await backend.state(guest.instance_id)).state is InstanceState.RUNNING
            assert (await published(backend, guest, request("run-2"))).id == "run-2"
        guest.socket.rename(guest.away.with_suffix(".sock"))


@both
async def test_another_vmm_under_the_same_name_is_the_one_that_is_asked(kind: str, tmp_path: Path) -> None:
    async with running(kind, tmp_path / "old") as (old, backend):
        assert (await backend.state(old.instance_id)).state is InstanceState.RUNNING
        old.socket.rename(old.away)
        async with running_guest(kind, tmp_path / "new", socket=old.socket) as new:
            new.pause()
            assert (await backend.state(old.instance_id)).state is InstanceState.PAUSED
            new.socket.unlink()
        old.away.rename(old.socket)
        assert (await backend.state(old.instance_id)).state is InstanceState.RUNNING


@both
async def test_a_vmm_that_ends_while_its_guest_stands_still_leaves_nothing_to_resume(kind: str, tmp_path: Path) -> None:
    async with running(kind, tmp_path) as (guest, backend):
        await frozen(backend, guest)
        await guest.kill()
        await backend.resume(guest.instance_id)  # its end was seen: this is no guess
        assert (await backend.settle(run_of(backend, guest), ours=True)).resumed is False
        other = connect(guest, tmp_path)
        with pytest.raises(BackendUnavailable, match="left over"):
            await other.resume(guest.instance_id)
        await other.aclose()


@pytest.mark.parametrize("kind", [FIRECRACKER])
async def test_a_socket_that_may_not_be_opened_says_what_it_takes(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    async with running(kind, tmp_path) as (guest, backend):
        monkeypatch.setattr(trio, "open_unix_socket", refused)
        with pytest.raises(BackendUnavailable, match="takes the right to write to it"):
            await backend.state(guest.instance_id)


@both
async def test_something_that_listens_and_is_no_vmm_is_unavailable(kind: str, tmp_path: Path) -> None:
    async with running_guest(kind, tmp_path) as guest:
        pass
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as listener:
        guest.socket.parent.mkdir()
        listener.bind(str(guest.socket))
        listener.listen(0)
        async with opened(guest, tmp_path) as backend:
            with trio.move_on_after(0.2) as scope:
                await backend.state(guest.instance_id)
            assert scope.cancelled_caught  # time limits are the caller's
        guest.socket.unlink()
        guest.socket.parent.rmdir()
