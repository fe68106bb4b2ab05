"""The hypeman backend and its server, when all is well and when it is not."""

import errno
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import evolve
from structlog.typing import EventDict

from hypemand.backends import registry
from hypemand.backends.base import (
    Backend,
    BackendError,
    BackendUnavailable,
    CaptureFailed,
    InstanceNotFound,
    Status,
    Surroundings,
    Unsupported,
)
from hypemand.backends.hypeman import holding
from hypemand.backends.hypeman.documents import kept_of
from hypemand.backends.hypeman.drafts import way_back
from hypemand.backends.hypeman.server import Server
from hypemand.backends.hypeman.settings import HypemanSettings
from hypemand.core.errors import InvalidInput
from hypemand.core.model import InstanceId, InstanceState, SnapshotKind
from tests.hypeman_server.answers import TOKEN
from tests.hypeman_site import NAME, WEB, Site, Way, new_request, opened, settle, take
from tests.processes import PATIENCE_S, ROOT, children_of, wait_until

SNAPSHOTS = f"POST /instances/{WEB}/snapshots"
RESTORE = f"POST /instances/{WEB}/restore"


# What it is asked.


async def test_states_are_the_servers_own(tmp_path: Path) -> None:
    async with opened(tmp_path) as (site, backend):
        for state in InstanceState:
            site.set_state(state.value)
            assert (await backend.state(WEB)).state is state
        site.set_state("Template")
        assert await backend.state(WEB) == Status(InstanceState.UNKNOWN, "Template")
        site.add_guest(state="Unknown", state_error="failed to query hypervisor: timeout")
        assert (await backend.state(WEB)).detail == "failed to query hypervisor: timeout"


async def test_instances_are_those_whose_ids_can_name_a_schedule(tmp_path: Path) -> None:
    async with opened(tmp_path) as (site, backend):
        site.add_guest("b.2_x")
        assert await backend.instances() == {WEB, "b.2_x"}
        site.fault("GET /instances", status=200, body=[{"id": "no name, with a space", "state": "Running"}])
        assert await backend.instances() == frozenset()


async def test_a_name_and_the_beginning_of_an_id_are_no_instances(tmp_path: Path) -> None:
    async with opened(tmp_path) as (site, backend):
        for given in (site.guest()["name"], WEB[:6]):
            with pytest.raises(InstanceNotFound, match=f"of {WEB}: schedules take ids"):
                await backend.state(InstanceId(given))
        site.add_guest(f"{WEB[:6]}-other")
        with pytest.raises(InstanceNotFound, match="ambiguous"):
            await backend.state(InstanceId(WEB[:6]))


async def test_only_the_servers_own_word_makes_an_instance_gone(tmp_path: Path) -> None:
    async with opened(tmp_path) as (site, backend):
        site.fault(f"GET /instances/{WEB}", status=404, body="<html>nothing here</html>")
        with pytest.raises(BackendUnavailable, match="not a Hypeman's own answer"):
            await backend.state(WEB)
        site.remove_guest()
        with pytest.raises(InstanceNotFound):
            await backend.state(WEB)


STRANGE: list[dict[str, Any]] = [
    {"status": 200, "body": "<html>welcome</html>"},
    {"status": 200, "body": {"hello": 1}},
    {"status": 200, "body": "null"},
    {"status": 500, "body": {"code": "internal_error", "message": "failed"}},
    {"status": 502},
    {"status": 503, "body": {"error": "upstream"}},
    {"status": 302, "location": "http://127.0.0.1:1/elsewhere"},
    {"cut": "midst"},
]
QUESTIONS: dict[str, Callable[[Backend], Any]] = {
    "GET /instances": lambda backend: backend.instances(),
    f"GET /instances/{WEB}": lambda backend: backend.state(WEB),
    "GET /snapshots": lambda backend: backend.list_snapshots(WEB),
}


@pytest.mark.parametrize("asked", QUESTIONS)
async def test_what_is_no_proper_answer_is_no_answer(tmp_path: Path, asked: str) -> None:
    async with opened(tmp_path) as (site, backend):
        for strange in STRANGE:
            site.fault(asked, times=2 if "cut" in strange else 1, **strange)
            with pytest.raises(BackendUnavailable) as refused:
                await QUESTIONS[asked](backend)
            assert not isinstance(refused.value, InstanceNotFound)
            await QUESTIONS[asked](backend)


