"""Guests that a Hypeman server leaves down are brought back, and those that somebody else put there are not."""

import errno
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import trio
from structlog.typing import EventDict

from hypemand.backends.base import (
    Backend,
    BackendUnavailable,
    CaptureFailed,
)
from hypemand.backends.hypeman import holding
from tests.hypeman_site import RESTORE, SNAPSHOTS, WEB, Site, Way, new_request, opened, settle
from tests.processes import ROOT, wait_until


async def test_a_guest_that_the_server_leaves_in_standby_is_restored_at_once(tmp_path: Path) -> None:
    async with opened(tmp_path) as (site, backend):
        site.fault(SNAPSHOTS, restore_fails=True)
        with pytest.raises(CaptureFailed, match=r"failed to create snapshot.*; the guest was left in standby, and was"):
            await backend.capture(WEB, new_request())
        assert site.state() == "Running"
        site.set_state("Standby")  # from here on an operator's doing
        assert (await settle(backend, new_request())).resumed is False
        assert site.state() == "Standby"


async def test_a_guest_that_can_not_be_restored_yet_is_tried_again_by_each_settling(tmp_path: Path) -> None:
    async with opened(tmp_path) as (site, backend):
        site.fault(SNAPSHOTS, restore_fails=True)
        site.fault(RESTORE, restore_fails=True, times=2)
        with pytest.raises(
            CaptureFailed, match=r"create snapshot.*; and the guest is Standby, it could not be restored"
        ):
            await backend.capture(WEB, new_request())
        with pytest.raises(BackendUnavailable, match="failed to restore instance"):
            await settle(backend, new_request())
        assert site.state() == "Standby"
        settled = await settle(backend, new_request())
        assert (settled.resumed, settled.snapshot, site.state()) == (True, None, "Running")
        assert settled.freeze_s is not None
        assert settled.freeze_s >= 0
        assert (await settle(backend, new_request())).resumed is False


async def test_a_server_killed_in_mid_snapshot_has_its_guest_restored_once_it_is_back(tmp_path: Path) -> None:
    async with opened(tmp_path) as (site, backend), trio.open_nursery() as nursery:
        site.fault(SNAPSHOTS, takes_s=60)

        async def cut_short() -> None:
            with pytest.raises(BackendUnavailable, match="gave no answer"):
                await backend.capture(WEB, new_request())

        nursery.start_soon(cut_short)
        await wait_until(lambda: site.state() == "Standby", "the capture")
        await site.kill()
        with pytest.raises(BackendUnavailable, match="can't be reached"):
            await settle(backend, new_request())
        await site.start()
        other = site.backend(tmp_path)  # as after a restart of hypemand
        settled = await settle(other, new_request())
        assert (settled.resumed, settled.snapshot, site.state()) == (True, None, "Running")
        await other.aclose()


async def test_a_guest_is_restored_though_the_connection_of_its_capture_went_silent(tmp_path: Path) -> None:
    async with opened(tmp_path) as (site, _), trio.open_nursery() as nursery:
        way = Way(site.port, lost=b"POST")
        await nursery.start(way.serve)
        backend = site.backend(tmp_path, url=f"http://127.0.0.1:{way.port}")
        site.fault(SNAPSHOTS, takes_s=60)
        nursery.start_soon(backend.capture, WEB, new_request())
        await wait_until(lambda: site.state() == "Standby", "the capture")
        await site.kill()
        await site.start()
        way.lost = b"POST"
        site.fault(RESTORE, takes_s=0.5)
        with trio.move_on_after(2.5) as waited:  # its restore goes silent, too
            await settle(backend, new_request())
        assert waited.cancelled_caught
        settled = await settle(backend, new_request())
        assert (settled.snapshot, site.state(), len(site.requests(RESTORE))) == (None, "Running", 1)
        await backend.aclose()
        nursery.cancel_scope.cancel()


async def test_a_request_that_may_be_on_its_way_still_is_waited_for_while_the_guest_runs(tmp_path: Path) -> None:
    async with opened(tmp_path) as (site, backend), trio.open_nursery() as nursery:
        site.fault(SNAPSHOTS, delay_s=1.5)  # before anything is done
        nursery.start_soon(backend.capture, WEB, new_request())
        await wait_until(lambda: site.requests(SNAPSHOTS) != [], "the request")
        settled = await settle(backend, new_request())
        assert settled.snapshot is not None
        nursery.cancel_scope.cancel()


async def test_a_connection_that_a_capture_waits_on_is_looked_after(tmp_path: Path) -> None:
    async with opened(tmp_path) as (site, backend), trio.open_nursery() as nursery:
        site.fault(SNAPSHOTS, takes_s=1)
        nursery.start_soon(backend.capture, WEB, new_request())
        await wait_until(lambda: site.state() == "Standby", "the capture")
        found = [kept_alive_for_s(int(path.name)) for path in Path("/proc/self/fd").iterdir()]
        ours = [seconds for port, seconds in filter(None, found) if port == site.port]
        assert ours
        assert all(240 <= seconds <= 600 for seconds in ours)
        nursery.cancel_scope.cancel()


