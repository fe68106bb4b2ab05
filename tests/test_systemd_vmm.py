"""The service and guests of Cloud Hypervisor and Firecracker that run as somebody else: what those drop-ins are for."""

import json
import shutil

import pytest

from tests.systemd_box import SYSTEM_PYTHON
from tests.systemd_service import CONFIG, ROOT, Service
from tests.vmm_guest import KINDS, count_in, make_disk

GUEST = f"""
[Service]
User=vm
Group=vms
UMask=0007
RuntimeDirectory=vms
RuntimeDirectoryMode=0750
ExecStart={SYSTEM_PYTHON} -I -S /opt/stand-in/tests/vmm_server/server.py KIND '{{OPTIONS}}'
ExecStartPost=/bin/sh -c 'until chmod 660 /run/vms/web-1.sock; do sleep 0.1; done'
"""
"""The chmod is docs/cloud-hypervisor.md's: whatever the umask, that one makes its socket for its own user alone."""
VMS = """
[runs]
min_free = "1MiB"
[backends.vms]
type = "KIND"
socket = "/run/vms/{instance}.sock"
disks = ["/var/lib/vms/{instance}/*.raw"]
snapshot_dir = "/srv/snapshots/vms"
snapshot_mode = "2710"
[[schedules]]
instance = "*"
interval = "24h"
retention = { max_count = 3 }
"""
DISK = "/var/lib/vms/web-1/root.raw"
STOPPED_GUESTS = ("PrivateUsers", "AmbientCapabilities", "CapabilityBoundingSet")
"""In the drop-in, commented out: what captures of stopped guests take."""


def started_host(service: Service, kind: str) -> Service:
    """A host with a guest of the user ``vm``, which runs, one that does not, and the service with the drop-in."""
    box = service.box
    shutil.copytree(ROOT / "tests" / "vmm_server", box.path("/opt/stand-in/tests/vmm_server"))
    box.path("/opt/stand-in/tests/__init__.py").touch()
    options = {"socket": "/run/vms/web-1.sock", "home": "/run/vms", "disks": [[DISK, "rw"]]}
    unit = GUEST.replace("KIND", kind).replace("{OPTIONS}", json.dumps(options))
    box.write("/etc/systemd/system/vm.service", unit)
    box.sh("groupadd vms; useradd -g vms vm; mkdir -p /var/lib/vms/web-1 /var/lib/vms/web-2")
    for guest in ("web-1", "web-2"):
        shutil.copy(make_disk(box.out / f"{guest}.raw"), box.path(f"/var/lib/vms/{guest}/root.raw"))
    box.sh("chown -R vm:vms /var/lib/vms; chmod -R o=,g+rX,g-w /var/lib/vms; chmod -R a+rX /opt/stand-in")
    box.sh("install -d -o hypemand -g vms -m 2710 /srv/snapshots")
    drop_in = (ROOT / "systemd" / "drop-ins" / f"{kind}.conf").read_text()
    for key in STOPPED_GUESTS:
        assert f"\n#{key}=" in drop_in
        drop_in = drop_in.replace(f"\n#{key}=", f"\n{key}=")
    service.drop_in(drop_in, kind)
    box.run("systemctl", "start", "vm")
    box.wait_until(lambda: count_in(box.path(DISK)) > 5, "web-1 counts")
    return service


@pytest.mark.parametrize("kind", KINDS)
def test_guests_of_another_user_are_captured_running_and_stopped(service: Service, kind: str) -> None:
    host = started_host(service, kind)
    box = host.box
    box.write(CONFIG, VMS.replace("KIND", kind))
    host.start()
    for guest in ("web-1", "web-2"):
        host.hypemand("run-now", guest)
    assert [(run["instance_id"], run["outcome"], run["kind"]) for run in host.history()] == [
        ("web-1", "succeeded", "Standby"),
        ("web-2", "succeeded", "Stopped"),
    ]
    counted = count_in(box.path(DISK))
    box.wait_until(lambda: count_in(box.path(DISK)) > counted, "web-1 counts on")
    told = box.sh("cd /srv/snapshots/vms/web-1; stat -c '%a %U %G %n' . */ */vmm */disks */disks/*").splitlines()
    assert [" ".join(line.split()[:3]) for line in told] == [
        "2710 hypemand vms",
        "2710 hypemand vms",
        "700 hypemand vms",
        "2700 hypemand vms",
        "600 hypemand vms",
    ]
    assert "vm vms" in box.sh("stat -c '%U %G' /srv/snapshots/vms/web-1/*/vmm/*")
    refused = box.run("sh", "-c", "su vm -s /bin/sh -c 'cat /srv/snapshots/vms/web-1/*/vmm/*' 2>&1 || echo refused")
    assert "refused" in refused