async def test_a_question_whose_connection_ends_is_asked_once_more(tmp_path: Path) -> None:
    async with opened(tmp_path) as (site, backend):
        site.fault(f"GET /instances/{WEB}", cut="before")
        assert (await backend.state(WEB)).state is InstanceState.RUNNING
        assert len(site.requests(f"GET /instances/{WEB}")) == 2


# The token.


async def test_a_token_that_is_refused_is_read_anew(tmp_path: Path) -> None:
    async with opened(tmp_path) as (site, backend):
        await backend.state(WEB)
        site.change_token("another one")
        with pytest.raises(
            BackendUnavailable, match=rf"invalid token .401 Unauthorized.; see token_file {site.token_file}"
        ):
            await backend.state(WEB)
        site.write_token("another one")
        assert (await backend.state(WEB)).state is InstanceState.RUNNING
        site.change_token("a third")
        site.write_token("a third")
        await take(backend)
        assert len(site.snapshots()) == 1


async def test_the_token_is_told_nowhere(tmp_path: Path, heard_log: list[EventDict]) -> None:
    async with opened(tmp_path) as (site, backend):
        site.write_token("the-very-secret-token")
        with pytest.raises(BackendUnavailable) as refused:
            await backend.instances()
        site.change_token("the-very-secret-token")
        site.fault(SNAPSHOTS, copy_fails=True)
        with pytest.raises(CaptureFailed) as failed:
            await backend.capture(WEB, new_request())
        told = [refused.value, failed.value, backend.connection, backend, heard_log]
        told += [path.read_text() for path in tmp_path.rglob("*.json") if "hypeman" not in path.parts]
        assert "secret" not in repr(told)


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [
        ("token", 0o644, "others can read it .mode 0644.; run: chmod 600"),
        ("two\nlines", 0o600, "the token alone"),
        ("", 0o600, "the token alone"),
        ("t\x80ken", 0o600, "the token alone"),
        (None, 0o600, "can't be read: No such file"),
    ],
)
async def test_a_token_file_that_is_none_is_told_with_what_to_do(
    tmp_path: Path, content: str | None, mode: int, said: str
) -> None:
    async with opened(tmp_path) as (site, backend):
        site.token_file.unlink()
        if content is not None:
            site.token_file.write_bytes(content.encode("latin-1"))
            site.token_file.chmod(mode)
        with pytest.raises(BackendUnavailable, match=rf"token_file {site.token_file} .*{said}") as told:
            await backend.instances()
        assert "two" not in str(told.value)


async def test_the_token_may_be_a_credential_of_systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(tmp_path) as (site, _):
        connection = {key: value for key, value in site.connection(tmp_path).items() if key != "token_file"}
        backend = registry.connect("cloud", connection, Surroundings(tmp_path / "state"))
        with pytest.raises(BackendUnavailable, match=r"authorization header required .*token_file, which is not set"):
            await backend.instances()
        (tmp_path / "credentials").mkdir()
        (tmp_path / "credentials" / "hypeman-token").write_text(TOKEN)
        (tmp_path / "credentials" / "hypeman-token").chmod(0o440)  # by which systemd's list of who may shows
        monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "credentials"))
        assert await backend.instances() == {WEB}
        site.change_token("another")
        with pytest.raises(BackendUnavailable, match="see the systemd credential hypeman-token"):
            await backend.instances()
        await backend.aclose()


async def test_no_redirect_is_followed_with_the_token(tmp_path: Path) -> None:
    async with opened(tmp_path) as (site, backend), opened(tmp_path / "other") as (other, _):
        site.fault(f"GET /instances/{WEB}", status=307, location=f"{other.url}/instances/{WEB}")
        with pytest.raises(BackendUnavailable, match=f"it leads on to {other.url}"):
            await backend.state(WEB)
        assert other.requests() == []


