"""The thread that serves libvirt's event loop."""

import threading
import time
from types import SimpleNamespace

import libvirt
import pytest
from structlog.typing import EventDict

from hypemand.backends.libvirt import events

pytestmark = pytest.mark.libvirt


class Ended(Exception):
    """The test has seen enough."""


def test_an_event_loop_that_fails_is_run_again_after_a_wait_and_told_once_until_it_goes_well(
    monkeypatch: pytest.MonkeyPatch, heard_log: list[EventDict]
) -> None:
    outcomes = ["fails", "fails", "fails", "goes well", "fails"]
    waits: list[float] = []

    def run() -> int:
        if not outcomes:
            raise Ended
        if outcomes.pop(0) == "fails":
            raise libvirt.libvirtError("poll failed")
        return 0

    monkeypatch.setattr(libvirt, "virEventRunDefaultImpl", run)
    monkeypatch.setattr(events, "time", SimpleNamespace(sleep=waits.append))
    with pytest.raises(Ended):
        events.serve_for_ever()
    assert waits == [events.AGAIN_S] * 4
    assert [line["error"] for line in heard_log] == ["poll failed"] * 2


def test_connections_that_are_opened_at_the_same_time_have_one_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    serving: list[str] = []

    def register() -> int:
        time.sleep(0.1)  # so that the others are here too
        return 0

    monkeypatch.setattr(libvirt, "virEventRegisterDefaultImpl", register)
    monkeypatch.setattr(events, "serve_for_ever", lambda: serving.append("served"))
    loop = events.EventLoop()
    threads = [threading.Thread(target=loop.begin) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loop._thread is not None
    loop._thread.join()
    assert serving == ["served"]
