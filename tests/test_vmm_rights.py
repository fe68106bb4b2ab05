"""A VMM that runs as another user: let into one directory, for as long as it writes there, and nowhere else."""

import json
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from hypemand.backends import copying
from hypemand.backends.base import Backend, BackendUnavailable, CaptureFailed, Unsupported
from hypemand.backends.catalog import Catalog
from hypemand.backends.vmm import rooms
from hypemand.backends.vmm.client import Peer
from hypemand.backends.vmm.rights import Writer, open_own, take_back
from hypemand.core.model import RestoreAction, SnapshotKind
from tests.vmm_backend import captured, carry_out, frozen, opened, published, request, run_of
from tests.vmm_guest import CLOUD_HYPERVISOR, FIRECRACKER, KINDS, MIB, Guest, make_disk, running_guest

both = pytest.mark.parametrize("kind", KINDS)
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="it takes root to run something as another user")
USER, OURS = 23456, 23457
"""The VMM's user and group, and the one that hypemand has where it is not root."""


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that others may go through, as pytest's may not."""
    with tempfile.TemporaryDirectory(prefix="hypemand-", dir="/var/tmp") as made:
        Path(made).chmod(0o711)
        yield Path(made)


@asynccontextmanager
async def foreign(kind: str, place: Path, **settings: str) -> AsyncIterator[tuple[Guest, Backend]]:
    """A guest of another user's, and a backend of root's."""
    disk = make_disk(place / "root.raw")
    os.chown(disk, USER, USER)
    home = place / "web-1"
    home.mkdir()
    os.chown(home, USER, USER)
    sockets = place / "run"
    sockets.mkdir()
    os.chown(sockets, USER, USER)
    async with (
        running_guest(kind, place, disks=[(disk, "rw")], socket=sockets / "web-1.sock", user=USER) as guest,
        opened(guest, place, **settings) as backend,
    ):
        yield guest, backend


def modes(directory: Path) -> dict[str, tuple[int, int]]:
    """Mode and user of all that is in *directory*."""
    found = {}
    for path in (directory, *directory.rglob("*")):
        status = path.stat()
        found[str(path.relative_to(directory))] = (stat.S_IMODE(status.st_mode), status.st_uid)
    return found


@both
async def test_root_lets_the_vmm_write_and_takes_it_all_back(kind: str, place: Path) -> None:
    async with foreign(kind, place, snapshot_group=str(USER)) as (guest, backend):
        assert (await backend.prepare(guest.instance_id, SnapshotKind.STANDBY)).warnings == ()
        asked = await frozen(backend, guest)
        partial = place / "catalog" / "web-1" / ".run-1.partial"
        assert modes(partial) == {".": (0o2710, 0), "disks": (0o2700, 0), "process": (0o600, 0), "vmm": (0o2700, USER)}
        await backend.capture(guest.instance_id, asked)
        await backend.resume(guest.instance_id)
        await backend.settle(run_of(backend, guest), ours=False)
        snapshot = await published(backend, guest)
    home = place / "catalog" / "web-1" / snapshot.id
    found = modes(home)
    assert {user for _, user in found.values()} == {0}
    assert found["vmm"][0] & 0o077 == 0
    assert all(mode & 0o077 == 0 for name, (mode, _) in found.items() if name.startswith(("vmm/", "disks")))
    assert found["."][0] == 0o2710
    carry_out(snapshot.restore, RestoreAction.RUN)
    assert {user for name, (_, user) in modes(home).items() if name.startswith("vmm")} == {USER}
    assert (place / "root.raw").stat().st_uid == USER


@both
async def test_a_vmm_that_could_not_get_into_the_catalog_is_refused_before_the_freeze(kind: str, place: Path) -> None:
    async with foreign(kind, place) as (guest, backend):
        with pytest.raises(
            Unsupported, match=rf"user {USER}, which can't get into {place}/catalog .mode 700.*snapshot_"
        ):
            await backend.prepare(guest.instance_id, SnapshotKind.STANDBY)
        with pytest.raises(CaptureFailed, match=r"could not save|Permission denied|os error 13|not a directory"):
            await captured(backend, guest)
        assert await guest.ticks()


