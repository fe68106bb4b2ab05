"""The files in systemd/: taken by systemd without a complaint, and as closed as they say."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.systemd_box import SYSTEM_PYTHON, require_systemd
from tests.systemd_service import ROOT, Service

UNITS = ROOT / "systemd"
DROP_INS = sorted(UNITS.glob("drop-ins/*.conf"))
MOST_EXPOSED = 1.5
AN_ADDRESS = """
import fcntl, socket, struct
address = struct.pack("16sHH4s8x", b"lo:1", socket.AF_INET, 0, socket.inet_aton("192.0.2.1"))
fcntl.ioctl(socket.socket(socket.AF_INET, socket.SOCK_DGRAM), 0x8916, address)
"""
"""Gives the box an address that is not of loopback."""


@pytest.fixture
def systemd() -> None:
    require_systemd()


def exposure(directory: Path, *drop_ins: Path) -> float:
    """The exposure of the service with *drop_ins*, as systemd-analyze tells it of files."""
    unit = directory / "hypemand.service"
    unit.write_text("\n".join(path.read_text() for path in (UNITS / "hypemand.service", *drop_ins)))
    told = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", unit],
        check=True,
        capture_output=True,
        text=True,
    )
    (number,) = re.findall(r"Overall exposure level for \S+: ([0-9.]+)", told.stdout)
    assert "Invalid" not in told.stderr
    return float(number)


def test_the_service_is_exposed_no_more_than_promised(systemd: None, tmp_path: Path) -> None:
    assert exposure(tmp_path) <= MOST_EXPOSED


@pytest.mark.parametrize("drop_in", DROP_INS, ids=lambda path: path.stem)
def test_a_drop_in_says_how_exposed_the_service_is_with_it(systemd: None, drop_in: Path, tmp_path: Path) -> None:
    (said,) = re.findall(r"Exposure by `systemd-analyze security`: ([0-9.]+)", drop_in.read_text())
    assert exposure(tmp_path, drop_in) <= float(said) <= MOST_EXPOSED


def test_there_is_a_drop_in_for_each_hypervisor_and_for_hooks() -> None:
    assert {path.stem for path in DROP_INS} == {
        *("qemu", "cloud-hypervisor", "firecracker", "hypeman", "libvirt"),
        "hooks",
    }


def test_systemd_has_nothing_to_say_of_the_units_with_any_drop_in(service: Service) -> None:
    said = {"": service.box.run("systemd-analyze", "verify", "hypemand.service", "hypemand.socket")}
    for path in DROP_INS:
        home = service.box.path("/etc/systemd/system/hypemand.service.d")
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        shutil.copy(path, home)
        said[path.stem] = service.box.run("systemd-analyze", "verify", "hypemand.service")
    assert said == dict.fromkeys(said, "")


def test_the_page_installs_each_file_for_systemd(installed: Path) -> None:
    at = {
        "hypemand.service": "systemd/system/hypemand.service",
        "hypemand.socket": "systemd/system/hypemand.socket",
        "hypemand.sysusers": "sysusers.d/hypemand.conf",
        "hypemand.tmpfiles": "tmpfiles.d/hypemand.conf",
    }
    assert {path.name for path in UNITS.glob("hypemand.*")} == set(at)
    for name, place in at.items():
        assert (installed / "base/usr/local/lib" / place).read_text() == (UNITS / name).read_text()


def test_directories_are_made_anew_and_a_config_that_was_closed_more_stays_so(service: Service) -> None:
    box = service.box
    box.sh("chmod 750 /etc/hypemand; rm -rf /run/hypemand; systemd-tmpfiles --create hypemand.conf")
    assert box.sh("stat -c '%a %U' /etc/hypemand /run/hypemand").splitlines() == ["750 root", "755 hypemand"]
    box.sh("rmdir /etc/hypemand; systemd-tmpfiles --create hypemand.conf")
    assert box.sh("stat -c '%a %U' /etc/hypemand").strip() == "755 root"


def test_what_the_sandbox_must_leave_it_leaves_and_what_it_should_take_it_takes(service: Service) -> None:
    script = service.box.out / "probe.py"
    script.write_text((Path(__file__).parent / "systemd_box" / "probe.py").read_text())
    service.box.run(
        "sh", "-c", "mkdir -p /etc/hypemand; echo secret >/etc/hypemand/tokens; chmod 600 /etc/hypemand/tokens"
    )
    lines = (UNITS / "hypemand.service").read_text().splitlines()
    ours = ("Exec", "Type=", "Restart", "Watchdog")
    probe = "\n".join(line for line in lines if not line.startswith(ours))
    command = "/opt/hypemand/bin/python /out/probe.py"
    probe = probe.replace("[Service]", f"[Service]\nType=oneshot\nExecStart={command}\nStandardOutput=file:/out/told")
    service.box.write("/etc/systemd/system/probe.service", probe)
    service.box.run("systemctl", "daemon-reload")
    service.box.run(SYSTEM_PYTHON, "-c", AN_ADDRESS)
    service.box.run("systemctl", "start", "probe")
    told = json.loads((service.box.out / "told").read_text())
    outside = json.loads(service.box.run("/opt/hypemand/bin/python", "/out/probe.py"))
    for name in ("boot id", "clock", "locks"):
        assert told.pop(name) == outside[name] is not None
    assert outside["clock"] in (True, False)
    assert told == {
        "state": True,
        "runtime": True,
        "tokens": "secret\n",
        "user": "hypemand",
        "umask": 0o077,
        "config": "EACCES",
        "etc": "EROFS",
        "opt": "EROFS",
        "home": "EACCES",
        "writable code": "EPERM",
        "new namespace": "EPERM",
        "real-time": "EPERM",
        "clock set": "EPERM",
        "packet socket": "EAFNOSUPPORT",
        "network": "EPERM",
    }
