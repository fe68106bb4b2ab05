"""One line about the daemon, for whoever looks with ``systemctl status``."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import trio

from hypemand.backends.base import CaptureFailed
from hypemand.surface.status_line import StatusLine
from tests.fakes import FakeBackend, FakeClock
from tests.virtual_time import VirtualClock
from tests.world import World, entry, world

HOUR = timedelta(hours=1)


def line_of(w: World, *troubles: str) -> StatusLine:
    def told() -> Iterator[str]:
        yield from troubles

    return StatusLine(w.engine, told)


async def test_without_schedules_it_says_so(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    async with world(tmp_path) as w:
        await trio.sleep(1)
        assert line_of(w, "the config file is invalid").text() == "0 schedules; the config file is invalid"


async def test_what_runs_what_is_next_and_what_fails(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    clock = FakeClock()
    fake = FakeBackend(clock, capture_s=20)
    entries = [entry(f"web-{number}", HOUR, first_run="now") for number in range(6)]
    fake.add("later", *(e.instance for e in entries))
    fake.fail("capture", "web-0", CaptureFailed("no"))
    later = entry("later", 2 * HOUR)
    async with world(tmp_path, *entries, later, backends=[fake], clock=clock, concurrency=10, fake_concurrency=10) as w:
        line = line_of(w)
        with w.engine.events.heard_by(line.hear):
            await trio.sleep(2)
            assert line.text().startswith("7 schedules; 5 runs under way: web-1, web-2, web-3 and 2 more; next web-")
            assert line.text().endswith("; 1 failing")
            await trio.sleep(60)
            assert line.text() == "7 schedules; next web-0 at 2026-03-09T02:00:00Z; 1 failing"
            fake.heal("capture", "web-0")
            await trio.sleep(3700)
            assert line.text() == "7 schedules; next web-0 at 2026-03-09T03:00:00Z"


async def test_a_schedule_that_is_taken_out_fails_no_more(tmp_path: Path, virtual_clock: VirtualClock) -> None:
    clock = FakeClock()
    fake = FakeBackend(clock)
    entries = [entry("web-0", HOUR, first_run="now"), entry("web-1", HOUR, first_run="now")]
    fake.add("web-0", "web-1")
    fake.fail("capture", "web-0", CaptureFailed("no"))
    async with world(tmp_path, *entries, backends=[fake], clock=clock) as w:
        line = line_of(w)
        with w.engine.events.heard_by(line.hear):
            await trio.sleep(60)
            assert line.text().endswith("; 1 failing")
            await w.apply(entries[1])
            assert line.text() == "1 schedule; next web-1 at 2026-03-09T02:00:00Z"