async def test_a_vmm_that_gets_into_the_catalog_but_not_to_its_snapshots_is_refused_too(place: Path) -> None:
    (place / "catalog").mkdir()
    (place / "catalog").chmod(0o711)
    async with foreign(FIRECRACKER, place) as (guest, backend):
        with pytest.raises(Unsupported, match=rf"user {USER}, which can't get into {place}/catalog/web-1 .mode 700"):
            await backend.prepare(guest.instance_id, SnapshotKind.STANDBY)


@pytest.mark.parametrize("theirs", [False, True])
async def test_a_group_that_is_set_later_gets_into_what_was_made_before(theirs: bool, place: Path) -> None:
    Catalog(place / "catalog").open(first_use=True)
    home = Catalog(place / "catalog").begin("web-1", "run-0").parent  # type: ignore[arg-type]
    os.chown(place / "catalog", 0, USER)
    (place / "catalog").chmod(0o2710)
    if theirs:
        os.chown(home, OURS, OURS)
    async with foreign(FIRECRACKER, place, snapshot_group=str(USER)) as (guest, backend):
        if theirs:
            with pytest.raises(Unsupported, match=rf"can't get into {home} .mode 700"):
                await backend.prepare(guest.instance_id, SnapshotKind.STANDBY)
            return
        await backend.prepare(guest.instance_id, SnapshotKind.STANDBY)
        assert stat.S_IMODE(home.stat().st_mode) == 0o700  # that changes nothing
        await published(backend, guest)
        assert (stat.S_IMODE(home.stat().st_mode), home.stat().st_gid) == (0o2710, USER)
        home.chmod(0o2775)
        await published(backend, guest, request("run-2"))
        assert stat.S_IMODE(home.stat().st_mode) == 0o2775


@both
async def test_a_vmm_that_its_own_save_would_end_is_refused_and_lives_on(kind: str, tmp_path: Path) -> None:
    async with running_guest(kind, tmp_path, memory=2 * MIB, fsize=MIB) as guest, opened(guest, tmp_path) as backend:
        with pytest.raises(Unsupported, match=r"files of 1.0 MiB at most \(RLIMIT_FSIZE\).*--resource-limit fsize="):
            await backend.prepare(guest.instance_id, SnapshotKind.STANDBY)
        with pytest.raises(CaptureFailed, match="RLIMIT_FSIZE"):
            await captured(backend, guest)
        assert await guest.ticks()
    async with running_guest(kind, tmp_path, fsize=64 * MIB) as guest, opened(guest, tmp_path) as backend:
        await backend.prepare(guest.instance_id, SnapshotKind.STANDBY)
        assert (await published(backend, guest)).size_bytes > MIB


async def test_a_group_that_is_not_there_is_told_by_its_name(place: Path) -> None:
    async with running_guest(FIRECRACKER, place) as guest:
        with pytest.raises(BackendUnavailable, match=r"no group 'no-such-group'.*snapshot_group"):
            async with opened(guest, place, snapshot_group="no-such-group"):
                pass


