"""Guests that are not running, captured in their disks with the real qemu-img."""

import json
import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from hypemand.backends import registry
from hypemand.backends.base import (
    Backend,
    BackendUnavailable,
    CaptureFailed,
    CaptureRequest,
    Settled,
    Status,
    Surroundings,
    Unsupported,
)
from hypemand.backends.qemu import images
from hypemand.backends.qemu.disks import Disk
from hypemand.core.errors import InvalidInput
from hypemand.core.model import Freezer, InstanceId, InstanceState, Snapshot, SnapshotKind
from tests.qemu_backend import (
    TAG,
    WEB,
    captured,
    drafts_in,
    make_backend,
    new_request,
    settle,
    tags_on,
    take,
)
from tests.qemu_guest import blockdev, make_disk, require_qemu, run_img, running_guest
from tests.runs import run_of

pytestmark = pytest.mark.qemu


@pytest.fixture(autouse=True)
def _needs_qemu() -> None:
    require_qemu()


def stopped_guest(tmp_path: Path, *disks: str) -> Path:
    """The directory of a guest that is not running, with *disks* in it."""
    home = tmp_path / WEB
    home.mkdir()
    for name in disks or ("disk.qcow2",):
        make_disk(home / name)
    return home


async def stopped_backend(tmp_path: Path) -> Backend:
    backend = make_backend(tmp_path / "{instance}" / "qmp.sock", tmp_path, disks=[f"{tmp_path}/{{instance}}/*.qcow2"])
    await backend.open(first_use=True)
    return backend


def request_for(name: str = TAG) -> CaptureRequest:
    return new_request(name, kind=SnapshotKind.STOPPED, freezes=None)


async def take_stopped(backend: Backend, name: str = TAG) -> Snapshot:
    return await take(backend, name, kind=SnapshotKind.STOPPED, freezes=None)


def tags_in(disk: Path) -> list[str]:
    return [found["name"] for found in json.loads(run_img("info", "--output=json", disk)).get("snapshots", ())]


async def test_a_guest_without_a_monitor_but_with_disks_is_stopped_captured_listed_and_deleted(tmp_path: Path) -> None:
    home = stopped_guest(tmp_path, "a.qcow2", "b.qcow2")
    backend = await stopped_backend(tmp_path)
    assert backend.capabilities.kinds == {SnapshotKind.STANDBY, SnapshotKind.STOPPED}
    assert await backend.instances() == {WEB}
    assert await backend.state(WEB) == Status(InstanceState.STOPPED)
    prepared = await backend.prepare(WEB, SnapshotKind.STOPPED)
    assert [room.path for room in prepared.rooms] == [home / "a.qcow2", home / "b.qcow2"]
    made = (await captured(backend, request_for())).snapshot
    assert await backend.list_snapshots(WEB) == ()
    await backend.publish(made)
    assert await backend.list_snapshots(WEB) == (made,)
    assert made.kind is SnapshotKind.STOPPED
    assert (tags_in(home / "a.qcow2"), tags_in(home / "b.qcow2")) == ([TAG], [TAG])
    assert (await backend.prepare(WEB, SnapshotKind.STOPPED)).taken_names == {TAG}
    await backend.delete_snapshot(made)
    await backend.delete_snapshot(made)
    assert await backend.list_snapshots(WEB) == ()
    assert (tags_in(home / "a.qcow2"), tags_in(home / "b.qcow2")) == ([], [])


async def test_standby_and_stopped_snapshots_are_in_one_list_whether_the_guest_runs_or_not(tmp_path: Path) -> None:
    async with running_guest(tmp_path) as guest:
        disks = [str(tmp_path / "{instance}.qcow2")]
        backend = make_backend(guest.socket_template, tmp_path, disks=disks)
        await backend.open(first_use=True)
        standby = await take(backend, "standby")
        assert await backend.list_snapshots(WEB) == (standby,)
    stopped = await take_stopped(backend, "stopped")
    assert await backend.list_snapshots(WEB) == (standby, stopped)
    async with running_guest(tmp_path) as guest:
        backend = make_backend(guest.socket_template, tmp_path, disks=disks)
        in_background = make_backend(guest.socket_template, tmp_path, disks=disks, mode="background")
        assert await backend.list_snapshots(WEB) == (standby, stopped)
        again = await take(in_background, "again", freezes=Freezer.ENGINE)
        await backend.delete_snapshot(stopped)
        assert await backend.list_snapshots(WEB) == (standby, again)
        assert await tags_on(guest) == {"disk0": ["standby", "again"]}
    await backend.delete_snapshot(standby)
    assert await backend.list_snapshots(WEB) == (again,)
    await backend.delete_snapshot(again)
    assert tags_in(tmp_path / "web-1.qcow2") == []


