"""What the embedded backend promises beyond the contract."""

import json
import re
import subprocess
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import trio

from hypemand.backends import embedded, reflinks, registry
from hypemand.backends.base import (
    Backend,
    BackendUnavailable,
    CaptureFailed,
    CaptureRequest,
    InstanceNotFound,
    InvalidState,
    Surroundings,
    Unsupported,
)
from hypemand.backends.embedded import EmbeddedBackend
from hypemand.backends.embedded_guests import MARK
from hypemand.core.model import Freezer, InstanceId, InstanceState, RestoreAction, RunStarted, SnapshotKind, Trigger
from tests.strategies import NOW, WEB

MIB = 1 << 20
SMALL = {"memory": "1MiB", "disk": "2MiB"}


def build(root: Path, **settings: Any) -> Backend:
    return registry.connect("lab", {"type": "embedded", "root": str(root), **settings}, Surroundings(root.parent))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "embedded"


@pytest.fixture
async def backend(root: Path) -> Backend:
    made = build(root, instances={WEB: SMALL})
    await made.open(first_use=True)
    return made


def state_file(root: Path, instance: InstanceId = WEB) -> Path:
    return root / "instances" / instance / "instance.json"


def said(root: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(state_file(root).read_text())
    return document


def say(root: Path, document: Mapping[str, Any]) -> None:
    state_file(root).write_text(json.dumps(document))


def request_of(kind: SnapshotKind = SnapshotKind.STANDBY) -> CaptureRequest:
    return CaptureRequest(
        run_id="run-1",
        name="nightly-1",
        kind=kind,
        tags={"team": "a"},
        created_at=NOW,
        freezes=Freezer.ENGINE if kind is SnapshotKind.STANDBY else None,
    )


def run_of(backend: Backend) -> RunStarted:
    return RunStarted(
        run_id="run-1",
        instance_id=WEB,
        backend="lab",
        trigger=Trigger.SCHEDULE,
        kind=SnapshotKind.STANDBY,
        state_before=InstanceState.RUNNING,
        due_at=NOW,
        next_run_at=NOW,
        started_at=NOW,
        snapshot_name="nightly-1",
        tags={},
        max_freeze_s=30,
        freezes=backend.capabilities.freezes,
        boot_id="boot",
        connection=backend.connection,
    )


# Making instances


async def test_configured_instances_are_made_of_real_bytes_that_differ(root: Path) -> None:
    await build(root, instances={"a": SMALL, "b": {"state": "Stopped", "disk": 12345}}).open(first_use=True)
    disk, memory = (root / "instances" / "a" / name for name in ("disk", "memory"))
    assert (disk.stat().st_size, memory.stat().st_size) == (2 * MIB, MIB)
    assert (root / "instances" / "b" / "disk").stat().st_size == 12345
    content = disk.read_bytes()
    assert b"\0" not in content
    assert len({content[:MIB], content[MIB:], memory.read_bytes()}) == 3
    assert json.loads(state_file(root, InstanceId("b")).read_text()) == {"state": "Stopped"}


async def test_an_instance_that_is_there_is_left_as_it_is(root: Path, backend: Backend) -> None:
    disk = root / "instances" / WEB / "disk"
    disk.write_bytes(b"grown old")
    say(root, {"state": "Stopped"})
    await build(root, instances={WEB: {"state": "Running", "disk": "1GiB"}}).open(first_use=False)
    assert disk.read_bytes() == b"grown old"
    assert said(root) == {"state": "Stopped"}


async def test_a_newly_configured_instance_is_made_beside_those_in_use(root: Path, backend: Backend) -> None:
    later = build(root, instances={WEB: SMALL, "db-1": SMALL})
    await later.open(first_use=False)
    assert await later.instances() == {WEB, "db-1"}


@pytest.mark.parametrize("missing", ["instances", "snapshots"])
async def test_nothing_is_made_where_an_earlier_use_is_not_mounted(root: Path, backend: Backend, missing: str) -> None:
    (root / missing).rename(root / "elsewhere")
    later = build(root, instances={WEB: SMALL, "db-1": SMALL})
    with pytest.raises(BackendUnavailable, match="mounted"):
        await later.open(first_use=False)
    assert not (root / missing).exists()
    assert not state_file(root, InstanceId("db-1")).exists()


async def test_a_root_that_can_not_be_made_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BackendUnavailable, match="Not a directory"):
        await build(tmp_path / "file" / "root").open(first_use=True)