async def test_below_the_jailer_the_vmm_gets_a_directory_of_its_own(place: Path) -> None:
    chroot = place / "jail" / "web-1" / "root"
    disk = make_disk(chroot / "root.raw")
    disk.chmod(0o640)
    for path in (disk, chroot):
        os.chown(path, USER, USER)
    home = place / "web-1"
    home.mkdir()
    os.chown(home, USER, USER)
    (chroot / "run").mkdir()
    os.chown(chroot / "run", USER, USER)
    socket = chroot / "run" / "firecracker.socket"
    async with (
        running_guest(FIRECRACKER, place, disks=[(disk, "rw")], chroot=chroot, socket=socket, user=USER) as guest,
        opened(guest, place, socket=f"{place}/jail/{{instance}}/root/run/firecracker.socket") as backend,
    ):
        await backend.prepare(guest.instance_id, SnapshotKind.STANDBY)
        asked = await frozen(backend, guest)
        assert modes(chroot / ".hypemand-run-1") == {".": (0o700, USER)}
        await backend.capture(guest.instance_id, asked)
        await backend.resume(guest.instance_id)
        await backend.settle(run_of(backend, guest), ours=False)
        assert not (chroot / ".hypemand-run-1").exists()
        snapshot = await published(backend, guest)
    assert not list(chroot.glob(".hypemand*"))
    assert {user for _, user in modes(place / "catalog" / "web-1" / snapshot.id).values()} == {0}
    disk.unlink()
    (chroot / "root.raw").symlink_to(place / "of-the-host")
    (place / "of-the-host").write_text("not to be touched")
    made_by_the_jailer = [chroot / "dev" / "kvm", chroot / "dev" / "net" / "tun", chroot / "jail.pid"]
    for path in made_by_the_jailer:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    carry_out(snapshot.restore, RestoreAction.RUN)
    assert set(modes(chroot / f"restored-{snapshot.id}").values()) == {(0o700, USER), (0o600, USER)}
    assert not [path for path in (*made_by_the_jailer, socket) if path.exists()]
    assert (place / "of-the-host").read_text() == "not to be touched"
    status = disk.lstat()
    assert (stat.S_ISREG(status.st_mode), status.st_uid, status.st_gid) == (True, USER, USER)
    assert stat.S_IMODE(status.st_mode) == 0o640


async def test_a_catalog_on_another_filesystem_gets_the_jailed_files_too(place: Path, tmp_path: Path) -> None:
    shared = Path(tempfile.mkdtemp(prefix="hypemand-", dir="/dev/shm"))
    try:
        chroot = shared / "web-1" / "root"
        async with running_guest(FIRECRACKER, place, chroot=chroot) as guest, opened(guest, tmp_path) as backend:
            rooms = (await backend.prepare(guest.instance_id, SnapshotKind.STANDBY)).rooms
            assert [room.path for room in rooms] == [chroot, tmp_path / "catalog"]
            asked = await frozen(backend, guest)
            (room,) = (tmp_path / "catalog").glob("*/*/room")
            assert room.stat().st_blocks * 512 >= 1 << 20
            made = await backend.capture(guest.instance_id, asked)
            await backend.resume(guest.instance_id)
            whole = await backend.complete(made)
            assert not room.exists()
            await backend.publish(whole.snapshot)
            assert list(chroot.glob(".hypemand*")) == []
        home = tmp_path / "catalog" / "web-1" / whole.snapshot.id
        assert sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()) == [
            *("disks/0-root.raw", "manifest.json", "vmm/memory", "vmm/state")
        ]
    finally:
        subprocess.run(["rm", "-r", shared], check=True)


@pytest.mark.parametrize(
    ("rules", "may"),
    [
        ([], False),
        (None, False),
        ([{"path": "{}/catalog", "access": "r"}], False),
        ([{"path": "{}/catalog/web-1", "access": "rw"}], False),
        ([{"path": "{}/cat", "access": "rw"}], False),
        ([{"path": "/nowhere", "access": "r"}, {"path": "{}/catalog", "access": "rw"}], True),
        ([{"path": "{}", "access": "w"}], True),
    ],
)
async def test_a_vmm_that_landlock_keeps_from_its_snapshots_is_refused_before_the_freeze(
    rules: list[dict[str, str]] | None, may: bool, tmp_path: Path
) -> None:
    given = rules and [{**rule, "path": rule["path"].format(tmp_path)} for rule in rules]
    for enabled in (True, False):
        config = {"landlock_enable": enabled, "landlock_rules": given}
        directory = tmp_path / str(enabled)
        async with (
            running_guest(CLOUD_HYPERVISOR, directory, config=config, wait=False) as guest,
            opened(guest, tmp_path) as backend,
        ):
            if may or not enabled:
                assert (await backend.prepare(guest.instance_id, SnapshotKind.STANDBY)).warnings == ()
                continue
            with pytest.raises(Unsupported, match=rf"--landlock-rules path={tmp_path}/catalog,access=rw"):
                await backend.prepare(guest.instance_id, SnapshotKind.STANDBY)