# The address.


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://hypeman.example.org", "readable by all on the way to hypeman.example.org: use https"),
        ("http://192.0.2.7:8080", "readable by all"),
        ("https://user:secret@hypeman.example.org", "must hold no user"),
        ("https://hypeman.example.org?key=1", "must hold no user, password, query"),
        ("hypeman.example.org:8080", "must be a URL"),
        ("ftp://127.0.0.1", "must be a URL"),
        ("https://", "must be a URL"),
        ("http://127.0.0.1:99999", "is no URL"),
        (" http://127.0.0.1", "must be a URL"),
    ],
)
def test_an_address_that_can_not_be_right_is_refused(url: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=said) as refused:
        registry.parse_settings("hypeman", {"url": url})
    assert {problem.path for problem in refused.value.problems} == {"url"}
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("url", ["http://localhost:8080/", "http://[::1]:8080", "https://h.example.org/hypeman"])
def test_an_address_that_may_be_right_is_taken(url: str, tmp_path: Path) -> None:
    backend = registry.connect("cloud", {"type": "hypeman", "url": url}, Surroundings(tmp_path))
    assert backend.connection["url"] == url.rstrip("/")
    assert backend.connection["snapshot_dir"] == str(tmp_path / "catalog" / "cloud")
    with pytest.raises(InvalidInput, match="of no use"):
        registry.parse_settings("hypeman", {"url": "http://localhost", "ca_file": "ca.pem"})


async def test_a_server_with_a_certificate_of_its_own_is_trusted_by_ca_file(tmp_path: Path) -> None:
    async with opened(tmp_path, "https") as (site, backend):
        assert await backend.instances() == {WEB}
        snapshot = await take(backend)
        assert (site.state(), await backend.list_snapshots(WEB)) == ("Running", (snapshot,))
        trusting = {key: value for key, value in site.connection(tmp_path).items() if key != "ca_file"}
        strict = registry.connect("cloud", trusting, Surroundings(tmp_path / "state"))
        with pytest.raises(BackendUnavailable, match=r"no certificate that is trusted here: .*; see ca_file"):
            await strict.instances()
        await strict.aclose()
        missing = site.backend(tmp_path, ca_file=str(tmp_path / "nowhere.pem"))
        with pytest.raises(BackendUnavailable, match=r"ca_file .*nowhere.pem can't be used: No such file"):
            await missing.instances()


async def test_the_certificate_is_checked_in_whatever_case_the_address_is_written(tmp_path: Path) -> None:
    async with opened(tmp_path, "https") as (site, _):
        connection = {key: value for key, value in site.connection(tmp_path).items() if key != "ca_file"}
        shouted = connection | {"url": site.url.replace("https", "HTTPS")}
        backend = registry.connect("cloud", shouted, Surroundings(tmp_path / "state"))
        assert backend.connection["url"] == site.url
        with pytest.raises(BackendUnavailable, match="no certificate that is trusted here"):
            await backend.instances()
        assert site.requests() == []
        await backend.aclose()
        settings = HypemanSettings(url=site.url.replace("https", "HttpS"))  # as nobody has put it in order
        with pytest.raises(BackendUnavailable, match="no certificate that is trusted here"):
            await Server(settings).ask("GET", "/instances")


# Captures.


async def test_a_capture_asks_for_what_hypemand_has_decided(tmp_path: Path) -> None:
    async with opened(tmp_path) as (site, backend):
        snapshot = await take(backend)
        (kept,) = site.snapshots()
        assert (kept["name"], kept["kind"], kept["source_instance_id"]) == (NAME, "Standby", WEB)
        assert kept["tags"] == {**snapshot.tags, "hypemand.run_id": "run-1"}
        assert (snapshot.id, snapshot.size_bytes) == ("run-1", 4096)
        assert len(site.requests(SNAPSHOTS)) == 1


@pytest.mark.parametrize(
    ("state", "kind"), [("Standby", SnapshotKind.STANDBY), ("Stopped", SnapshotKind.STOPPED)], ids=str
)
async def test_a_guest_that_does_not_run_is_captured_as_it_is(tmp_path: Path, state: str, kind: SnapshotKind) -> None:
    async with opened(tmp_path) as (site, backend):
        site.set_state(state)
        request = new_request(kind=kind, freezes=None)
        made = await backend.capture(WEB, request)
        assert (made.freeze_s, made.snapshot.kind, site.state()) == (None, kind, state)
        await backend.publish(made.snapshot)
        assert (await settle(backend, request)).snapshot == made.snapshot
        assert site.state() == state
        assert site.requests(RESTORE) == []


async def test_the_freeze_is_at_most_as_long_as_the_request_took(tmp_path: Path) -> None:
    async with opened(tmp_path) as (site, backend):
        site.fault(SNAPSHOTS, takes_s=0.3)
        made = await backend.capture(WEB, new_request())
        assert made.freeze_s is not None
        assert 0.3 <= made.freeze_s < PATIENCE_S


