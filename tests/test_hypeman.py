"""The hypeman backend and its server: questions, token, address, captures."""

import errno
import shutil
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
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
from hypemand.backends.hypeman import tokens
from hypemand.backends.hypeman.backend import HypemanBackend
from hypemand.backends.hypeman.server import Server
from hypemand.backends.hypeman.settings import HypemanSettings
from hypemand.core.errors import InvalidInput
from hypemand.core.model import InstanceId, InstanceState, SnapshotKind
from tests.hypeman_server.answers import TOKEN
from tests.hypeman_site import NAME, RESTORE, SNAPSHOTS, WEB, new_request, opened, settle, take
from tests.processes import PATIENCE_S, ROOT

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


async def test_an_instance_that_can_not_be_read_hides_no_other(tmp_path: Path, heard_log: list[EventDict]) -> None:
    async with opened(tmp_path) as (site, backend):
        site.add_guest("b2", state="")
        site.add_guest("c3")
        assert await backend.instances() == {WEB, "c3"}
        (line,) = (line for line in heard_log if line["log_level"] == "error")
        assert line["entry"] == "entry 1 ('b2')"
        assert "no 'state'" in line["error"]


async def test_a_snapshot_that_can_not_be_read_is_named(tmp_path: Path) -> None:
    async with opened(tmp_path) as (site, backend):
        await take(backend)
        site.fault("GET /snapshots", status=200, body=[*site.snapshots(), {"id": "odd", "name": "x"}])
        with pytest.raises(BackendUnavailable, match=r"entry 2 .'odd'.: .* no 'source_instance_id'"):
            await backend.list_snapshots(WEB)


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


async def test_a_ca_file_that_is_replaced_is_read_anew(tmp_path: Path) -> None:
    ca_file = tmp_path / "ca.pem"
    shutil.copy(ROOT / "tests" / "tls" / "other-cert.pem", ca_file)
    async with opened(tmp_path, "https", ca_file=str(ca_file)) as (site, backend):
        for _ in range(2):
            with pytest.raises(BackendUnavailable, match="no certificate that is trusted here"):
                await backend.state(WEB)
        shutil.copy(ROOT / "tests" / "tls" / "cert.pem", ca_file)
        assert (await backend.state(WEB)).state is InstanceState.RUNNING
        other = site.backend(tmp_path, ca_file=str(ca_file))
        assert isinstance(other, HypemanBackend)
        shutil.copy(ROOT / "tests" / "tls" / "other-cert.pem", ca_file)
        with pytest.raises(BackendUnavailable, match="no certificate that is trusted here"):
            await other.server.have_done(f"/instances/{WEB}/standby", {})
        shutil.copy(ROOT / "tests" / "tls" / "cert.pem", ca_file)
        assert (await other.server.have_done(f"/instances/{WEB}/standby", {})).status == 200
        await other.aclose()


async def test_files_that_can_not_be_read_for_the_moment_hold_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on = threading.Event()

    def block(*_: object, **__: object) -> None:
        assert may_go_on.wait(PATIENCE_S)
        raise OSError(errno.EIO, "the disk is gone")

    async with opened(tmp_path, "https") as (site, backend):
        await backend.state(WEB)
        try:
            for module, name in ((ssl, "create_default_context"), (tokens, "read_private")):
                with monkeypatch.context() as patched:
                    patched.setattr(module, name, block)
                    other = site.backend(tmp_path)
                    with trio.fail_after(PATIENCE_S / 2), trio.move_on_after(0.2) as hasty:
                        await other.state(WEB)
                    assert hasty.cancelled_caught
                    assert (await backend.state(WEB)).state is InstanceState.RUNNING  # it has read them before
                    await other.aclose()
        finally:
            may_go_on.set()


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
