"""docs/restore.md says what manifests say, for guests of Cloud Hypervisor and Firecracker."""

import re
from pathlib import Path

import pytest
from attrs import evolve

from hypemand.backends.cloud_hypervisor import CloudHypervisor
from hypemand.backends.firecracker import Firecracker
from hypemand.backends.vmm.client import Peer
from hypemand.backends.vmm.dialect import Dialect, Identity
from hypemand.backends.vmm.disks import Disk
from hypemand.backends.vmm.manifest import Contents, Way, manifest_of
from hypemand.backends.vmm.rights import Writer
from hypemand.core.model import InstanceId, RestoreAction, RestoreStep, SnapshotKind
from tests.vmm_backend import request

PAGE = Path(__file__).parent.parent / "docs" / "restore.md"
ID = "01JP0ZK3"
WEB = InstanceId("web-1")
GUESTS = Writer(Peer(4711, 110, 114))


def block(part: str) -> list[str]:
    (found,) = re.findall(rf"<!-- {re.escape(part)} -->\n```\w+\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return [line for line in found.splitlines() if line]


def steps_of(
    dialect: Dialect,
    catalog: str,
    disk: str,
    socket: str,
    *,
    writer: Writer = GUESTS,
    chroot: str | None = None,
    kind: SnapshotKind = SnapshotKind.STANDBY,
) -> tuple[RestoreStep, ...]:
    file, root = Path(disk), None if chroot is None else Path(chroot)
    drive = Disk("root", file, 1, 1, root=root, owner=(110, 114) if writer is GUESTS else None, mode="640")
    contents = Contents([drive], {f"0-{file.name}": 1}, dict.fromkeys(dialect.saved, 1))
    way = Way(dialect, Path(catalog) / WEB / ID, Path(socket), writer, root)
    return manifest_of(WEB, request(ID, kind), contents, way, Identity()).restore


def commands(steps: tuple[RestoreStep, ...], action: RestoreAction) -> list[str]:
    return [step.command for step in steps if step.action is action]


def test_the_page_has_the_steps_for_cloud_hypervisor() -> None:
    steps = steps_of(CloudHypervisor(), "/srv/snapshots/ch", "/var/lib/ch/web-1/root.raw", "/run/ch/web-1.sock")
    (start,) = commands(steps, RestoreAction.START)
    whole = f"cloud-hypervisor --api-socket /run/ch/web-1.sock {start}"
    assert [*commands(steps, RestoreAction.RUN), whole] == block("cloud-hypervisor")
    assert commands(steps, RestoreAction.MONITOR) == block("cloud-hypervisor, monitor")


def test_the_page_has_the_steps_for_firecracker() -> None:
    steps = steps_of(Firecracker(), "/srv/snapshots/fc", "/var/lib/fc/web-1/root.ext4", "/run/fc/web-1.sock")
    start = "firecracker --api-sock /run/fc/web-1.sock"
    assert [*commands(steps, RestoreAction.RUN), start] == block("firecracker")
    assert commands(steps, RestoreAction.MONITOR) == block("firecracker, monitor")


def test_the_page_has_the_steps_below_the_jailer() -> None:
    root = "/srv/jailer/firecracker/web-1/root"
    disk, socket = f"{root}/root.ext4", f"{root}/run/firecracker.socket"
    steps = steps_of(Firecracker(), "/srv/jailer/snapshots", disk, socket, chroot=root)
    assert commands(steps, RestoreAction.RUN) == block("jailed")
    (load,) = commands(steps, RestoreAction.MONITOR)
    assert f'"snapshot_path": "/restored-{ID}/state"' in load
    assert f'"backend_path": "/restored-{ID}/memory"' in load


@pytest.mark.parametrize(("uid", "wanted"), [(0, None), (65534, "chmod 710"), (4711, "chown -R 4711:114")])
def test_the_vmms_user_is_let_in_where_it_has_to_be(uid: int, wanted: str | None) -> None:
    writer = Writer(Peer(1, uid, 114))
    steps = steps_of(CloudHypervisor(), "/s", "/d/root.raw", "/run/web-1.sock", writer=writer)
    others = [command for command in commands(steps, RestoreAction.RUN) if not command.startswith(("cp ", "rm "))]
    assert others == ([] if wanted is None else [f"{wanted} /s/web-1/{ID}/vmm"])


def test_a_disk_is_given_back_to_its_user_unless_that_is_root_or_not_known() -> None:
    disk = Disk("d", Path("/d/d.raw"), 1, 1)
    way = Way(Firecracker(), Path("/s"), Path("/run/x"), Writer(None), None)
    asked = request(ID, SnapshotKind.STOPPED)
    for owner, wanted in ((None, []), ((0, 0), []), ((7, 8), ["chown -h 7:8 /d/d.raw"])):
        contents = Contents([evolve(disk, owner=owner)], {"0-d.raw": 1}, {})
        (_, *back) = commands(manifest_of(WEB, asked, contents, way, Identity()).restore, RestoreAction.RUN)
        assert back == wanted


def test_paths_with_spaces_and_devices_are_put_back_as_they_are() -> None:
    steps = steps_of(CloudHypervisor(), "/my snapshots", "/my disks/root.raw", "/run/web-1.sock")
    assert "'/my disks/root.raw'" in steps[0].command
    assert f"'source_url=file:///my snapshots/web-1/{ID}/vmm'" in commands(steps, RestoreAction.START)[0]
    device = Contents([evolve(Disk("d", Path("/dev/dm-1"), 1, 1), is_device=True)], {"0-dm-1": 1}, {})
    way = Way(Firecracker(), Path("/s"), Path("/run/x"), Writer(None), None)
    (back, start) = manifest_of(WEB, request(ID, SnapshotKind.STOPPED), device, way, Identity()).restore
    assert back.command == "dd if=/s/disks/0-dm-1 of=/dev/dm-1 bs=4M conv=fsync,notrunc,nocreat status=none"
    assert start == RestoreStep(RestoreAction.START, "")