@pytest.mark.parametrize("tags", [47, 48])
async def test_metadata_has_to_leave_room_for_our_tags(tmp_path: Path, tags: int) -> None:
    metadata = {f"key-{number}": "x" for number in range(tags)}
    async with opened(tmp_path) as (site, backend):
        if tags <= 47:
            await take(backend, metadata=metadata)
            assert len(site.snapshots()[0]["tags"]) == 50
            return
        with pytest.raises(Unsupported, match=r"metadata has 48 tags: .* take 47 at most"):
            await backend.capture(WEB, new_request(metadata=metadata))
        assert site.requests(SNAPSHOTS) == []


async def test_a_guest_whose_state_has_changed_meanwhile_is_not_captured(tmp_path: Path) -> None:
    async with opened(tmp_path) as (site, backend):
        for state in ("Standby", "Paused", "Stopped"):
            site.set_state(state)
            with pytest.raises(CaptureFailed, match=f"instance is {state} now, it was Running"):
                await backend.capture(WEB, new_request())
            assert (await settle(backend, new_request())).resumed is False
            assert site.state() == state
        site.set_state("Running")
        with pytest.raises(CaptureFailed, match="is Running now, it was Standby"):
            await backend.capture(WEB, new_request(freezes=None))
        assert site.requests("POST") == []


UNKNOWN: list[dict[str, Any]] = [
    {"cut": "before"},
    {"cut": "after"},
    {"cut": "midst"},
    {"garbage": True},
    {"status": 502},
    {"status": 504, "body": "upstream timed out"},
    {"status": 200, "body": "[]"},
]


@pytest.mark.parametrize("fault", UNKNOWN, ids=str)
async def test_what_became_of_a_request_without_an_answer_is_looked_up_and_it_is_never_sent_again(
    tmp_path: Path, fault: dict[str, Any]
) -> None:
    async with opened(tmp_path) as (site, backend):
        kept = await take(backend, "kept", "nightly-20261121-010000")
        site.fault(SNAPSHOTS, **fault)
        with pytest.raises(BackendUnavailable):
            await backend.capture(WEB, new_request())
        assert await backend.list_snapshots(WEB) == (kept,)
        settled = await settle(backend, new_request())
        made = [one for one in site.snapshots() if one["tags"]["hypemand.run_id"] == "run-1"]
        assert (settled.snapshot is not None) == bool(made)
        assert (settled.resumed, site.state()) == (False, "Running")
        listed = [kept, settled.snapshot] if settled.snapshot is not None else [kept]
        assert sorted(await backend.list_snapshots(WEB), key=lambda one: one.id) == listed
        assert len(site.requests(SNAPSHOTS)) == 2
        assert (await settle(backend, new_request())).snapshot == settled.snapshot


async def test_a_request_that_never_left_leaves_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path) as (site, backend):
        site.fault(SNAPSHOTS, status=403, body={"code": "forbidden", "message": "read only"})
        with pytest.raises(BackendUnavailable, match="refuses us: read only"):
            await backend.capture(WEB, new_request())
        assert list(tmp_path.glob("catalog/*/.*")) == []


@pytest.mark.parametrize(
    ("fault", "error", "said"),
    [
        ({"copy_fails": True}, CaptureFailed, "failed: failed to create snapshot .500 internal_error.; its own log"),
        ({"status": 409, "body": {"code": "conflict", "message": "busy"}}, CaptureFailed, "refuses: busy .409"),
        ({"status": 501, "body": {"code": "not_supported", "message": "vz"}}, Unsupported, "refuses: vz"),
        ({"status": 404, "body": {"code": "not_found", "message": "gone"}}, InstanceNotFound, "gone"),
    ],
)
async def test_why_the_server_refuses_is_told_and_the_guest_runs(
    tmp_path: Path, fault: dict[str, Any], error: type[BackendError], said: str
) -> None:
    async with opened(tmp_path) as (site, backend):
        site.fault(SNAPSHOTS, **fault)
        with pytest.raises(error, match=said):
            await backend.capture(WEB, new_request())
        assert site.state() == "Running"
        assert (await settle(backend, new_request())).snapshot is None
        await take(backend, "run-2")
        assert len(site.snapshots()) == 1