async def test_a_name_that_is_taken_fails_though_qemu_img_would_give_it_twice(tmp_path: Path) -> None:
    home = stopped_guest(tmp_path)
    backend = await stopped_backend(tmp_path)
    run_img("snapshot", "-c", TAG, home / "disk.qcow2")
    request = request_for()
    with pytest.raises(CaptureFailed, match=f"snapshot {TAG} already, on disk.qcow2"):
        await captured(backend, request)
    assert await settle(backend, request) == Settled()
    assert tags_in(home / "disk.qcow2") == [TAG]


async def test_an_operators_snapshot_of_the_same_name_is_neither_listed_nor_deleted(tmp_path: Path) -> None:
    home = stopped_guest(tmp_path)
    backend = await stopped_backend(tmp_path)
    made = await take_stopped(backend)
    run_img("snapshot", "-d", TAG, home / "disk.qcow2")
    run_img("snapshot", "-c", TAG, home / "disk.qcow2")
    assert await backend.list_snapshots(WEB) == ()
    await backend.delete_snapshot(made)
    assert tags_in(home / "disk.qcow2") == [TAG]


async def test_a_guest_that_starts_in_between_fails_the_run_with_an_error_that_says_so(tmp_path: Path) -> None:
    """The image lock of QEMU is what makes that safe."""
    async with running_guest(tmp_path) as guest:
        elsewhere = make_backend(tmp_path / "{instance}.sock", tmp_path, disks=[str(tmp_path / "{instance}.qcow2")])
        await elsewhere.open(first_use=True)
        assert await elsewhere.state(WEB) == Status(InstanceState.STOPPED)
        await elsewhere.prepare(WEB, SnapshotKind.STOPPED)
        request = request_for()
        with pytest.raises(CaptureFailed, match=r"a running QEMU holds .* started during its capture.*-qmp unix"):
            await captured(elsewhere, request)
        assert await settle(elsewhere, request) == Settled()
        assert drafts_in(tmp_path) == []
        assert await elsewhere.list_snapshots(WEB) == ()
        assert await tags_on(guest) == {"disk0": []}
        await guest.next_ticks()


async def test_a_guest_that_starts_between_two_disks_leaves_no_half_a_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "more" / WEB).mkdir(parents=True)
    second = make_disk(tmp_path / "more" / WEB / "second.qcow2")
    make_disk(tmp_path / "web-1.qcow2")
    patterns = [f"{tmp_path}/{{instance}}.qcow2", f"{tmp_path}/more/{{instance}}/*.qcow2"]
    stopped = make_backend(tmp_path / "{instance}.sock", tmp_path, disks=patterns)
    await stopped.open(first_use=True)
    request = request_for()
    create = images.create

    async def create_one_and_start(disk: Disk, tag: str) -> None:
        if disk.device != "web-1.qcow2":
            raise images.ImageInUse("a running QEMU holds it")
        await create(disk, tag)

    monkeypatch.setattr(images, "create", create_one_and_start)
    with pytest.raises(CaptureFailed, match="started"):
        await captured(stopped, request)
    assert tags_in(tmp_path / "web-1.qcow2") == [TAG]
    async with running_guest(tmp_path, extra=blockdev("disk1", second)) as guest:
        backend = make_backend(guest.socket_template, tmp_path, disks=patterns)
        assert await settle(backend, request) == Settled()
        assert await tags_on(guest) == {"disk0": [], "disk1": []}
    assert drafts_in(tmp_path) == []


async def test_a_capture_that_was_interrupted_is_adopted_whole_or_removed(tmp_path: Path) -> None:
    home = stopped_guest(tmp_path, "a.qcow2", "b.qcow2")
    backend = await stopped_backend(tmp_path)
    whole, partial = request_for("whole"), request_for("partial")
    await captured(backend, whole)
    await captured(backend, partial)
    run_img("snapshot", "-d", "partial", home / "b.qcow2")
    adopted = await settle(backend, whole)
    assert adopted.snapshot is not None
    assert await settle(backend, whole) == adopted
    assert await settle(backend, partial) == Settled()
    assert await backend.list_snapshots(WEB) == (adopted.snapshot,)
    assert (tags_in(home / "a.qcow2"), tags_in(home / "b.qcow2")) == (["whole"], ["whole"])
    assert drafts_in(tmp_path) == []


async def test_a_cancelled_capture_lets_qemu_img_finish_and_is_settled(tmp_path: Path) -> None:
    home = stopped_guest(tmp_path)
    backend = await stopped_backend(tmp_path)
    request = request_for()
    with trio.move_on_after(0.03):
        await captured(backend, request)
    with trio.fail_after(30):
        while True:
            try:
                settled = await settle(backend, request)
                break
            except BackendUnavailable:
                await trio.sleep(0.01)
    assert tags_in(home / "disk.qcow2") == ([TAG] if settled.snapshot else [])
    assert run_img("check", home / "disk.qcow2").startswith("No errors")