async def test_room_for_memory_is_let_go_of_only_as_the_memory_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "CHUNK", MIB)
    monkeypatch.setattr(rooms, "AHEAD", 2 * MIB)
    source, target, room = tmp_path / "memory", tmp_path / "copy", tmp_path / "room"
    source.write_bytes(os.urandom(16 * MIB))
    rooms.reserve(room, 17 * MIB)
    taken = []
    real = os.truncate

    def watched(path: Path, size: int) -> None:
        taken.append((target.stat().st_blocks if target.exists() else 0) * 512 + size)
        real(path, size)

    def not_shared(*_: object) -> bool:
        return False

    monkeypatch.setattr(os, "truncate", watched)
    monkeypatch.setattr(copying, "_reflinked", not_shared)
    await copying.copy_file(source, target, meter=rooms.Exchange(room, 16 * MIB))
    assert len(taken) > 10
    assert all(13 * MIB <= size <= 17 * MIB for size in taken[1:-2])
    assert room.stat().st_size == 0
    assert rooms.Exchange(tmp_path / "none", 1).done_bytes == 0  # where one mount is seen as two, there is none
    assert target.read_bytes() == source.read_bytes()


def test_what_the_vmm_left_that_is_no_file_is_not_taken_over(place: Path) -> None:
    directory = place / "vmm"
    directory.mkdir()
    (directory / "memory").symlink_to("/etc/passwd")
    with pytest.raises(CaptureFailed, match="memory is not a file"):
        take_back(directory, place)
    assert Path("/etc/passwd").stat().st_mode & 0o777 == 0o644


def test_a_directory_that_somebody_put_in_the_place_of_ours_is_not_touched(place: Path) -> None:
    ours = place / "ours"
    ours.mkdir(mode=0o700)
    os.close(open_own(ours))
    os.chown(ours, USER, USER)
    with pytest.raises(BackendUnavailable, match="somebody has changed it"):
        open_own(ours)
    (place / "link").symlink_to("/etc")
    with pytest.raises(OSError, match="link"):
        open_own(place / "link")
    with pytest.raises(OSError, match="link"):
        take_back(place / "link", place)
    assert Path("/etc").stat().st_mode & 0o777 == 0o755