async def test_volumes_that_can_be_written_are_told_as_the_reason(tmp_path: Path) -> None:
    async with opened(tmp_path) as (site, backend):
        site.add_guest(volumes=[{"volume_id": "v", "mount_path": "/data"}])
        with pytest.raises(Unsupported, match="requires readonly volume attachments"):
            await backend.capture(WEB, new_request())


# Guests that are left down.


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
    async with opened(tmp_path) as (site, backend), trio.open_nursery() as nursery:
        site.be_hasty()
        site.fault(SNAPSHOTS, takes_s=2)
        nursery.start_soon(backend.capture, WEB, new_request())
        await wait_until(lambda: site.state() == "Standby", "the capture")
        other = site.backend(tmp_path)  # another process, which knows nothing of the request that is under way
        settled = await settle(other, new_request())
        assert settled.snapshot is not None
        assert (settled.resumed, site.state(), len(site.requests(RESTORE))) == (False, "Running", 1)
        await other.aclose()


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
        await settle(backend, new_request())
        assert site.state() == "Running"
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


# What is listed, and deleted.


async def test_a_snapshot_that_somebody_deleted_on_the_server_is_not_listed(tmp_path: Path) -> None:
    async with opened(tmp_path) as (site, backend):
        snapshot = await take(backend)
        for file in site.directory.glob("snapshots/*.json"):
            file.unlink()
        assert await backend.list_snapshots(WEB) == ()
        assert (await settle(backend, new_request())).snapshot is None
        await backend.delete_snapshot(snapshot)
        assert list(tmp_path.glob("catalog/*/[!.]*")) == []


OLD = "2026-03-09T02:00:00.123456789+01:00"


async def test_what_the_servers_own_schedule_left_behind_is_listed_once_it_has_none(tmp_path: Path) -> None:
    async with opened(tmp_path) as (site, backend):
        old = site.add_snapshot("nightly-20260309-020000", at=OLD)
        site.add_snapshot("by-hand", at=OLD, tags={"team": "backend"})
        site.add_schedule()
        ours = await take(backend)
        assert await backend.list_snapshots(WEB) == (ours,)
        (site.directory / "snapshot-schedules" / f"{WEB}.json").unlink()
        adopted, listed = await backend.list_snapshots(WEB)
        assert listed == ours
        assert (adopted.id, adopted.name, adopted.created_at.isoformat()) == (
            *(old, "nightly-20260309-020000"),
            "2026-03-09T01:00:00.123456+00:00",
        )
        assert adopted.restore != ()
        await backend.delete_snapshot(adopted)
        assert {one["name"] for one in site.snapshots()} == {"by-hand", NAME}
        await backend.delete_snapshot(adopted)


async def test_nothing_that_is_not_ours_for_sure_is_listed_of_an_instance_that_is_gone(tmp_path: Path) -> None:
    async with opened(tmp_path) as (site, backend):
        site.add_snapshot("nightly-20260309-020000", at=OLD)
        ours = await take(backend)
        site.remove_guest()
        assert await backend.list_snapshots(WEB) == (ours,)


async def test_settling_clears_up_after_a_deletion_that_was_cut_short(tmp_path: Path) -> None:
    async with opened(tmp_path) as (_, backend):
        snapshot = await take(backend)
        (tmp_path / "catalog" / WEB / ".run-0.deleted").mkdir()
        assert (await settle(backend, new_request())).snapshot == snapshot
        assert [path.name for path in (tmp_path / "catalog" / WEB).iterdir()] == ["run-1"]


async def test_a_lost_catalog_takes_no_snapshot_along(tmp_path: Path) -> None:
    async with opened(tmp_path) as (site, backend):
        made = await take(backend)
        subprocess.run(["rm", "-r", tmp_path / "catalog" / WEB], check=True)
        (found,) = await backend.list_snapshots(WEB)
        (kept,) = site.snapshots()
        assert (found.id, found.name, found.tags, found.restore) == (made.id, made.name, made.tags, made.restore)
        await backend.delete_snapshot(found)
        assert (kept["id"], site.snapshots()) == (kept["id"], [])


async def test_a_snapshot_that_lost_its_tags_is_not_deleted(tmp_path: Path) -> None:
    async with opened(tmp_path) as (site, backend):
        snapshot = await take(backend)
        (file,) = site.directory.glob("snapshots/*.json")
        file.write_text(json.dumps({**json.loads(file.read_text()), "tags": {"team": "backend"}}))
        with pytest.raises(BackendError, match="not tagged as a schedule's"):
            await backend.delete_snapshot(snapshot)
        assert await backend.list_snapshots(WEB) == (snapshot,)


