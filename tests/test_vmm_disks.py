"""Which files a guest's disks are, and how they are copied: shared where that is possible, whole in any case."""

import fcntl
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hypemand.backends import copying, reflinks
from hypemand.backends.base import BackendUnavailable, CaptureFailed, Unsupported
from hypemand.backends.catalog import Catalog, Manifest
from hypemand.backends.meter import Meter
from hypemand.backends.reflinks import can_reflink
from hypemand.backends.vmm.dialect import Drive
from hypemand.backends.vmm.disks import copy_disks, disks_of, locked, read_disk, signs_of
from hypemand.backends.vmm.views import View
from hypemand.core.model import InstanceId, RestoreAction, SnapshotKind
from tests.vmm_backend import THEN, carry_out, published, running
from tests.vmm_guest import CLOUD_HYPERVISOR, FIRECRACKER, KINDS, MIB, count_in, make_disk
from tests.xfs import loop_device, mounted_xfs


@pytest.fixture
def xfs(tmp_path: Path) -> Iterator[Path]:
    with mounted_xfs(tmp_path) as where:
        yield where


def qcow2(path: Path, backing: bytes | None) -> Path:
    """The header of an image, and the name of what it stands on."""
    name = backing or b""
    header = struct.pack(">4sIQI", b"QFI\xfb", 3, 512 if name else 0, len(name)).ljust(512, b"\0")
    path.write_bytes(header + name)
    return path


def test_an_overlay_tells_what_it_stands_on(tmp_path: Path) -> None:
    top = qcow2(tmp_path / "top.qcow2", b"/images/base.qcow2")
    assert read_disk(top, qcow2=True).backing == "/images/base.qcow2"
    assert read_disk(qcow2(tmp_path / "alone.qcow2", None), qcow2=True).backing is None
    assert read_disk(make_disk(tmp_path / "raw"), qcow2=True).backing is None
    (tmp_path / "tiny").write_bytes(b"QFI\xfb")
    assert read_disk(tmp_path / "tiny", qcow2=True).backing is None
    assert read_disk(top).backing is None  # a raw disk: its guest wrote that


def test_what_an_image_says_it_stands_on_is_text_whatever_bytes_are_there(tmp_path: Path) -> None:
    odd = read_disk(qcow2(tmp_path / "odd.qcow2", b"a\xff\xfe\n\x1b[2J\x00b"), qcow2=True)
    assert odd.backing == r"a\xff\xfe\n\x1b[2J\x00b"


@pytest.mark.parametrize(
    ("kind", "config"),
    [(FIRECRACKER, {}), (CLOUD_HYPERVISOR, {"image_type": "Raw"})],
)
async def test_a_guest_that_writes_the_header_of_an_image_into_its_raw_disk_is_captured_as_ever(
    kind: str, config: dict[str, str], tmp_path: Path
) -> None:
    data = qcow2(tmp_path / "data.raw", b"\xff\xfe\x00\x01")
    disks = [(make_disk(tmp_path / "root.raw"), "rw"), (data, "rw")]
    if config:
        given = [{"path": str(path), "readonly": False, **config} for path, _ in disks]
        options: dict[str, Any] = {"config": {"disks": given}}
    else:
        options = {}
    async with running(kind, tmp_path, disks=disks, tick_s=3600, wait=False, **options) as (guest, backend):
        assert (await backend.prepare(guest.instance_id, SnapshotKind.STANDBY)).warnings == ()
        await published(backend, guest)
    (manifest,) = (tmp_path / "catalog").glob("*/*/manifest.json")
    assert "backing" not in manifest.read_text()


