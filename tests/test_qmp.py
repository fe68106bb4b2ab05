import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from itertools import pairwise
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from hypemand.backends import qmp
from hypemand.backends.base import BackendUnavailable
from hypemand.backends.qemu.jobs import finished

GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 22}, "package": ""}, "capabilities": ["oob"]}}
STOP = {"event": "STOP", "timestamp": {"seconds": 1_795_306_329, "microseconds": 868_947}}

Script = Callable[["Peer"], Awaitable[None]]


class Peer:
    """QEMU's end of a connection."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._reader = qmp.MessageReader()

    async def say(self, *messages: object) -> None:
        await self.stream.send_all(b"".join(json.dumps(message).encode() + b"\r\n" for message in messages))

    async def hear(self) -> dict[str, object]:
        while (message := self._reader.next_message()) is None:
            if not (data := await self.stream.receive_some()):
                raise EOFError
            self._reader.feed(data)
        return message

    async def greet(self) -> None:
        await self.say(GREETING)
        await self.say({"return": {}, "id": (await self.hear())["id"]})


@asynccontextmanager
async def fake_monitor(directory: Path, script: Script) -> AsyncIterator[Path]:
    """A socket behind which *script* plays QEMU for every client, one after the other."""
    path = directory / "qmp.sock"
    with trio.socket.socket(trio.socket.AF_UNIX) as listener:
        await listener.bind(str(path))
        listener.listen(1)

        async def serve() -> None:
            while True:
                stream = trio.SocketStream((await listener.accept())[0])
                with stream.socket, suppress(EOFError, trio.BrokenResourceError):
                    await script(Peer(stream))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            yield path
            nursery.cancel_scope.cancel()


def read_all(stream: bytes, cuts: list[int]) -> list[dict[str, object]]:
    reader = qmp.MessageReader()
    found = []
    edges = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    for start, end in pairwise(edges):
        reader.feed(stream[start:end])
        while (message := reader.next_message()) is not None:
            found.append(message)
    return found


json_values = st.recursive(st.none() | st.booleans() | st.text() | st.integers(-(2**53), 2**53), st.lists, max_leaves=5)


@given(
    messages=st.lists(st.dictionaries(st.text(), json_values, max_size=3), max_size=5),
    cuts=st.lists(st.integers(min_value=0), max_size=10),
    ascii_only=st.booleans(),
)
def test_any_cutting_of_the_stream_gives_the_same_messages(
    messages: list[dict[str, object]], cuts: list[int], *, ascii_only: bool
) -> None:
    stream = b"".join(json.dumps(m, ensure_ascii=ascii_only).encode() + b"\r\n" for m in messages)
    assert read_all(stream, cuts) == messages


def test_messages_before_garbage_are_still_read() -> None:
    reader = qmp.MessageReader()
    reader.feed(b'{"a": 1}\n\n{]\n')
    assert reader.next_message() == {"a": 1}
    with pytest.raises(qmp.NotQmp):
        reader.next_message()


@pytest.mark.parametrize("line", [b"[]", b"1", b"SSH-2.0-OpenSSH", b'{"a": ', b'\xff\xfe{"a": 1}'])
def test_a_line_that_is_no_object_is_not_qmp(line: bytes) -> None:
    reader = qmp.MessageReader()
    reader.feed(line + b"\n")
    with pytest.raises(qmp.NotQmp):
        reader.next_message()


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_message_beyond_the_limit_is_not_kept(end: bytes) -> None:
    reader = qmp.MessageReader(limit=100)
    reader.feed(b'"' + b"x" * 100 + end)
    with pytest.raises(qmp.NotQmp, match="more than 100 bytes"):
        reader.next_message()


async def test_commands_get_their_answers_and_events_are_kept(tmp_path: Path) -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        heard = await peer.hear()
        assert heard == {"execute": "job-dismiss", "arguments": {"job-id": "x"}, "id": heard["id"]}
        later = {**STOP, "event": "JOB", "data": {"id": "x", "status": "concluded"}}
        await peer.say(STOP, {"return": [1, 2], "id": heard["id"]}, {**later, "data": {"id": "y"}}, later)
        await trio.sleep_forever()

    async with fake_monitor(tmp_path, script) as path, qmp.connect(path) as monitor:
        assert monitor.version == "7.2.22"
        assert await monitor.execute("job-dismiss", job_id="x") == [1, 2]
        assert monitor.events == [qmp.Event("STOP", {}, 1_795_306_329.868947)]
        with trio.fail_after(5):
            assert await monitor.wait_event("STOP") == monitor.events[0]
            assert (await monitor.wait_event("JOB", status="concluded")).data["id"] == "x"


async def test_a_refusal_carries_its_class_and_description(tmp_path: Path) -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        error = {"class": "CommandNotFound", "desc": "The command nope has not been found"}
        await peer.say({"error": error, "id": (await peer.hear())["id"]})
        await peer.say({"return": "still here", "id": (await peer.hear())["id"]})

    async with fake_monitor(tmp_path, script) as path, qmp.connect(path) as monitor:
        with pytest.raises(qmp.QmpError, match="The command nope has not been found") as caught:
            await monitor.execute("nope")
        assert (caught.value.command, caught.value.error_class) == ("nope", "CommandNotFound")
        assert await monitor.execute("other") == "still here"


async def test_the_answer_to_a_cancelled_command_is_not_taken_for_the_next(tmp_path: Path) -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        first, second = await peer.hear(), await peer.hear()
        await peer.say({"return": "late", "id": first["id"]}, {"return": "right", "id": second["id"]})

    async with fake_monitor(tmp_path, script) as path, qmp.connect(path) as monitor:
        with trio.move_on_after(0.05):
            await monitor.execute("slow")
        assert await monitor.execute("quick") == "right"


async def say_nothing(peer: Peer) -> None:
    await trio.sleep_forever()


async def hang_up(peer: Peer) -> None:
    pass


async def hang_up_in_mid_message(peer: Peer) -> None:
    await peer.stream.send_all(b'{"QMP": {"vers')


async def speak_ssh(peer: Peer) -> None:
    await peer.stream.send_all(b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n")
    await trio.sleep_forever()


async def speak_other_json(peer: Peer) -> None:
    await peer.say({"hello": "world"})
    await trio.sleep_forever()


async def flood(peer: Peer) -> None:
    while True:
        await peer.stream.send_all(b"x" * 65536)


@pytest.mark.parametrize(
    ("script", "text"),
    [
        (say_nothing, "give hypemand a monitor of its own"),
        (hang_up, "was cut"),
        (hang_up_in_mid_message, "was cut"),
        (speak_ssh, "does not speak QMP.*SSH-2.0"),
        (speak_other_json, "does not speak QMP.*no greeting"),
        (flood, "does not speak QMP.*more than 16777216 bytes"),
    ],
)
async def test_whoever_does_not_greet_is_unavailable_and_the_text_says_why(
    tmp_path: Path, script: Script, text: str
) -> None:
    async with fake_monitor(tmp_path, script) as path:
        with trio.fail_after(10), pytest.raises(BackendUnavailable, match=text) as caught:
            async with qmp.connect(path, patience_s=1):
                pass
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("last_words", [b"", b'{"return": {}, "i', b"\0\0\0\n", b"{}\n", b'{"event": "STOP"}\n'])
async def test_a_connection_that_breaks_in_a_command_is_unavailable(tmp_path: Path, last_words: bytes) -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        await peer.hear()
        await peer.stream.send_all(last_words)

    async with fake_monitor(tmp_path, script) as path, qmp.connect(path) as monitor:
        with trio.fail_after(5), pytest.raises(BackendUnavailable):
            await monitor.execute("query-status")


async def test_clients_queueing_for_a_held_monitor_are_told_that_it_is_busy(tmp_path: Path) -> None:
    async def try_once() -> None:
        with trio.fail_after(5), pytest.raises(BackendUnavailable, match="another client holds it"):
            async with qmp.connect(path, patience_s=0.3):
                pass

    # More than the listener's queue takes: to these, the kernel says neither yes nor no.
    async with fake_monitor(tmp_path, say_nothing) as path, trio.open_nursery() as nursery:
        for _ in range(6):
            nursery.start_soon(try_once)


async def test_the_monitor_is_free_again_right_after_a_cancelled_command(tmp_path: Path) -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        await peer.hear()
        assert await peer.stream.receive_some() == b""

    async with fake_monitor(tmp_path, script) as path:
        for _ in range(3):
            with trio.fail_after(5), trio.move_on_after(0.05):
                async with qmp.connect(path) as monitor:
                    await monitor.execute("never-answered")


async def test_a_job_is_waited_for_until_qemu_says_that_it_is_over(tmp_path: Path) -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        for status in ("running", "concluded"):
            jobs = [{"id": "other", "status": "concluded"}, {"id": "x", "status": status}]
            await peer.say({"return": jobs, "id": (await peer.hear())["id"]})
            await peer.say({**STOP, "event": "JOB_STATUS_CHANGE", "data": {"id": "x", "status": "concluded"}})
        await peer.say({"return": [], "id": (await peer.hear())["id"]})

    async with fake_monitor(tmp_path, script) as path, qmp.connect(path) as monitor:
        assert await finished(monitor, "x") == {"id": "x", "status": "concluded"}
        assert await finished(monitor, "x") is None


async def test_a_missing_socket_is_unavailable_and_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match=r"there is no monitor .*-qmp unix:"):
        async with qmp.connect(tmp_path / "none.sock"):
            pass


async def test_a_socket_that_nobody_listens_to_is_unavailable(tmp_path: Path) -> None:
    path = tmp_path / "stale.sock"
    with trio.socket.socket(trio.socket.AF_UNIX) as left:
        await left.bind(str(path))
    with pytest.raises(BackendUnavailable, match="refuses: its QEMU has ended"):
        async with qmp.connect(path):
            pass


@pytest.mark.parametrize("name", ["a-file", "s" * 200])
async def test_a_path_that_can_be_no_socket_is_unavailable(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(BackendUnavailable):
        async with qmp.connect(tmp_path / name):
            pass