@pytest.mark.parametrize("tag", ["{precious}", ".", "..", "../../precious", ".run-1.partial", "x" * 250, ""])
async def test_a_tag_leads_nowhere_in_the_catalog(tmp_path: Path, tag: str) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    async with opened(tmp_path) as (site, backend):
        ours = await take(backend)
        tags = {**ours.tags, "hypemand.run_id": tag.format(precious=precious)}
        odd = site.add_snapshot("nightly-1", at=OLD, tags=tags)
        by_id = {one.id: one for one in await backend.list_snapshots(WEB)}
        assert by_id == {"run-1": ours, odd: by_id[odd]}
        await backend.delete_snapshot(by_id[odd])
        assert await backend.list_snapshots(WEB) == (ours,)
        for name in (str(precious), "..", "."):
            with pytest.raises(BackendError, match="can't name anything"):
                await backend.delete_snapshot(evolve(ours, id=name))
        assert precious.is_dir()
        assert await backend.list_snapshots(WEB) == (ours,)


async def test_a_snapshot_whose_own_id_is_a_path_is_left_alone(tmp_path: Path) -> None:
    async with opened(tmp_path) as (site, backend):
        ours = await take(backend)
        body = [*site.snapshots(), {**site.snapshots()[0], "id": "../instances/x", "tags": ours.tags}]
        site.fault("GET /snapshots", status=200, body=body, times=2)
        assert await backend.list_snapshots(WEB) == (ours,)
        assert len((await backend.prepare(WEB, SnapshotKind.STANDBY)).taken_names) == 1


async def test_a_deletion_that_fails_leaves_the_snapshot_listed(tmp_path: Path) -> None:
    async with opened(tmp_path) as (site, backend):
        snapshot = await take(backend)
        for fault in ({"status": 500, "body": {"code": "internal_error", "message": "busy"}}, {"status": 404}):
            site.fault("DELETE /snapshots/.*", **fault)
            with pytest.raises(BackendUnavailable):
                await backend.delete_snapshot(snapshot)
            assert await backend.list_snapshots(WEB) == (snapshot,)
        site.fault("DELETE /snapshots/.*", cut="after")  # asked again, it is gone
        await backend.delete_snapshot(snapshot)
        assert (await backend.list_snapshots(WEB), site.snapshots()) == ((), [])


async def test_a_schedule_of_the_servers_own_is_warned_of_before_the_capture(tmp_path: Path) -> None:
    async with opened(tmp_path) as (site, backend):
        site.add_snapshot("by-hand", at=OLD, tags={})
        ready = await backend.prepare(WEB, SnapshotKind.STANDBY)
        assert (ready.warnings, set(ready.taken_names), ready.rooms) == ((), {"by-hand"}, ())
        site.add_schedule()
        (warning,) = (await backend.prepare(WEB, SnapshotKind.STANDBY)).warnings
        assert "hypemand import-hypeman --take-over" in warning


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"status": 404, "body": "404 page not found\n"}, []),
        ({"status": 404, "body": {"code": "Not Found", "message": "no matching operation was found"}}, []),
        ({"status": 500, "body": {"code": "internal_error", "message": "torn file"}}, ["can't be told: .*torn file"]),
    ],
    ids=["no-page", "no-operation", "failed"],
)
async def test_a_server_that_tells_nothing_of_schedules_is_captured_nevertheless(
    tmp_path: Path, answer: dict[str, Any], said: list[str]
) -> None:
    async with opened(tmp_path) as (site, backend):
        old = site.add_snapshot("nightly-20260309-020000", at=OLD)
        site.fault(f"GET /instances/{WEB}/snapshot-schedule", times=2, **answer)
        warnings = (await backend.prepare(WEB, SnapshotKind.STANDBY)).warnings
        assert [bool(re.search(*pair)) for pair in zip(said, warnings, strict=True)] == [True] * len(said)
        with pytest.raises(BackendUnavailable):  # but nothing is taken for left behind then
            await backend.list_snapshots(WEB)
        assert [one.id for one in await backend.list_snapshots(WEB)] == [old]


# The way back.