def test_files_of_another_user_are_made_durable_by_their_filesystem(place: Path) -> None:
    """By a process that is not root: it can't open them."""
    made = place / "catalog"
    Catalog(made, 0o2710).open(first_use=True)
    partial = Catalog(made, 0o2710).begin("web-1", "run-1")  # type: ignore[arg-type]
    (partial / "vmm").mkdir()
    (partial / "vmm" / "memory").write_bytes(b"secret")
    (partial / "manifest.json").write_text("{}")
    for path in (made, *made.rglob("*")):
        os.chown(path, OURS, OURS)
    os.chown(partial / "vmm" / "memory", USER, USER)
    (partial / "vmm" / "memory").chmod(0o600)
    script = f"""
import json, os
from pathlib import Path
from hypemand.backends import catalog
os.setgroups([]); os.setgid({OURS}); os.setuid({OURS})
synced = []
real = catalog._syncfs
catalog._syncfs = lambda descriptor: (real(descriptor), synced.append(os.readlink(f"/proc/self/fd/{{descriptor}}")))
catalog.Catalog(Path({str(made)!r})).publish("web-1", "run-1")
catalog.Catalog(Path({str(made)!r})).delete("web-1", "run-1")
print(json.dumps(synced))
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, env=env)
    assert done.stderr == ""
    assert json.loads(done.stdout) == [str(partial / "vmm")]
    assert list((made / "web-1").iterdir()) == []


def test_whether_a_user_gets_through_goes_by_owner_group_and_others(place: Path) -> None:
    inner = place / "a" / "b"
    inner.mkdir(parents=True)
    for path in (place / "a", inner):
        os.chown(path, 0, OURS)
    cases = [(0o755, 0o700, False), (0o700, 0o755, False), (0o711, 0o711, True), (0o750, 0o710, False)]
    for outer_mode, inner_mode, stranger in cases:
        (place / "a").chmod(outer_mode)
        inner.chmod(inner_mode)
        assert (Writer(Peer(0, USER, USER)).why_shut_out(inner) is None) is stranger
    member = Writer(Peer(0, USER, OURS))
    assert member.why_shut_out(inner) is None
    unknown = Writer(Peer(0, 65534, 65534))
    assert unknown.why_shut_out(inner) is None
    inner.chmod(0o700)
    assert "can't get into" in str(unknown.why_shut_out(inner))
    assert Writer(Peer(0, 0, 0)).why_shut_out(inner) is None
    assert Writer(None).why_shut_out(inner) is None


async def test_not_root_hypemand_lets_a_group_in_and_shuts_the_door_again(place: Path) -> None:
    """In a process of its own, which is not root: the VMM is in the group of the catalog."""
    catalog = place / "catalog"
    catalog.mkdir()
    os.chown(catalog, OURS, USER)
    catalog.chmod(0o2710)
    disk = make_disk(place / "root.raw")
    os.chown(disk, USER, USER)
    disk.chmod(0o644)
    for path in (place / "web-1", place / "run"):
        path.mkdir()
        os.chown(path, USER, USER)
    socket = place / "run" / "web-1.sock"
    async with running_guest(FIRECRACKER, place, disks=[(disk, "rw")], socket=socket, user=USER):
        socket.chmod(0o666)
        script = f"""
import json, os
import trio
from pathlib import Path
from hypemand.backends import firecracker, registry
from hypemand.backends.base import Surroundings
from hypemand.core.model import SnapshotKind
from tests.vmm_backend import published, request
from tests.test_vmm_rights import modes
os.setgroups([{USER}]); os.setgid({OURS}); os.setuid({OURS})
async def main():
    given = {{"type": "firecracker", "socket": "{place}/run/{{instance}}.sock", "snapshot_dir": "{catalog}",
             "snapshot_mode": "2710"}}
    backend = registry.connect("vms", given, Surroundings(Path("{place}/state")))
    await backend.open(first_use=True)
    await backend.prepare("web-1", SnapshotKind.STANDBY)
    asked = request()
    await backend.make_ready("web-1", asked)
    during = modes(Path("{catalog}/web-1/.run-1.partial"))
    await backend.pause("web-1", asked)
    made = await backend.capture("web-1", asked)
    await backend.resume("web-1")
    whole = await backend.complete(made)
    await backend.publish(whole.snapshot)
    after = modes(Path("{catalog}/web-1/run-1"))
    await backend.delete_snapshot(whole.snapshot)
    left = [str(path) for path in Path("{catalog}/web-1").iterdir()]
    await backend.aclose()
    print(json.dumps([during, after, left, [step.command for step in whole.snapshot.restore]]))
trio.run(main)
"""
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        done = await trio.run_process(
            [sys.executable, "-c", script], check=False, capture_stdout=True, capture_stderr=True, env=env
        )
    assert done.stderr == b""
    during, after, left, steps = json.loads(done.stdout)
    assert during["vmm"] == [0o730, OURS]
    assert after["vmm"] == [0o700, OURS]
    assert after["vmm/memory"][1] == USER
    assert left == []
    assert f"chown -R {USER}:{USER} {catalog}/web-1/run-1/vmm" in steps
