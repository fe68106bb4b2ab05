"""What a service manager hears of the daemon: that it is ready, alive, reloading, stopping, and how it is."""

import math
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import trio
from attrs import define, field
from structlog.typing import EventDict

from hypemand.core.model import InstanceId
from hypemand.surface.systemd import BEAT_S, LONGEST_END_S, LONGEST_START_S, Notifier, Service, take_notifier
from tests.processes import ALONE, PATIENCE_S, RUN_NOW, Lab, running_daemon, wait_until
from tests.talking import ask
from tests.virtual_time import VirtualClock
from tests.world import entry, world


@define
class Manager:
    """A service manager's socket, and what it has heard."""

    receiver: socket.socket
    messages: list[list[str]] = field(factory=list)

    def heard(self) -> list[str]:
        """Every line so far."""
        while True:
            try:
                self.messages.append(self.receiver.recv(65536).decode().split("\n"))
            except BlockingIOError:
                return [line for message in self.messages for line in message]

    async def wait_for(self, line: str, *, times: int = 1) -> None:
        await wait_until(lambda: sum(told.startswith(line) for told in self.heard()) >= times, line)

    def position(self, line: str) -> int:
        return next(number for number, told in enumerate(self.heard()) if told.startswith(line))


@contextmanager
def manager(address: str) -> Iterator[Manager]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind("\0" + address[1:] if address.startswith("@") else address)
        receiver.setblocking(False)
        yield Manager(receiver)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


@pytest.fixture
def notified(tmp_path: Path) -> Iterator[Manager]:
    with manager(str(tmp_path / "notify")) as made:
        yield made


def told_at(tmp_path: Path, **more: str) -> dict[str, str]:
    return {"NOTIFY_SOCKET": str(tmp_path / "notify"), **more}


# The protocol


@pytest.mark.parametrize("kind", ["path", "abstract"])
async def test_lines_go_where_the_environment_says_and_no_child_can_send_them(tmp_path: Path, kind: str) -> None:
    address = str(tmp_path / "notify") if kind == "path" else f"@hypemand-test-{os.getpid()}"
    environ = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid()), "HOME": "/"}
    notifier = take_notifier(environ)
    assert notifier == Notifier(address, 3.0)
    assert environ == {"HOME": "/"}
    with manager(address) as heard:
        await notifier.tell("READY=1", "STATUS=well")
        assert heard.heard() == ["READY=1", "STATUS=well"]