STAND_IN = f"""#!{sys.executable} -E
import argparse, ssl, sys, urllib.error, urllib.request
parser = argparse.ArgumentParser()
parser.add_argument("-sS", dest="quiet", action="store_true")
parser.add_argument("--fail-with-body", action="store_true")
parser.add_argument("--cacert")
parser.add_argument("-H", action="append")
parser.add_argument("-d", type=str.encode)
parser.add_argument("url")
given = parser.parse_args()
lines = [sys.stdin.read() if line == "@-" else line for line in given.H]
headers = dict(line.split(": ", 1) for line in lines)
trust = ssl.create_default_context(cafile=given.cacert) if given.cacert else None
try:
    print(urllib.request.urlopen(urllib.request.Request(given.url, given.d, headers), context=trust).read().decode())
except urllib.error.HTTPError as error:
    print(error.read().decode())
    sys.exit(22)
"""
"""Where curl is not installed: it knows the options of the way back, and no others."""


@pytest.fixture
def curl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("curl") is None:
        (tmp_path / "curl").write_text(STAND_IN)
        (tmp_path / "curl").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


async def test_the_way_back_works_word_for_word(tmp_path: Path, curl: None) -> None:
    async with opened(tmp_path) as (site, backend):
        running = await take(backend)
        site.set_state("Stopped")
        stopped = await take(backend, "run-2", "nightly-20261123-010000", kind=SnapshotKind.STOPPED, freezes=None)
        ids = {one["name"]: one["id"] for one in site.snapshots()}
        for snapshot, state in ((running, "Running"), (stopped, "Stopped")):
            site.set_state("Stopped")
            (step,) = snapshot.restore
            done = subprocess.run(step.command, shell=True, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done
            assert (site.state(), site.guest()["went_back_to"]) == (state, ids[snapshot.name])
            assert TOKEN not in step.command
        site.set_state("Running")
        refused = subprocess.run(running.restore[0].command, shell=True, capture_output=True, text=True, check=False)
        assert refused.returncode != 0
        assert "cannot restore snapshot while source is Running" in refused.stdout


async def test_the_way_back_is_that_of_the_docs(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "restore.md").read_text()
    (line,) = re.findall(r"<!-- hypeman -->\n```sh\n(.*?)\n```", page, re.DOTALL)
    async with opened(tmp_path) as (site, backend):
        snapshot = await take(backend)
        (kept,) = site.snapshots()
        for theirs, ours in (
            *(("https://hypeman.example.org", site.url), ("/etc/hypemand/hypeman-token", str(site.token_file))),
            *(("$ID", WEB), ("$SNAPSHOT", kept["id"])),
        ):
            line = line.replace(theirs, ours)
        assert snapshot.restore[0].command == f"{line} # {snapshot.name}"


async def test_the_way_back_over_tls_trusts_whom_the_backend_trusts(tmp_path: Path, curl: None) -> None:
    async with opened(tmp_path, "https") as (site, backend):
        snapshot = await take(backend)
        site.set_state("Stopped")
        done = subprocess.run(snapshot.restore[0].command, shell=True, capture_output=True, text=True, check=False)
        assert (done.returncode, site.state()) == (0, "Running"), done


def test_a_name_that_the_server_made_up_is_harmless_in_a_shell() -> None:
    told = {"id": "a'b", "source_instance_id": WEB, "name": "x\ntouch /tmp/y", "kind": "Standby"}
    (step,) = way_back(kept_of(told), HypemanSettings(url="http://localhost:1"))
    assert "touch" not in step.command
    assert "'\"'\"'" in step.command


async def test_a_connection_that_is_made_anew_is_held_anew(tmp_path: Path) -> None:
    """The first one ends with the answer that the token is no good."""
    async with opened(tmp_path) as (site, backend):
        others = children_of(os.getpid())
        site.fault(SNAPSHOTS, status=401, body={"code": "Unauthorized", "message": "invalid token"}, cut="then")
        site.fault(SNAPSHOTS, takes_s=1.5)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(backend.capture, WEB, new_request())
            await wait_until(lambda: site.state() == "Standby", "the capture")
            (holder,) = {*children_of(os.getpid())} - {*others}
            held = Path(f"/proc/{holder}/fd/3").stat().st_ino
            assert held in sockets_of(os.getpid())
        assert children_of(os.getpid()) == others


def sockets_of(pid: int) -> set[int]:
    found = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            found.add(path.stat().st_ino)
    return found