def kept_alive_for_s(descriptor: int) -> tuple[int, float] | None:
    """To which port a connection leads, and after how long a silence it ends."""
    with suppress(OSError):
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            return None
    with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as one:
        if one.family == socket.AF_INET and one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE):
            silent_ms = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
            return int(one.getpeername()[1]), silent_ms / 1000
        if one.family == socket.AF_INET:
            return int(one.getpeername()[1]), 0.0
    return None


async def test_a_guest_that_is_left_paused_keeps_the_run_open_and_the_text_says_what_to_do(tmp_path: Path) -> None:
    async with opened(tmp_path) as (site, backend):
        site.fault(SNAPSHOTS, status=502)
        with pytest.raises(BackendUnavailable):
            await backend.capture(WEB, new_request())
        site.set_state("Paused")
        with pytest.raises(
            BackendUnavailable, match="it is Paused, which Hypeman's API can't resume; resume it at its"
        ):
            await settle(backend, new_request())
        site.set_state("Running")
        assert (await settle(backend, new_request())).resumed is False


async def left_in_standby(site: Site, backend: Backend) -> None:
    """A capture without an answer, and the server is killed in its midst."""
    site.fault(SNAPSHOTS, cut="before")
    with pytest.raises(BackendUnavailable):
        await backend.capture(WEB, new_request())
    site.set_state("Standby")


async def test_a_guest_is_restored_though_the_server_can_not_list_its_snapshots(tmp_path: Path) -> None:
    async with opened(tmp_path) as (site, backend):
        await left_in_standby(site, backend)
        site.fault("GET /snapshots", status=500, body={"code": "internal_error", "message": "torn record"})
        with pytest.raises(BackendUnavailable, match="torn record"):
            await settle(backend, new_request())
        assert site.state() == "Running"
        assert (await settle(backend, new_request())).resumed is True


@pytest.mark.parametrize("found", ["away", "empty"])
async def test_a_guest_is_restored_though_the_catalog_is_lost_meanwhile(tmp_path: Path, found: str) -> None:
    async with opened(tmp_path) as (site, backend):
        await left_in_standby(site, backend)
        (tmp_path / "catalog").rename(tmp_path / "away")
        if found == "away":
            with pytest.raises(BackendUnavailable, match="is its filesystem mounted"):
                await settle(backend, new_request(), ours=False)
            assert site.state() == "Running"
            site.set_state("Standby")  # from here on an operator's doing
            with pytest.raises(BackendUnavailable, match="is its filesystem mounted"):
                await settle(backend, new_request(), ours=False)
        (tmp_path / "catalog").mkdir()
        (tmp_path / "catalog" / ".hypemand-catalog").touch()  # as the text says
        settled = await settle(backend, new_request(), ours=False)
        assert (settled.resumed, settled.notes) == (True, ())
        assert site.state() == ("Standby" if found == "away" else "Running")


async def test_a_standby_of_which_only_a_lost_catalog_could_tell_is_told_and_not_undone(
    tmp_path: Path, heard_log: list[EventDict]
) -> None:
    said = "the guest is Standby, and the catalog does not tell whether it is so for this run: if nobody wants it so"
    async with opened(tmp_path) as (site, backend):
        await left_in_standby(site, backend)
        other = site.backend(tmp_path)  # as after a restart of hypemand
        (tmp_path / "catalog").rename(tmp_path / "away")
        with pytest.raises(BackendUnavailable, match=f"is its filesystem mounted.*; {said}"):
            await settle(other, new_request())
        (tmp_path / "catalog").mkdir()
        (tmp_path / "catalog" / ".hypemand-catalog").touch()
        with pytest.raises(BackendUnavailable, match=f"^{said}"):
            await settle(other, new_request())
        (note,) = (await settle(other, new_request(), ours=False)).notes
        assert note.startswith(said)
        assert [line["log_level"] for line in heard_log if line.get("error") == note] == ["critical"]
        assert (site.state(), site.requests(RESTORE)) == ("Standby", [])
        site.set_state("Running")
        assert (await settle(other, new_request())).notes == ()
        await other.aclose()


async def test_a_standby_after_a_run_that_asked_for_nothing_is_an_operators(tmp_path: Path) -> None:
    async with opened(tmp_path) as (site, backend):
        site.fault(f"GET /instances/{WEB}", status=502)
        with pytest.raises(BackendUnavailable):
            await backend.capture(WEB, new_request())
        site.set_state("Standby")
        settled = await settle(backend, new_request())
        assert (settled.resumed, settled.notes, site.state()) == (False, (), "Standby")


async def test_a_guest_that_is_off_or_gone_is_not_brought_back(tmp_path: Path) -> None:
    async with opened(tmp_path) as (site, backend):
        ways: list[Callable[[], None]] = [lambda: site.set_state("Stopped"), site.remove_guest]
        for number, away in enumerate(ways):
            site.fault(SNAPSHOTS, cut="before")
            with pytest.raises(BackendUnavailable):
                await backend.capture(WEB, new_request(f"run-{number}"))
            away()
            assert (await settle(backend, new_request(f"run-{number}"))).resumed is False
            site.add_guest()