async def test_neither_socket_nor_disks_is_unavailable_never_not_found(tmp_path: Path) -> None:
    home = stopped_guest(tmp_path)
    backend = await stopped_backend(tmp_path)
    made = await take_stopped(backend)
    home.rename(tmp_path / ".unmounted")
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: backend.state(WEB),
        lambda: backend.prepare(WEB, SnapshotKind.STOPPED),
        lambda: backend.list_snapshots(WEB),
        lambda: backend.delete_snapshot(made),
        backend.instances,
    ]
    for call in calls:
        with pytest.raises(BackendUnavailable, match=r"mounted|missing"):
            await call()
    (tmp_path / ".unmounted").rename(home)
    assert await backend.list_snapshots(WEB) == (made,)


async def test_a_directory_without_disks_is_unavailable_too(tmp_path: Path) -> None:
    home = stopped_guest(tmp_path)
    backend = await stopped_backend(tmp_path)
    (home / "disk.qcow2").rename(home / "disk.gone")
    with pytest.raises(BackendUnavailable, match=r"no disk fits .*\.qcow2"):
        await backend.state(WEB)


async def test_without_the_setting_disks_a_guest_that_is_down_is_unavailable_and_never_stopped(tmp_path: Path) -> None:
    stopped_guest(tmp_path)
    backend = make_backend(tmp_path / "{instance}" / "qmp.sock", tmp_path)
    await backend.open(first_use=True)
    assert backend.capabilities.kinds == {SnapshotKind.STANDBY}
    with pytest.raises(BackendUnavailable, match="there is no monitor"):
        await backend.state(WEB)
    with pytest.raises(Unsupported, match="disks"):
        await backend.prepare(WEB, SnapshotKind.STOPPED)


async def test_a_monitor_without_a_greeting_is_busy_never_stopped(tmp_path: Path) -> None:
    stopped_guest(tmp_path)
    backend = await stopped_backend(tmp_path)
    backend.monitors.patience_s = 0.2  # type: ignore[attr-defined]
    socket = trio.socket.socket(trio.socket.AF_UNIX)
    with socket:
        await socket.bind(str(tmp_path / WEB / "qmp.sock"))
        socket.listen(1)
        with pytest.raises(BackendUnavailable, match="no greeting"):
            await backend.state(WEB)
    # Its process has ended: now the socket refuses.
    assert await backend.state(WEB) == Status(InstanceState.STOPPED)


async def test_a_disk_that_is_only_the_base_of_another_is_left_alone(tmp_path: Path) -> None:
    home = stopped_guest(tmp_path, "base.qcow2")
    run_img("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", home / "disk.qcow2")
    backend = await stopped_backend(tmp_path)
    await take_stopped(backend)
    assert (tags_in(home / "base.qcow2"), tags_in(home / "disk.qcow2")) == ([], [TAG])


async def test_a_disk_of_another_format_is_refused_by_name(tmp_path: Path) -> None:
    home = stopped_guest(tmp_path)
    (home / "data.qcow2").write_bytes(bytes(1 << 20))
    backend = await stopped_backend(tmp_path)
    with pytest.raises(Unsupported, match=r"data\.qcow2 .*not qcow2.*qemu-img convert.*disks"):
        await backend.prepare(WEB, SnapshotKind.STOPPED)
    with pytest.raises(Unsupported):
        await captured(backend, request_for())
    assert tags_in(home / "disk.qcow2") == []


async def test_links_to_disks_are_the_disks(tmp_path: Path) -> None:
    """Else a snapshot made while the guest ran would not be found when it is stopped."""
    (tmp_path / "real").mkdir()
    (tmp_path / "vms").symlink_to(tmp_path / "real")
    disks = [str(tmp_path / "vms" / "{instance}.qcow2")]
    async with running_guest(tmp_path / "real") as guest:
        backend = make_backend(guest.socket_template, tmp_path, disks=disks)
        await backend.open(first_use=True)
        assert (await backend.prepare(WEB, SnapshotKind.STANDBY)).warnings == ()
        made = await take(backend)
    assert await backend.list_snapshots(WEB) == (made,)


async def test_a_disk_that_no_pattern_fits_is_warned_about_while_the_guest_runs(tmp_path: Path) -> None:
    second = make_disk(tmp_path / "second.qcow2")
    async with running_guest(tmp_path, extra=blockdev("disk1", second)) as guest:
        backend = make_backend(guest.socket_template, tmp_path, disks=[str(tmp_path / "{instance}.qcow2")])
        await backend.open(first_use=True)
        (warning,) = (await backend.prepare(WEB, SnapshotKind.STANDBY)).warnings
        assert str(second) in warning