async def test_what_is_not_named_like_an_instance_is_none(root: Path, backend: Backend) -> None:
    for name in (".web-2.abc", "lost and found"):
        (root / "instances" / name).mkdir()
    assert await backend.instances() == {WEB}


async def test_an_empty_instances_directory_may_be_a_missing_mount(root: Path) -> None:
    backend = build(root)
    await backend.open(first_use=True)
    with pytest.raises(BackendUnavailable, match="mounted"):
        await backend.instances()


async def test_the_connection_is_absolute_and_names_no_instances(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    backend = build(Path("relative"), instances={WEB: SMALL}, copy_rate="2MiB")
    monkeypatch.chdir("/")
    assert backend.connection == {"type": "embedded", "root": str(tmp_path / "relative"), "copy_rate": 2 * MIB}


# State


@pytest.mark.parametrize("word", InstanceState)
async def test_an_edit_by_hand_counts_at_once(root: Path, backend: Backend, word: InstanceState) -> None:
    say(root, {"state": word})
    assert (await backend.state(WEB)).state is word


async def test_a_missing_directory_is_an_instance_that_is_gone(root: Path, backend: Backend) -> None:
    with pytest.raises(InstanceNotFound):
        await backend.state(InstanceId("web-2"))
    (root / "instances").rename(root / "elsewhere")
    with pytest.raises(BackendUnavailable, match="mounted"):
        await backend.state(InstanceId("web-2"))


@pytest.mark.parametrize("content", ["", "[]", '{"state": "Sleeping"}', '{"status": "Running"}', '{"state": "Run'])
async def test_a_state_that_can_not_be_understood_is_unavailable_and_left_as_it_is(
    root: Path, backend: Backend, content: str
) -> None:
    state_file(root).write_text(content)
    asked: list[Callable[[], Awaitable[object]]] = [
        lambda: backend.state(WEB),
        lambda: backend.pause(WEB, request_of()),
        lambda: backend.resume(WEB),
    ]
    for ask in asked:
        with pytest.raises(BackendUnavailable, match=str(state_file(root))):
            await ask()
    assert state_file(root).read_text() == content


async def test_a_directory_without_a_state_is_unavailable(root: Path, backend: Backend) -> None:
    state_file(root).unlink()
    with pytest.raises(BackendUnavailable, match="missing"):
        await backend.state(WEB)


async def test_a_pause_carries_our_mark_until_the_resume(root: Path, backend: Backend) -> None:
    before = datetime.now(UTC)
    await backend.pause(WEB, request_of())
    document = said(root)
    assert (document["state"], document["paused_by"]) == ("Paused", MARK)
    assert before <= datetime.fromisoformat(document["paused_at"]) <= datetime.now(UTC)
    assert MARK in (await backend.state(WEB)).detail
    await backend.resume(WEB)
    assert said(root) == {"state": "Running"}


@pytest.mark.parametrize("whose", [{}, {"paused_by": "alice"}])
async def test_an_operators_pause_is_refused_and_gets_no_mark(
    root: Path, backend: Backend, whose: dict[str, str]
) -> None:
    say(root, {"state": "Paused", **whose})
    with pytest.raises(InvalidState, match="not by hypemand"):
        await backend.pause(WEB, request_of())
    assert said(root) == {"state": "Paused", **whose}


async def test_keys_that_are_not_known_survive_pause_and_resume(root: Path, backend: Backend) -> None:
    say(root, {"state": "Running", "owner": "alice", "ports": [22, 80]})
    await backend.pause(WEB, request_of())
    assert said(root)["ports"] == [22, 80]
    await backend.resume(WEB)
    assert said(root) == {"state": "Running", "owner": "alice", "ports": [22, 80]}


@pytest.mark.parametrize("word", [InstanceState.STOPPED, InstanceState.STANDBY, InstanceState.UNKNOWN])
async def test_what_does_not_run_is_neither_paused_nor_resumed(
    root: Path, backend: Backend, word: InstanceState
) -> None:
    say(root, {"state": word})
    with pytest.raises(InvalidState, match=word):
        await backend.pause(WEB, request_of())
    with pytest.raises(InvalidState, match=word):
        await backend.resume(WEB)
    assert said(root) == {"state": word}


async def test_a_cancelled_pause_is_never_written_after_the_resume_that_follows(root: Path, backend: Backend) -> None:
    for turn in range(50):
        with trio.move_on_after(turn / 20_000):
            await backend.pause(WEB, request_of())
        await backend.resume(WEB)
        assert said(root) == {"state": "Running"}
    await trio.to_thread.run_sync(lambda: None)
    assert said(root) == {"state": "Running"}


async def test_a_pause_that_was_cancelled_before_it_began_never_begins(root: Path, backend: Backend) -> None:
    assert isinstance(backend, EmbeddedBackend)
    lock = backend._locks[WEB]
    with lock:  # as a write on a hung filesystem holds it
        with trio.move_on_after(0.1) as scope:
            await backend.pause(WEB, request_of())
        assert scope.cancelled_caught
        assert backend._threads._limiter.borrowed_tokens == 1
    with trio.fail_after(10):
        while backend._threads._limiter.borrowed_tokens:
            await trio.sleep(0.01)
    assert said(root) == {"state": "Running"}


async def test_instances_are_paused_and_resumed_at_the_same_time(root: Path) -> None:
    names = [InstanceId(f"web-{number}") for number in range(5)]
    backend = build(root, instances={name: {"memory": 1, "disk": 1} for name in names})
    await backend.open(first_use=True)
    async with trio.open_nursery() as nursery:
        for name in names:
            nursery.start_soon(backend.pause, name, request_of())
    assert {(await backend.state(name)).state for name in names} == {InstanceState.PAUSED}


# Capture


async def test_a_standby_snapshot_holds_memory_and_disk(root: Path, backend: Backend) -> None:
    made = (await backend.capture(WEB, request_of())).snapshot
    await backend.publish(made)
    assert made.size_bytes == 3 * MIB
    for name in ("memory", "disk"):
        original = (root / "instances" / WEB / name).read_bytes()
        assert (root / "snapshots" / WEB / "run-1" / name).read_bytes() == original


async def test_a_stopped_snapshot_holds_the_disk_alone(root: Path, backend: Backend) -> None:
    say(root, {"state": "Stopped"})
    made = (await backend.capture(WEB, request_of(SnapshotKind.STOPPED))).snapshot
    await backend.publish(made)
    assert (made.kind, made.size_bytes) == (SnapshotKind.STOPPED, 2 * MIB)
    assert {path.name for path in (root / "snapshots" / WEB / "run-1").iterdir()} == {"disk", "manifest.json"}


async def test_the_manifest_tells_files_and_hypervisor(root: Path, backend: Backend) -> None:
    await backend.publish((await backend.capture(WEB, request_of())).snapshot)
    manifest = json.loads((root / "snapshots" / WEB / "run-1" / "manifest.json").read_text())
    assert manifest["files"] == {"memory": MIB, "disk": 2 * MIB}
    assert manifest["hypervisor"] == {"name": "embedded"}


@pytest.mark.parametrize(
    ("kind", "files"), [(SnapshotKind.STANDBY, {"memory", "disk"}), (SnapshotKind.STOPPED, {"disk"})]
)
async def test_the_way_back_is_commands_that_bring_back_every_byte(
    tmp_path: Path, kind: SnapshotKind, files: set[str]
) -> None:
    root = tmp_path / "it's a $(root)"
    backend = build(root, instances={WEB: SMALL})
    await backend.open(first_use=True)
    home = root / "instances" / WEB
    before = {name: (home / name).read_bytes() for name in ("memory", "disk")}
    made = await backend.complete(await backend.capture(WEB, request_of(kind)))
    await backend.publish(made.snapshot)
    (snapshot,) = await backend.list_snapshots(WEB)
    say(root, {"state": "Stopped", "owner": "alice"})
    changed = {"memory": b"other", "disk": b"longer than it was" * MIB}
    for name, content in changed.items():
        (home / name).write_bytes(content)
    assert len(snapshot.restore) == len(files)
    for step in snapshot.restore:
        assert step.action is RestoreAction.RUN
        done = subprocess.run(step.command, shell=True, cwd="/", capture_output=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    for name in before:
        assert (home / name).read_bytes() == (before if name in files else changed)[name]
    assert said(root) == {"state": "Stopped", "owner": "alice"}
    assert (await backend.prepare(WEB, kind)).taken_names == {"nightly-1"}


async def test_much_data_that_can_not_be_reflinked_gets_advice(root: Path, backend: Backend) -> None:
    home = root / "instances" / WEB
    assert (await backend.prepare(WEB, SnapshotKind.STANDBY)).advice == ()
    with (home / "disk").open("r+b") as disk:  # as if it had so much data: holes are nothing to copy
        disk.truncate(reflinks.MUCH + MIB)
        assert (await backend.prepare(WEB, SnapshotKind.STANDBY)).advice == ()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(embedded, "data_bytes", lambda path: path.stat().st_size)
            patch.setattr(embedded, "can_reflink", lambda file, directory: False)
            (advice,) = (await backend.prepare(WEB, SnapshotKind.STANDBY)).advice
    assert advice.startswith("its disks have 1.0 GiB of data to be copied while the guest stands still")


async def test_the_page_on_restoring_says_what_manifests_say(root: Path, backend: Backend) -> None:
    page = (Path(__file__).parent.parent / "docs" / "restore.md").read_text()
    (block,) = re.findall(r"<!-- embedded -->\n```sh\n(.*?)```", page, re.DOTALL)
    steps = (await backend.capture(WEB, request_of())).snapshot.restore
    told = "".join(f"{step.command}\n" for step in steps)
    assert block == told.replace(str(root), "/var/lib/hypemand/embedded").replace(request_of().run_id, "01JP0ZK3")


async def test_a_capture_has_nothing_left_to_complete(root: Path, backend: Backend) -> None:
    made = await backend.capture(WEB, request_of())
    with trio.CancelScope() as scope:
        scope.cancel()
        assert await backend.complete(made) == made
    assert not scope.cancelled_caught


@pytest.mark.parametrize(("kind", "size"), [(SnapshotKind.STANDBY, 3 * MIB), (SnapshotKind.STOPPED, 2 * MIB)])
async def test_preparing_tells_the_size_of_what_will_be_copied(
    root: Path, backend: Backend, kind: SnapshotKind, size: int
) -> None:
    preparation = await backend.prepare(WEB, kind)
    (room,) = preparation.rooms
    assert size < room.needed_bytes < size + MIB
    assert room.path == root / "snapshots"
    assert (preparation.freezes, preparation.warnings) == (None, ())


async def test_preparing_without_a_disk_file_names_it(root: Path, backend: Backend) -> None:
    disk = root / "instances" / WEB / "disk"
    disk.unlink()
    with pytest.raises(Unsupported, match=str(disk)):
        await backend.prepare(WEB, SnapshotKind.STANDBY)


async def test_a_failed_capture_names_the_file_and_leaves_nothing(root: Path, backend: Backend) -> None:
    disk = root / "instances" / WEB / "disk"
    disk.unlink()
    with pytest.raises(CaptureFailed, match=f"{disk} .*No such file"):
        await backend.capture(WEB, request_of())
    assert list((root / "snapshots" / WEB).iterdir()) == []


async def test_a_capture_into_a_catalog_that_is_gone_fails(root: Path, backend: Backend) -> None:
    (root / "snapshots").rename(root / "elsewhere")
    with pytest.raises(CaptureFailed, match="mounted"):
        await backend.capture(WEB, request_of())
    assert not (root / "snapshots").exists()


async def test_a_cancelled_capture_returns_at_once_and_leaves_nothing(root: Path, backend: Backend) -> None:
    slow = build(root, copy_rate=100)  # eight hours
    with trio.fail_after(10), trio.move_on_after(0.1) as scope:
        await slow.capture(WEB, request_of())
    assert scope.cancelled_caught
    assert list((root / "snapshots" / WEB).iterdir()) == []


async def test_a_run_that_comes_after_a_cancelled_one_with_the_same_id_is_whole(root: Path, backend: Backend) -> None:
    slow = build(root, copy_rate=100)
    with trio.move_on_after(0.1):
        await slow.capture(WEB, request_of())
    await backend.publish((await backend.capture(WEB, request_of())).snapshot)
    assert (root / "snapshots" / WEB / "run-1" / "disk").stat().st_size == 2 * MIB


# Settling


@pytest.mark.parametrize("ours", [True, False])
async def test_the_mark_rules_over_what_the_engine_believes(root: Path, backend: Backend, *, ours: bool) -> None:
    await backend.pause(WEB, request_of())
    settled = await backend.settle(run_of(backend), ours=ours)
    assert settled.resumed
    assert settled.freeze_s is not None
    assert said(root) == {"state": "Running"}
    say(root, {"state": "Paused"})
    settled = await backend.settle(run_of(backend), ours=ours)
    assert (settled.resumed, settled.freeze_s) == (False, None)
    assert said(root) == {"state": "Paused"}


async def test_the_freeze_is_counted_from_the_mark(root: Path, backend: Backend) -> None:
    say(root, {"state": "Paused", "paused_by": MARK, "paused_at": "2026-03-09T01:00:00Z"})
    settled = await backend.settle(run_of(backend), ours=False)
    assert settled.resumed
    assert settled.freeze_s is not None
    assert settled.freeze_s >= 0


async def test_a_guest_is_thawed_though_its_catalog_is_gone(root: Path, backend: Backend) -> None:
    await backend.pause(WEB, request_of())
    (root / "snapshots").rename(root / "elsewhere")
    with pytest.raises(BackendUnavailable):
        await backend.settle(run_of(backend), ours=True)
    assert said(root) == {"state": "Running"}


async def test_a_complete_copy_that_was_not_published_is_removed(root: Path, backend: Backend) -> None:
    await backend.capture(WEB, request_of())
    assert (await backend.settle(run_of(backend), ours=True)).snapshot is None
    assert list((root / "snapshots" / WEB).iterdir()) == []


async def test_a_run_of_an_instance_that_is_gone_is_settled_and_says_so(root: Path, backend: Backend) -> None:
    made = (await backend.capture(WEB, request_of())).snapshot
    await backend.publish(made)
    (root / "instances" / WEB).rename(root / "gone")
    settled = await backend.settle(run_of(backend), ours=True)
    assert settled.snapshot == made
    assert not settled.resumed
    assert WEB in settled.notes[0]
    assert await backend.list_snapshots(WEB) == (made,)


async def test_a_run_is_not_settled_while_the_state_can_not_be_read(root: Path, backend: Backend) -> None:
    state_file(root).write_text("{")
    with pytest.raises(BackendUnavailable):
        await backend.settle(run_of(backend), ours=True)