async def test_a_guest_that_somebody_puts_to_standby_after_a_capture_that_went_well_stays_there(tmp_path: Path) -> None:
    async with opened(tmp_path) as (site, backend):
        site.fault(SNAPSHOTS, cut="after")  # as if hypemand was killed just then
        with pytest.raises(BackendUnavailable):
            await backend.capture(WEB, new_request())
        assert (site.state(), len(site.snapshots())) == ("Running", 1)
        site.set_state("Standby")
        settled = await settle(backend, new_request())
        assert settled.snapshot is not None
        assert (settled.resumed, site.state(), site.requests(RESTORE)) == (False, "Standby", [])
        assert await backend.list_snapshots(WEB) == (settled.snapshot,)


@pytest.mark.parametrize("held", [True, False], ids=["held", "no-holder-to-be-had"])
@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_cancelled_capture_is_made_to_its_end_and_adopted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, held: bool
) -> None:
    def fail(connection: int) -> None:
        raise OSError(errno.EAGAIN, "no more processes")

    if not held:
        monkeypatch.setattr(holding, "_start", fail)
    async with opened(tmp_path, scheme) as (site, backend):
        site.fault(SNAPSHOTS, takes_s=1.5)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(backend.capture, WEB, new_request())
            await wait_until(lambda: site.state() == "Standby", "the capture")
            nursery.cancel_scope.cancel()
        assert site.state() == "Standby"
        settled = await settle(backend, new_request(), ours=False)
        assert settled.snapshot is not None
        assert (settled.resumed, site.state()) == (False, "Running")
        assert (len(site.requests(SNAPSHOTS)), site.requests(RESTORE)) == (1, [])


async def test_a_guest_that_the_server_is_just_about_to_bring_back_is_its_own_business(tmp_path: Path) -> None:
    async with opened(tmp_path) as (site, backend):
        site.be_hasty()
        site.fault(SNAPSHOTS, takes_s=2)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(backend.capture, WEB, new_request())
            await wait_until(lambda: site.state() == "Standby", "the capture")
            nursery.cancel_scope.cancel()
        other = site.backend(tmp_path)  # another process, which knows nothing of the request that is under way
        settled = await settle(other, new_request())
        assert settled.snapshot is not None
        assert (settled.resumed, site.state(), len(site.requests(RESTORE))) == (False, "Running", 1)
        await other.aclose()


async def test_a_restore_in_vain_that_somebody_else_makes_good_is_not_ours(tmp_path: Path) -> None:
    async with opened(tmp_path) as (site, backend):
        await left_in_standby(site, backend)
        site.fault(RESTORE, restore_fails=True)
        with pytest.raises(BackendUnavailable, match="could not be restored"):
            await settle(backend, new_request())
        site.set_state("Running")
        assert (await settle(backend, new_request())).resumed is False


async def test_a_restore_that_takes_longer_than_anybody_waits_is_not_begun_anew(tmp_path: Path) -> None:
    async with opened(tmp_path) as (site, backend):
        site.fault(SNAPSHOTS, restore_fails=True)
        site.fault(RESTORE, status=503)
        with pytest.raises(CaptureFailed):
            await backend.capture(WEB, new_request())
        site.fault(RESTORE, takes_s=2)
        with trio.move_on_after(0.2) as hasty:
            await settle(backend, new_request())
        assert hasty.cancelled_caught
        settled = await settle(backend, new_request())
        assert (settled.resumed, settled.snapshot, site.state()) == (True, None, "Running")
        assert settled.freeze_s is not None
        assert settled.freeze_s > 1.5  # until it ran again
        assert len(site.requests(RESTORE)) == 2


VICTIM = """
import sys, trio
sys.path.insert(0, {root!r})
from pathlib import Path
from hypemand.backends import registry
from hypemand.backends.base import Surroundings
from tests.hypeman_site import WEB, new_request

async def main():
    backend = registry.connect("cloud", {connection!r}, Surroundings(Path({state!r})))
    await backend.capture(WEB, new_request())

trio.run(main)
"""


@pytest.mark.parametrize("end", ["killed", "ended"])
@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_capture_goes_on_when_hypemand_is_no_more(tmp_path: Path, scheme: str, end: str) -> None:
    async with opened(tmp_path, scheme) as (site, backend):
        site.fault(SNAPSHOTS, takes_s=1.0)
        program = VICTIM.format(root=str(ROOT), connection=dict(backend.connection), state=str(tmp_path / "state"))
        path = os.pathsep.join(path for path in sys.path if path)
        victim = await trio.lowlevel.open_process(
            [sys.executable, "-c", program], stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": path}
        )
        await wait_until(lambda: site.state() == "Standby", "the capture")
        victim.send_signal(signal.SIGKILL if end == "killed" else signal.SIGINT)
        await victim.wait()
        settled = await settle(backend, new_request())
        assert settled.snapshot is not None
        assert (settled.resumed, site.state()) == (False, "Running")
        assert await backend.list_snapshots(WEB) == (settled.snapshot,)
        assert site.requests(RESTORE) == []
