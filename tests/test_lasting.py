"""What goes wrong in the parts that only watch and answer costs no run and no guest anything."""

from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import trio
from structlog.typing import EventDict
from trio.testing import MockClock

from hypemand.backends import registry
from hypemand.config_files import load_config
from hypemand.daemon import Daemon
from hypemand.surface import lasting
from hypemand.surface.hooks.hooks import Hooks
from hypemand.surface.http.access import CurrentAccess
from hypemand.surface.http.serving import Serving
from hypemand.surface.lasting import keep_up
from hypemand.surface.metrics.page import Metrics
from tests.processes import ALONE, PATIENCE_S, Lab, wait_until
from tests.talking import ask


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


async def test_a_part_that_fails_begins_anew_and_one_that_is_done_does_not(
    heard_log: list[EventDict], autojump_clock: MockClock
) -> None:
    begun: list[float] = []

    async def serve() -> None:
        begun.append(trio.current_time())
        await trio.sleep(1)
        if len(begun) < 3:
            raise ExceptionGroup("several", [ZeroDivisionError("oops")])

    await keep_up("the part", serve)
    assert [after - before for before, after in pairwise(begun)] == [1 + lasting.AGAIN_S] * 2
    assert [(line["log_level"], line["part"]) for line in heard_log] == [("error", "the part")] * 2


def failing_once(serve: Callable[[Any], Awaitable[None]], fail: trio.Event) -> Callable[[Any], Awaitable[None]]:
    """*serve*, which fails at *fail* when it is called for the first time."""
    calls: list[object] = []

    async def failing(self: object) -> None:
        calls.append(self)
        if len(calls) > 1:
            await serve(self)
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, self)
            await fail.wait()
            raise ZeroDivisionError("oops")

    return failing


async def test_no_run_is_cut_short_by_a_bug_in_what_watches_and_answers(
    lab: Lab, heard_log: list[EventDict], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail = trio.Event()
    for part, name in ((Metrics, "keep_counting"), (Hooks, "serve"), (Serving, "serve")):
        monkeypatch.setattr(part, name, failing_once(getattr(part, name), fail))
    monkeypatch.setattr(lasting, "AGAIN_S", 0.05)
    lab.write(backend='copy_rate = "128KiB"', runs=ALONE)
    daemon = Daemon(lab.config, None, load_config(lab.config, registry.parse_settings), CurrentAccess(None))
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(daemon.run)
            await lab.in_mid_capture()
            fail.set()
            await wait_until(lambda: sum("begun anew" in line["event"] for line in heard_log) == 3, "all have failed")
            await wait_until((lab.state / "api.sock").is_socket, "the socket is made again")
            assert (await ask(lab.state / "api.sock")).status == 200
            await lab.recorded()
            assert daemon.engine is not None
            daemon.engine.stop(0)
    failed = [line["part"] for line in heard_log if "begun anew" in line["event"]]
    assert sorted(failed) == ["API", "hooks", "metrics"]
    assert [run["outcome"] for run in lab.history()] == ["succeeded"]
    assert not (lab.state / "api.sock").exists()