async def test_without_qemu_img_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped_guest(tmp_path)
    backend = await stopped_backend(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unsupported, match="apt-get install qemu-utils"):
        await backend.prepare(WEB, SnapshotKind.STOPPED)


async def test_a_guest_that_goes_down_after_its_capture_is_settled_by_its_disks(tmp_path: Path) -> None:
    request = new_request()
    disks = [str(tmp_path / "{instance}.qcow2")]
    async with running_guest(tmp_path) as guest:
        backend = make_backend(guest.socket_template, tmp_path, disks=disks)
        await backend.open(first_use=True)
        await captured(backend, request)
    settled = await settle(backend, request)
    assert settled.snapshot is not None
    assert await backend.list_snapshots(WEB) == (settled.snapshot,)


async def test_an_interrupted_run_is_not_settled_while_a_qemu_without_its_monitor_holds_the_disks(
    tmp_path: Path,
) -> None:
    async with running_guest(tmp_path) as guest:
        backend = make_backend(guest.socket_template, tmp_path)
        await backend.open(first_use=True)
        request = new_request()
        await captured(backend, request)
        guest.socket.rename(guest.socket.with_suffix(".away"))
        with pytest.raises(BackendUnavailable, match="a running QEMU holds"):
            await backend.settle(run_of(request, backend, WEB), ours=True)
        guest.socket.with_suffix(".away").rename(guest.socket)
        assert (await settle(backend, request)).snapshot is not None


async def test_disks_alone_make_an_instance_known(tmp_path: Path) -> None:
    for name in ("a", "b.c", ".hidden", "d e"):
        (tmp_path / "vms" / name).mkdir(parents=True)
        shutil.copyfile(__file__, tmp_path / "vms" / name / "root.qcow2")
    (tmp_path / "vms" / "empty").mkdir()
    (tmp_path / "vms" / "odd" / "root.qcow2").mkdir(parents=True)
    backend = make_backend(tmp_path / "{instance}.sock", tmp_path, disks=[f"{tmp_path}/vms/{{instance}}/*.qcow2"])
    assert await backend.instances() == {InstanceId("a"), InstanceId("b.c")}


@pytest.mark.parametrize(
    ("pattern", "rule"),
    [
        ("/vms/*.qcow2", "must have {instance}"),
        ("/vms/{instance}-*.qcow2", "must not have a wildcard beside"),
        ("/vms/{instance}/**/*.qcow2", "without \\*\\*"),
        ("/vms/{instance}-data.qcow2", "fit the same file for two ids"),
    ],
)
def test_patterns_that_could_mix_up_guests_are_refused(tmp_path: Path, pattern: str, rule: str) -> None:
    settings = {"type": "qemu", "socket": "/run/{instance}.sock", "disks": ["/vms/{instance}.qcow2", pattern]}
    with pytest.raises(InvalidInput, match=rule) as caught:
        registry.connect("vms", settings, Surroundings(tmp_path))
    assert [problem.path for problem in caught.value.problems] == ["disks[1]"]


def test_the_connection_with_disks_is_the_same_after_a_way_through_json(tmp_path: Path) -> None:
    settings = {"type": "qemu", "socket": "/run/{instance}.sock", "disks": ["/vms/{instance}/*.qcow2"]}
    told = registry.connect("vms", settings, Surroundings(tmp_path)).connection
    assert json.loads(json.dumps(told)) == told
    assert registry.connect("vms", told, Surroundings(tmp_path)).connection == told


async def test_looking_at_a_stopped_guest_does_not_disturb_its_capture(tmp_path: Path) -> None:
    stopped_guest(tmp_path)
    backend, other = await stopped_backend(tmp_path), await stopped_backend(tmp_path)

    async def look() -> None:
        while True:
            await other.list_snapshots(WEB)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        nursery.start_soon(look)
        for number in range(10):
            await take_stopped(backend, f"n-{number}")
        nursery.cancel_scope.cancel()
    assert len(await backend.list_snapshots(WEB)) == 10


async def test_one_hung_image_holds_up_no_other_guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.which("qemu-img")
    programs = tmp_path / "bin"
    programs.mkdir()
    script = programs / "qemu-img"
    hung = tmp_path / "hung"
    hung.touch()
    wait = f'while [ -e "{hung}" ]; do sleep 0.1; done; exit 1'
    script.write_text(f'#!/bin/sh\ncase "$*" in *bad*) {wait};; esac\nexec {real} "$@"\n')
    script.chmod(0o700)
    for name in ("bad", "good"):
        (tmp_path / name).mkdir()
        make_disk(tmp_path / name / "disk.qcow2")
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    backend = await stopped_backend(tmp_path)
    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(backend.list_snapshots, InstanceId("bad"))
        await trio.sleep(0.2)
        with trio.fail_after(15):
            assert await backend.list_snapshots(InstanceId("good")) == ()
        nursery.cancel_scope.cancel()
    hung.unlink()