def test_a_manifest_is_written_whatever_text_is_in_it(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    catalog.open(first_use=True)
    catalog.begin(InstanceId("web-1"), "run-1")
    given: dict[str, Any] = {"name": "n", "kind": SnapshotKind.STANDBY, "tags": {}, "created_at": THEN, "size_bytes": 0}
    made = Manifest(id="run-1", instance_id=InstanceId("web-1"), details={"file": "/d/\udcff"}, **given)
    catalog.write_manifest(made)
    catalog.publish(InstanceId("web-1"), "run-1")
    assert [manifest.details["file"] for manifest in catalog.manifests(InstanceId("web-1"))] == [r"/d/\udcff"]


async def test_an_overlay_is_captured_with_a_warning_and_its_base_in_the_manifest(tmp_path: Path) -> None:
    top = qcow2(tmp_path / "top.qcow2", b"/images/base.qcow2")
    disks = [(make_disk(tmp_path / "root.raw"), "rw"), (top, "rw")]
    given: dict[str, Any] = {"disks": disks, "tick_s": 3600, "wait": False, "version": "54.0"}
    async with running(CLOUD_HYPERVISOR, tmp_path, **given) as (guest, backend):
        ready = await backend.prepare(guest.instance_id, SnapshotKind.STANDBY)
        assert f"{top} is an overlay" in ready.warnings[0]
        assert "/images/base.qcow2 as it is now" in ready.warnings[0]
        await published(backend, guest)
    (manifest,) = (tmp_path / "catalog").glob("*/*/manifest.json")
    assert '"backing": "/images/base.qcow2"' in manifest.read_text()


@pytest.mark.parametrize("version", ["51.1", "53.0", "v53.0-12-gabc", "", "new"])
async def test_an_image_of_which_the_vmm_may_keep_part_in_its_memory_is_refused(version: str, tmp_path: Path) -> None:
    disks = [(make_disk(tmp_path / "root.raw"), "rw"), (qcow2(tmp_path / "data", None), "rw")]
    given: dict[str, Any] = {"disks": disks, "tick_s": 3600, "wait": False, "version": version}
    async with running(CLOUD_HYPERVISOR, tmp_path, **given) as (guest, backend):
        with pytest.raises(Unsupported, match=r"data: Cloud Hypervisor .* tables of a qcow2 image.*Use a raw disk"):
            await backend.prepare(guest.instance_id, SnapshotKind.STANDBY)
        with pytest.raises(CaptureFailed, match="tables of a qcow2 image"):
            await published(backend, guest)
        assert guest.state() == "Running"


async def test_an_image_that_the_guest_only_reads_and_one_that_is_written_down_whole_are_captured(
    tmp_path: Path,
) -> None:
    image = qcow2(tmp_path / "data", None)
    for mode, version in (("ro", "51.1"), ("rw", "54.0"), ("rw", "v54.1")):
        disks = [(make_disk(tmp_path / "root.raw"), "rw"), (image, mode)]
        given: dict[str, Any] = {"disks": disks, "tick_s": 3600, "wait": False, "version": version}
        async with running(CLOUD_HYPERVISOR, tmp_path / f"{mode}{version}", **given) as (guest, backend):
            await backend.prepare(guest.instance_id, SnapshotKind.STANDBY)
            assert (await published(backend, guest)).size_bytes > 0


def test_one_file_that_is_two_drives_is_one_disk_and_links_lead_to_it(tmp_path: Path) -> None:
    file = make_disk(tmp_path / "disk.raw")
    (tmp_path / "link").symlink_to("disk.raw")
    found = disks_of([Drive("a", str(file)), Drive("b", str(tmp_path / "link"))], View())
    assert [disk.file for disk in found] == [file]
    assert disks_of([Drive("a", str(file), read_only=True), Drive("b", None, read_only=True)], View()) == ()


def test_what_is_no_disk_is_refused_and_what_is_not_seen_is_unavailable(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for odd in (tmp_path / "pipe", tmp_path, Path("/dev/null")):
        with pytest.raises(Unsupported, match="neither a file nor a block device"):
            disks_of([Drive("a", str(odd))], View())
    with pytest.raises(BackendUnavailable, match=r"not seen from here.*is its filesystem mounted"):
        disks_of([Drive("a", str(tmp_path / "none"))], View())
    with pytest.raises(Unsupported, match=r"relative path disk.raw.*absolute paths"):
        disks_of([Drive("a", "disk.raw")], View())


def test_below_a_chroot_no_path_leads_out_of_it(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", make_disk(tmp_path / "secret")
    disk = make_disk(root / "images" / "disk.raw")
    (root / "absolute").symlink_to("/images/disk.raw")
    (root / "images" / "up").symlink_to("../../../../images/disk.raw")
    (root / "folder").symlink_to("/images")
    (root / "escape").symlink_to(outside)
    (root / "dots").symlink_to("../secret")
    (root / "loop").symlink_to("loop")
    view = View(root)
    for told in (
        "/images/disk.raw",
        "images/disk.raw",
        "/absolute",
        "/images/up",
        "/folder/disk.raw",
        "/images/../absolute",
    ):
        assert view.held(told)[1] == disk
    for told in ("/escape", "/dots", "/../secret", "/folder/../../../secret"):
        with pytest.raises(BackendUnavailable):
            view.held(told)
    with pytest.raises(Unsupported, match="too many links"):
        view.held("/loop")
    assert view.name_of(root / "a" / "b") == "/a/b"


def test_a_lock_for_writing_is_seen_and_one_for_reading_is_none(tmp_path: Path) -> None:
    file = make_disk(tmp_path / "disk.raw")
    assert locked([file]) == []
    with file.open("r+b") as opened:
        for kind, expected in ((fcntl.F_RDLCK, []), (fcntl.F_WRLCK, [str(file)])):
            fcntl.fcntl(opened, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, 0, 0, 0, 0))
            assert locked([file]) == expected
    assert locked([file]) == []


def test_a_write_changes_the_sign_of_a_disk(tmp_path: Path) -> None:
    disk = read_disk(make_disk(tmp_path / "disk.raw"))
    before = signs_of([disk])
    assert signs_of([disk]) == before
    with disk.file.open("r+b") as file:
        file.write(b"x")
    os.utime(disk.file, ns=(0, before[0][3] + 1))
    assert signs_of([disk]) != before


async def test_all_disks_are_copied_and_one_that_fails_ends_the_others(tmp_path: Path) -> None:
    disks = [read_disk(make_disk(tmp_path / str(number) / "d")) for number in range(6)]
    meter = Meter()
    sizes = await copy_disks(disks, _made(tmp_path / "good"), meter)
    assert sizes == {f"{number}-d": MIB for number in range(6)}
    assert 0 < meter.done_bytes <= meter.total_bytes
    (_made(tmp_path / "bad") / "2-d").touch()
    with pytest.raises(CaptureFailed, match="2/d can't be copied"):
        await copy_disks(disks, tmp_path / "bad", Meter())


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory


def test_a_filesystem_without_reflinks_is_known_and_nothing_is_left_of_the_try(tmp_path: Path) -> None:
    file, where = make_disk(tmp_path / "d"), _made(tmp_path / "to")
    assert can_reflink(file, Path("/dev/shm")) is False
    assert can_reflink(tmp_path / "none", where) is False
    assert list(where.iterdir()) == []


def test_a_filesystem_that_answers_for_all_files_can_reflink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(fcntl, "ioctl", lambda _fd, request, argument: asked.append((request, argument)))
    assert can_reflink(make_disk(tmp_path / "d", size=4 * MIB), tmp_path)
    ((number, argument),) = asked
    assert number == 0x4020940D
    assert struct.unpack("qQQQ", argument)[1:] == (0, MIB, 0)


async def test_on_xfs_a_copy_shares_its_data_and_takes_no_room(xfs: Path) -> None:
    disk = read_disk(make_disk(xfs / "d", size=64 * MIB, data=32 * MIB))
    assert can_reflink(disk.file, xfs)
    assert not can_reflink(disk.file, Path("/dev/shm"))
    used = os.statvfs(xfs).f_bfree
    sizes = await copy_disks([disk], _made(xfs / "to"), Meter())
    assert sizes == {"0-d": 64 * MIB}
    assert (used - os.statvfs(xfs).f_bfree) * 4096 < MIB
    assert (xfs / "to" / "0-d").read_bytes() == disk.file.read_bytes()


@pytest.mark.parametrize("kind", KINDS)
async def test_disks_that_can_be_reflinked_need_no_room_and_others_get_advice(
    kind: str, xfs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reflinks, "MUCH", MIB)
    disks = [(make_disk(xfs / "root.raw", size=64 * MIB, data=32 * MIB), "rw")]
    async with running(kind, xfs, disks=disks) as (guest, backend):
        ready = await backend.prepare(guest.instance_id, SnapshotKind.STANDBY)
        assert ready.advice == ()
        assert ready.rooms[0].needed_bytes < 20 * MIB
    async with running(kind, tmp_path / "other", disks=disks) as (guest, backend):
        ready = await backend.prepare(guest.instance_id, SnapshotKind.STANDBY)
        assert "MiB of data to be copied while the guest stands still" in ready.advice[0]
        assert ready.rooms[0].needed_bytes > 32 * MIB


async def test_a_block_device_is_copied_without_its_zeros_and_put_back_with_them(tmp_path: Path) -> None:
    image = make_disk(tmp_path / "image", size=8 * MIB, data=MIB)
    with loop_device(image) as device:
        disks = [(make_disk(tmp_path / "root.raw"), "rw"), (device, "rw")]
        async with running(FIRECRACKER, tmp_path, disks=disks) as (guest, backend):
            snapshot = await published(backend, guest)
        (copy,) = (tmp_path / "catalog").glob(f"*/*/disks/1-{device.name}")
        assert copy.stat().st_size == 8 * MIB
        assert copy.stat().st_blocks * 512 <= 2 * MIB
        device.write_bytes(b"\xff" * 8 * MIB)
        carry_out(snapshot.restore, RestoreAction.RUN)
        assert count_in(device) == count_in(copy) > 0
        assert subprocess.run(["cmp", device, copy], check=False).returncode == 0


async def test_data_that_is_zeros_becomes_a_hole_where_nothing_else_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_possible(*_: object) -> int:
        raise OSError(22, "no")

    monkeypatch.setattr(os, "copy_file_range", not_possible)
    source = tmp_path / "d"
    source.write_bytes(bytes(3 * MIB) + b"x" * 100 + bytes(MIB) + b"end")
    assert await copying.copy_file(source, tmp_path / "copy") == 4 * MIB + 103
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
    assert (tmp_path / "copy").stat().st_blocks < source.stat().st_blocks


async def test_cloud_hypervisor_and_its_lock_do_not_keep_a_disk_from_being_copied(tmp_path: Path) -> None:
    async with running(CLOUD_HYPERVISOR, tmp_path) as (guest, backend):
        assert locked(guest.disks) == [str(guest.disks[0])]
        assert (await published(backend, guest)).size_bytes > MIB
