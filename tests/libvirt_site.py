"""A real libvirtd of its own, and guests of it with the ticker in them. A helper for tests and benchmarks, not a test.

It is a libvirtd as users start it for themselves: all its files and sockets
are in one temporary directory, and the system's own instance is not touched.
Where the tests are run by root, it is run by nobody, for root's would be the
system's.
"""

import gc
import os
import shutil
import signal
import socket as sockets
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from attrs import define, field

from tests.qemu_guest import make_disk

NOBODY = 65534
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin:/sbin:/bin"
PATIENCE_S = 30.0
PROGRAMS = ("libvirtd", "virsh", "qemu-system-x86_64", "qemu-img")
# Without these, it would start a daemon for logs, which stays when it ends.
_QEMU_CONF = 'security_driver = "none"\nstdio_handler = "file"\n'
_LIBVIRTD_CONF = 'log_outputs = "3:stderr"\n'
_POLL_S = 0.01
_DOMAIN = """
<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{name}</name>
  <memory unit='MiB'>{memory_mb}</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <devices>
    <emulator>{emulator}</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/><source file='{disk}'/><target dev='vda' bus='virtio'/>
    </disk>
    {devices}
    <serial type='file'><source path='{serial}'/></serial>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
  </devices>
  {extra}
</domain>
"""


class NotStarted(Exception):
    """The libvirtd does not come up."""