@pytest.mark.parametrize(
    ("environ", "notifier"),
    [
        ({}, Notifier()),
        ({"WATCHDOG_USEC": "3000000"}, Notifier(None, 3.0)),
        ({"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, Notifier("/n")),
        ({"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "soon"}, Notifier("/n")),
        ({"NOTIFY_SOCKET": "vsock:2:1234"}, Notifier()),
    ],
)
def test_what_is_not_for_this_process_or_not_understood_is_left_alone(
    environ: dict[str, str], notifier: Notifier
) -> None:
    assert take_notifier(environ) == notifier


async def test_a_manager_that_is_gone_or_takes_nothing_stops_nobody(
    tmp_path: Path, heard_log: list[EventDict], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hypemand.surface.systemd._SEND_S", 0.05)
    with trio.fail_after(PATIENCE_S):
        await Notifier(str(tmp_path / "nobody")).tell("READY=1")
        with manager(str(tmp_path / "full")):
            for _ in range(2000):
                if len(heard_log) == 2:
                    break
                await Notifier(str(tmp_path / "full")).tell("WATCHDOG=1")
    assert [line["event"] for line in heard_log] == ["the service manager does not hear"] * 2
    assert [line["told"] for line in heard_log] == ["READY=1", "WATCHDOG=1"]


# The phases, in virtual time


@define
class Heard(Notifier):
    """A manager in memory: what it heard, and when."""

    lines: list[tuple[float, str]] = field(factory=list)
    busy: list[float] = field(factory=list)
    """Until when it takes nothing."""

    async def tell(self, *lines: str) -> bool:
        await trio.lowlevel.checkpoint()
        if trio.current_time() < max(self.busy, default=0.0):
            return False
        self.lines.extend((trio.current_time(), line) for line in lines)
        return True

    def times(self, line: str) -> list[float]:
        return [at for at, told in self.lines if told.startswith(line)]


@pytest.fixture
def heard() -> Heard:
    return Heard("/notify", 15.0)


async def test_a_long_start_is_waited_for_until_it_is_over_or_nobody_would_wait_any_longer(
    heard: Heard, virtual_clock: VirtualClock
) -> None:
    service = Service(heard)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(service.starting)
        await trio.sleep(100)
        await service.ready()
        await trio.sleep(100)
    assert max(heard.times("EXTEND_TIMEOUT_USEC=30000000")) == pytest.approx(100, abs=BEAT_S)
    assert heard.times("READY=1") == [100]
    await Service(heard).starting()
    assert trio.current_time() == pytest.approx(200 + LONGEST_START_S)


async def test_a_manager_that_is_busy_is_told_later_that_all_is_ready_and_one_that_is_gone_is_not_for_ever(
    heard: Heard, virtual_clock: VirtualClock
) -> None:
    heard.busy.append(7)
    await Service(heard).ready()
    assert heard.times("READY=1") == [10]
    heard.busy.append(math.inf)
    await Service(heard).ready()
    assert heard.times("READY=1") == [10]


async def test_a_reload_during_the_start_puts_off_the_end_of_the_start(
    heard: Heard, virtual_clock: VirtualClock
) -> None:
    service = Service(heard)
    async with service.reloading():
        await service.ready()
        assert heard.lines == []
        await trio.sleep(3)
    assert heard.lines == [(3, "READY=1")]


async def test_a_reload_is_told_once_however_many_are_asked_for_at_a_time(
    heard: Heard, virtual_clock: VirtualClock
) -> None:
    service = Service(heard)
    await service.ready()
    async with service.reloading():
        async with service.reloading():
            await trio.sleep(1)
        await trio.sleep(1)
    assert heard.times("RELOADING=1") == [0]
    assert heard.times("MONOTONIC_USEC=") == [0]
    assert heard.times("READY=1") == [0, 2]


async def test_no_reload_makes_it_ready_while_it_starts_or_stops(heard: Heard, virtual_clock: VirtualClock) -> None:
    service = Service(heard)
    async with service.reloading():
        pass
    assert heard.lines == []
    await service.ready()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(service.stopping, 30.0)
        await trio.sleep(12)
        async with service.reloading():
            pass
        nursery.cancel_scope.cancel()
    assert heard.times("READY=1") == [0]
    assert heard.times("STOPPING=1") == [0]
    assert heard.times("EXTEND_TIMEOUT_USEC=") == [0, BEAT_S, 2 * BEAT_S]


async def test_a_start_that_is_over_once_a_stop_has_begun_is_not_told_as_ready(
    heard: Heard, virtual_clock: VirtualClock
) -> None:
    service = Service(heard)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(service.stopping, 30.0)
        await trio.sleep(1)
        await service.ready()
        async with service.reloading():
            pass
        nursery.cancel_scope.cancel()
    assert heard.times("STOPPING=1") == [0]
    assert heard.times("READY=1") + heard.times("RELOADING=1") == []


async def test_a_stop_that_hangs_is_left_to_the_manager_some_time_after_its_grace(
    heard: Heard, virtual_clock: VirtualClock
) -> None:
    await Service(heard).stopping(30.0)
    assert max(heard.times("EXTEND_TIMEOUT_USEC=")) == pytest.approx(30 + LONGEST_END_S, abs=BEAT_S)


async def test_a_bug_in_the_status_line_does_not_pass_for_a_scheduler_that_is_stuck(
    tmp_path: Path, heard: Heard, virtual_clock: VirtualClock, heard_log: list[EventDict]
) -> None:
    def status() -> str:
        raise ZeroDivisionError("oops")

    async with world(tmp_path) as w, trio.open_nursery() as nursery:
        await w.engine.scheduler.serving.wait()
        nursery.start_soon(Service(heard).running, w.engine.scheduler, status)
        await trio.sleep(60)
        nursery.cancel_scope.cancel()
    assert len(heard.times("WATCHDOG=1")) == pytest.approx(60 / 5, abs=2)
    assert {line["part"] for line in heard_log if "begun anew" in line["event"]} == {"status line"}


async def test_the_watchdog_hears_of_the_scheduler_and_of_nothing_else(
    tmp_path: Path, heard: Heard, virtual_clock: VirtualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path) as w, trio.open_nursery() as nursery:
        scheduler = w.engine.scheduler
        await scheduler.serving.wait()
        nursery.start_soon(Service(heard).running, scheduler, lambda: "well")
        await trio.sleep(60)
        assert len(heard.times("WATCHDOG=1")) == pytest.approx(60 / 5, abs=2)
        stuck = trio.Event()
        monkeypatch.setattr(scheduler, "_sleep", lambda _: stuck.wait())
        await trio.sleep(100)
        pinged = len(heard.times("WATCHDOG=1"))
        await trio.sleep(100)
        assert len(heard.times("WATCHDOG=1")) == pinged
        nursery.cancel_scope.cancel()


async def test_the_watchdog_is_content_while_runs_finish_after_a_stop(
    tmp_path: Path, heard: Heard, virtual_clock: VirtualClock
) -> None:
    async with world(tmp_path) as w, trio.open_nursery() as nursery:
        await w.engine.scheduler.serving.wait()
        nursery.start_soon(Service(heard).running, w.engine.scheduler, lambda: "well")
        await trio.sleep(1)
        w.engine.scheduler.stop(60)
        await trio.sleep(60)
        assert max(heard.times("WATCHDOG=1")) > 50
        nursery.cancel_scope.cancel()


async def test_the_status_is_told_when_it_changes_and_only_then(
    tmp_path: Path, heard: Heard, virtual_clock: VirtualClock
) -> None:
    said = "one"
    async with world(tmp_path) as w, trio.open_nursery() as nursery:
        await w.engine.scheduler.serving.wait()
        nursery.start_soon(Service(heard).running, w.engine.scheduler, lambda: said)
        await trio.sleep(60)
        said = "two"
        await trio.sleep(60)
        nursery.cancel_scope.cancel()
    assert [line for _, line in heard.lines if line.startswith("STATUS")] == ["STATUS=one", "STATUS=two"]


async def test_a_turn_is_taken_at_once_when_it_is_asked_for(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    async with world(tmp_path) as w:
        scheduler = w.engine.scheduler
        await scheduler.serving.wait()
        await trio.sleep(0.5)
        began = trio.current_time()
        await scheduler.take_turn()
        assert trio.current_time() == began
        await scheduler.next_turn()
        assert began < trio.current_time() <= began + 5
        scheduler.stop(0)
        await scheduler.take_turn()
        assert scheduler.running == frozenset()


async def test_the_next_start_is_that_of_the_schedule_that_is_due_first(
    tmp_path: Path, virtual_clock: VirtualClock
) -> None:
    entries = [entry(f"web-{hours}", timedelta(hours=hours)) for hours in (3, 1, 2)]
    async with world(tmp_path, *entries) as w:
        await trio.sleep(1)
        following = w.engine.scheduler.next_start
        assert following is not None
        assert following == (InstanceId("web-1"), w.schedule("web-1").next_run_at)


# A real daemon


async def test_it_is_ready_once_clients_are_answered_and_tells_how_it_is(
    tmp_path: Path, lab: Lab, notified: Manager
) -> None:
    lab.write()
    async with running_daemon(lab.config, env=told_at(tmp_path, WATCHDOG_USEC="1500000")) as daemon:
        await notified.wait_for("READY=1")
        assert (await ask(lab.state / "api.sock")).status == 200
        await daemon.wait_for("snapshot taken")
        await notified.wait_for("STATUS=1 schedule; next web-1 at ")
        await notified.wait_for("WATCHDOG=1", times=3)
        lab.replace("state_dir = ")
        daemon.send(signal.SIGHUP)
        await notified.wait_for("READY=1", times=2)
        assert notified.position("RELOADING=1") < len(notified.heard())
        await notified.wait_for("STATUS=1 schedule; next web-1 at ", times=2)
        assert any("the config file is invalid" in line for line in notified.heard())
        await daemon.stop()
    heard = notified.heard()
    assert heard.count("STOPPING=1") == 1
    assert heard.index("READY=1") < heard.index("STOPPING=1")
    assert not any(line.startswith("READY") for line in heard[heard.index("STOPPING=1") :])


async def test_a_stop_that_waits_for_a_capture_has_the_manager_wait_too(
    tmp_path: Path, lab: Lab, notified: Manager
) -> None:
    lab.write(backend='copy_rate = "128KiB"')
    async with running_daemon(lab.config, env=told_at(tmp_path)) as daemon:
        await lab.in_mid_capture()
        daemon.send(signal.SIGTERM)
        await notified.wait_for("STOPPING=1")
        assert await daemon.ended() == 0
    heard = notified.heard()
    assert "EXTEND_TIMEOUT_USEC=30000000" in heard[heard.index("STOPPING=1") :]
    assert [run["outcome"] for run in lab.history()] == ["succeeded"]


async def test_a_door_that_can_not_be_opened_does_not_keep_schedules_from_being_called_ready(
    tmp_path: Path, lab: Lab, notified: Manager
) -> None:
    lab.write(RUN_NOW, runs=ALONE)
    lab.state.mkdir(mode=0o700)
    (lab.state / "api.sock").write_text("no socket")
    async with running_daemon(lab.config, env=told_at(tmp_path)) as daemon:
        await daemon.wait_for("snapshot taken")
        await notified.wait_for("READY=1")
        await notified.wait_for("STATUS=1 schedule; next web-1")
        assert any("API: 1 problem" in line for line in notified.heard())
        await daemon.stop()


# Sockets that are handed over


@pytest.fixture
def listening(lab: Lab) -> Iterator[Callable[[], socket.socket]]:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    lab.state.mkdir(mode=0o700)
    with made:
        made.bind(str(lab.state / "api.sock"))
        made.listen(16)
        yield lambda: made


async def test_clients_of_a_socket_that_is_handed_over_wait_for_a_restart(
    lab: Lab, listening: Callable[[], socket.socket]
) -> None:
    lab.write(runs=ALONE)
    path = lab.state / "api.sock"
    async with running_daemon(lab.config, listening=listening()) as daemon:
        await daemon.wait_for("API serves", socket=str(path))
        assert (await ask(path)).status == 200
        await daemon.stop()
    assert path.is_socket()
    answers: list[int] = []

    async def client() -> None:
        answers.append((await ask(path)).status)

    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client)
            await trio.sleep(0.2)
            assert answers == []
            async with running_daemon(lab.config, listening=listening()) as daemon:
                await daemon.wait_for("API serves", socket=str(path))
                await wait_until(lambda: answers == [200], "the client that waited is answered")
                await daemon.stop()
    assert not any("is not used" in line["event"] for line in daemon.lines())


async def test_a_socket_that_the_config_does_not_name_is_told_of_and_not_served(
    lab: Lab, listening: Callable[[], socket.socket]
) -> None:
    lab.write(f'[api]\nsocket = "{lab.directory}/other.sock"\n{RUN_NOW}', runs=ALONE)
    async with running_daemon(lab.config, listening=listening()) as daemon:
        refused = await daemon.wait_for(
            "a socket of the service manager is not used: neither api.socket nor api.listen names it"
        )
        assert refused["at"] == str(lab.state / "api.sock")
        assert (await ask(lab.directory / "other.sock")).status == 200
        await daemon.stop()
