"""The service and real QEMU guests that run as somebody else: what the drop-in of QEMU is for."""

import shutil

import pytest

from tests.qemu_guest import make_disk
from tests.systemd_service import CONFIG, ROOT, STATE, Service

GUEST = """
[Service]
User=vm
Group=vms
UMask=0007
RuntimeDirectory=vms/%i
RuntimeDirectoryMode=0750
ExecStart=qemu-system-x86_64 -nodefaults -accel tcg -machine pc -m 64 -display none -serial file:/run/vms/%i/serial \\
  -qmp unix:/run/vms/%i/qmp.sock,server=on,wait=off -drive file=/var/lib/vms/%i/disk.qcow2,if=virtio
"""
VMS = """
[runs]
min_free = "1MiB"
[backends.vms]
type = "qemu"
socket = "/run/vms/{instance}/qmp.sock"
disks = ["/var/lib/vms/{instance}/*.qcow2"]
mode = "MODE"
[[schedules]]
instance = "*"
interval = "24h"
retention = { max_count = 3 }
"""


def ticked(service: Service) -> int:
    """How much web-1 has printed."""
    printed = service.box.path("/run/vms/web-1/serial")
    return len(printed.read_bytes()) if printed.exists() else 0


@pytest.fixture
def host(service: Service) -> Service:
    """A host with two guests of the user ``vm``, one of which runs, and the service with the drop-in."""
    box = service.box
    box.write("/etc/systemd/system/vm@.service", GUEST)
    box.sh("groupadd vms; useradd -g vms vm; mkdir -p /var/lib/vms/web-1 /var/lib/vms/web-2")
    for guest in ("web-1", "web-2"):
        made = make_disk(box.out / f"{guest}.qcow2")
        shutil.copy(made, box.path(f"/var/lib/vms/{guest}/disk.qcow2"))
    box.sh("chown -R vm:vms /var/lib/vms; chmod -R o=,g+rwX /var/lib/vms")
    service.drop_in((ROOT / "systemd" / "drop-ins" / "qemu.conf").read_text(), "qemu")
    box.run("systemctl", "start", "vm@web-1")
    box.wait_until(lambda: ticked(service) > 20, "web-1 ticks")
    return service


@pytest.mark.qemu
@pytest.mark.parametrize("mode", ["internal", "background"])
def test_guests_of_another_user_are_captured_running_and_stopped(host: Service, mode: str) -> None:
    box = host.box
    box.write(CONFIG, VMS.replace("MODE", mode))
    host.start()
    for guest in ("web-1", "web-2"):
        host.hypemand("run-now", guest)
    assert [(run["instance_id"], run["outcome"], run["kind"]) for run in host.history()] == [
        ("web-1", "succeeded", "Standby"),
        ("web-2", "succeeded", "Stopped"),
    ]
    ticks = ticked(host)
    box.wait_until(lambda: ticked(host) > ticks, "web-1 ticks on")
    assert "scheduled-" in box.run("qemu-img", "snapshot", "-l", "/var/lib/vms/web-2/disk.qcow2")
    assert box.path("/var/lib/vms/web-2/disk.qcow2").stat().st_mode & 0o777 == 0o660
    assert box.path(STATE).stat().st_mode & 0o777 == 0o700