def missing_parts() -> str:
    """What of libvirt is not there; empty: nothing."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
    if find_spec("libvirt") is None:
        missing.append("the Python module libvirt")
    return " and ".join(missing)


def is_required() -> bool:
    """Whether tests of libvirt may not be left out."""
    return os.environ.get("HYPEMAND_REQUIRE_LIBVIRT") == "1"


def require_libvirt() -> None:
    """Skip where libvirt is not installed; fail where it must be.

    Best called from a sync fixture: pytest-trio drops the reason of a skip in async code.
    """
    if missing := missing_parts():
        text = f"{missing} not found; see README.md for what the tests of libvirt need"
        if is_required():
            pytest.fail(text)
        pytest.skip(text)


def domain_xml(name: str, disk: Path, serial: Path, *, memory_mb: int = 16, devices: str = "", extra: str = "") -> str:
    """A guest that boots from *disk* by software emulation."""
    values = {"name": name, "disk": disk, "serial": serial, "emulator": shutil.which("qemu-system-x86_64", path=PATH)}
    words = {key: escape(str(value)) for key, value in values.items()}
    return _DOMAIN.format(**words, memory_mb=memory_mb, devices=devices, extra=extra)


@define(eq=False)
class Libvirtd:
    """A libvirtd below *base*."""

    base: Path
    _process: "subprocess.Popen[bytes] | None" = field(default=None)

    @property
    def socket(self) -> Path:
        """Where it is spoken to."""
        return self.base / "run" / "libvirt" / "libvirt-sock"

    @property
    def uri(self) -> str:
        """The same for libvirt's clients."""
        return f"qemu+unix:///session?socket={self.socket}"

    @property
    def log(self) -> Path:
        """What it said."""
        return self.base / "libvirtd.log"

    @property
    def process(self) -> "subprocess.Popen[bytes]":
        """The daemon itself."""
        assert self._process is not None
        return self._process

    def pid_of(self, domain: str) -> int:
        """The QEMU of a guest that runs."""
        return int((self.base / "run" / "libvirt" / "qemu" / "run" / f"{domain}.pid").read_text())

    def process_options(self) -> dict[str, Any]:
        """How its processes are started: by whom, with which environment, and away from the terminal's Ctrl-C."""
        homes = {f"XDG_{name.upper()}_HOME": str(self.base / name) for name in ("config", "cache", "data")}
        directories = {"HOME": str(self.base), "XDG_RUNTIME_DIR": str(self.base / "run"), **homes}
        environment: Mapping[str, str] = {"PATH": PATH, "LC_ALL": "C", **directories}
        user = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
        return {"env": environment, "start_new_session": True, "stdin": subprocess.DEVNULL, **user}

    def set_up(self) -> None:
        """Make its directories and its config."""
        (self.base / "config" / "libvirt").mkdir(parents=True)
        for name in ("run", "cache", "data", "disks"):
            (self.base / name).mkdir()
        (self.base / "config" / "libvirt" / "qemu.conf").write_text(_QEMU_CONF)
        (self.base / "libvirtd.conf").write_text(_LIBVIRTD_CONF)
        self.hand_over(self.base)

    def hand_over(self, path: Path) -> None:
        """Give *path*, and what is in it, to the user that libvirt runs as."""
        if os.geteuid() == 0:
            for one in (path, *path.rglob("*")):
                os.chown(one, NOBODY, NOBODY)

    def new_home(self) -> Path:
        """An empty directory that libvirt's user may enter."""
        home = Path(tempfile.mkdtemp(dir=self.base / "disks"))
        self.hand_over(home)
        return home

    def start(self) -> None:
        """Start it, and return once it may be spoken to.

        Raises:
            NotStarted: It ended at once, or says nothing; with its last words.
        """
        program = shutil.which("libvirtd", path=PATH) or "libvirtd"
        self.socket.unlink(missing_ok=True)  # of one that was killed
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [program, "-f", str(self.base / "libvirtd.conf")], stdout=log, stderr=log, **self.process_options()
            )
        until = time.monotonic() + PATIENCE_S
        while not self._listens():
            if self.process.poll() is not None or time.monotonic() > until:
                lines = self.log.read_text(errors="replace").splitlines() or ["it says nothing"]
                raise NotStarted(f"libvirtd does not start: {lines[-1]}")
            time.sleep(_POLL_S)

    def _listens(self) -> bool:
        with sockets.socket(sockets.AF_UNIX) as one:
            return one.connect_ex(os.fspath(self.socket)) == 0

    def kill(self) -> None:
        """SIGKILL it, and return once it is gone. Its guests stay."""
        self.process.kill()
        self.process.wait()

    @contextmanager
    def hung(self) -> Iterator[None]:
        """Have it stand still, as if it hung, until the end of the block."""
        # What a test has left of libvirt's would be freed meanwhile, in the event loop, and that waits for the daemon.
        gc.collect()
        gc.disable()
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)
            gc.enable()

    def end(self) -> None:
        """End daemon and guests, by force."""
        if self._process is not None:
            self.kill()
        for file in self.base.rglob("*.pid"):
            with suppress(OSError, ValueError):
                _end(int(file.read_text()), str(self.base))


def _end(pid: int, base: str) -> None:
    """End a QEMU. What tells it from a later process with its id: our directory is among its arguments."""
    until = time.monotonic() + PATIENCE_S
    while base in os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()) and time.monotonic() < until:
        os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_S)


@contextmanager
def running_libvirtd() -> Iterator[Libvirtd]:
    """A libvirtd until the end of the block; then nothing of it is left."""
    # Not below a test's directory: a unix socket's path has 107 bytes at most, and nobody may not enter root's.
    with tempfile.TemporaryDirectory(prefix="hypemand-virt-") as base:
        libvirtd = Libvirtd(Path(base))
        libvirtd.set_up()
        try:
            libvirtd.start()
            yield libvirtd
        finally:
            libvirtd.end()


def ticker_disk(libvirtd: Libvirtd, disk: Path, *, fill_end_mb: int = 0, tick_ms: int = 10) -> Path:
    """Make *disk*, for libvirt's user."""
    made = libvirtd.base / f"made-{fill_end_mb}-{tick_ms}.qcow2"
    if not made.exists():
        make_disk(made, fill_end_mb=fill_end_mb, tick_ms=tick_ms)
    shutil.copy(made, disk)
    libvirtd.hand_over(disk.parent)
    return disk
