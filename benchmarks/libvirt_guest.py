"""A guest under a libvirtd of its own, and snapshots of it by virsh.

It is a libvirtd as users start it for themselves: all its files and sockets
are in one temporary directory, and the system's own instance is not touched.
Where the benchmark is run by root, it is run by nobody, for root's would be
the system's.
"""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from html import escape
from pathlib import Path
from typing import Any

import trio
from attrs import define, frozen

from benchmarks.ruler import NotMeasuredError, RefusedError, Stage, Way, dial
from tests.qemu_guest import make_disk

_NAME = "ticker"
_NOBODY = 65534
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin:/sbin:/bin"
_START_S = 30.0
_END_S = 10.0
_POLL_S = 0.05

# Without these, it would start a daemon for logs, which stays when it ends.
_QEMU_CONF = 'security_driver = "none"\nstdio_handler = "file"\n'
_LIBVIRTD_CONF = 'log_outputs = "3:stderr"\n'
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
    <serial type='file'><source path='{serial}'/></serial>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
  </devices>
  <qemu:commandline><qemu:arg value='-qmp'/><qemu:arg value='unix:{socket},server=on,wait=off'/></qemu:commandline>
</domain>
"""


@frozen
class Libvirtd:
    """A libvirtd below *base*."""

    base: Path

    @property
    def socket(self) -> Path:
        """Where it is spoken to."""
        return self.base / "run" / "libvirt" / "libvirt-sock"

    @property
    def log(self) -> Path:
        """What it said."""
        return self.base / "libvirtd.log"

    def guest_pid(self) -> int:
        """The process of the guest, while it runs."""
        return int((self.base / "run" / "libvirt" / "qemu" / "run" / f"{_NAME}.pid").read_text())

    def process_options(self) -> dict[str, Any]:
        """How its processes are started: by whom, with which environment, and away from the terminal's Ctrl-C."""
        homes = {f"XDG_{name.upper()}_HOME": str(self.base / name) for name in ("config", "cache", "data")}
        directories = {"HOME": str(self.base), "XDG_RUNTIME_DIR": str(self.base / "run"), **homes}
        environment: Mapping[str, str] = {"PATH": _PATH, "LC_ALL": "C", **directories}
        user = {"user": _NOBODY, "group": _NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
        return {"env": environment, "start_new_session": True, "stdin": subprocess.DEVNULL, **user}

    async def virsh(self, *args: str) -> str:
        """Run virsh.

        Raises:
            RefusedError: With what it said.
        """
        command = ["virsh", "--quiet", "-c", f"qemu+unix:///session?socket={self.socket}", *args]
        done = await trio.run_process(
            command, capture_stdout=True, capture_stderr=True, check=False, **self.process_options()
        )
        if done.returncode != 0:
            raise RefusedError(f"virsh {args[0]}: {' '.join(done.stderr.decode(errors='replace').split())}")
        return done.stdout.decode()


@define
class Virsh:
    """Internal snapshots by ``virsh snapshot-create-as``."""

    stage: Stage
    libvirtd: Libvirtd
    _tag: str = ""

    async def take(self, tag: str) -> None:
        """Save memory and disk."""
        self._tag = tag
        await self.libvirtd.virsh("snapshot-create-as", _NAME, tag)

    async def remove(self) -> None:
        """Delete it from the disk and from libvirt's books."""
        await self.libvirtd.virsh("snapshot-delete", _NAME, self._tag)


@asynccontextmanager
async def virsh_way(directory: Path, *, memory_mb: int) -> AsyncIterator[Way]:
    """The way by virsh, with its guest, until the end of the block; then nothing of it is left.

    Args:
        directory: Holds the guest's disk.

    Raises:
        NotMeasuredError: There is no libvirt, or it is without its qemu driver.
        RefusedError: It does not start.
    """
    if any(shutil.which(program, path=_PATH) is None for program in ("virsh", "libvirtd")):
        raise NotMeasuredError("libvirt is not installed")
    # Not below directory: a unix socket's path has 107 bytes at most.
    with tempfile.TemporaryDirectory(prefix="hypemand-virt-") as base:
        async with _libvirtd(Path(base)) as libvirtd:
            await _start_guest(libvirtd, directory, memory_mb)
            async with dial(libvirtd.base / "ruler.sock") as monitor:
                stage = Stage(monitor, libvirtd.base / "serial.log", libvirtd.guest_pid())
                await stage.ticks()
                yield Virsh(stage, libvirtd)


@asynccontextmanager
async def _libvirtd(base: Path) -> AsyncIterator[Libvirtd]:
    libvirtd = Libvirtd(base)
    (base / "config" / "libvirt").mkdir(parents=True)
    for name in ("run", "cache", "data"):
        (base / name).mkdir()
    (base / "config" / "libvirt" / "qemu.conf").write_text(_QEMU_CONF)
    (base / "libvirtd.conf").write_text(_LIBVIRTD_CONF)
    _hand_over(base)
    program = shutil.which("libvirtd", path=_PATH) or "libvirtd"
    command = [program, "-f", str(base / "libvirtd.conf")]
    with libvirtd.log.open("wb") as log:
        process = await trio.lowlevel.open_process(command, stdout=log, stderr=log, **libvirtd.process_options())
    try:
        await _answers(libvirtd, process)
        yield libvirtd
    finally:
        with trio.CancelScope(shield=True):
            await _end(libvirtd, process)


def _hand_over(path: Path) -> None:
    """Give *path*, and what is in it, to the user that libvirt runs as."""
    if os.geteuid() == 0:
        for one in (path, *path.rglob("*")):
            os.chown(one, _NOBODY, _NOBODY)


async def _answers(libvirtd: Libvirtd, process: trio.Process) -> None:
    """Wait until it does, and knows its QEMU: it starts one or two, to see what they can do."""
    with trio.move_on_after(_START_S):
        while not libvirtd.socket.exists() and process.poll() is None:  # noqa: ASYNC110 - a new file is no event
            await trio.sleep(_POLL_S)
    if not libvirtd.socket.exists():
        lines = libvirtd.log.read_text(errors="replace").splitlines() or ["it says nothing"]
        raise RefusedError(f"libvirtd does not start: {lines[-1]}")
    try:
        await libvirtd.virsh("domcapabilities", "--virttype", "qemu")
    except RefusedError as error:
        if "no connection driver" in str(error):
            raise NotMeasuredError("libvirt is not installed with its qemu driver") from error
        raise


async def _start_guest(libvirtd: Libvirtd, directory: Path, memory_mb: int) -> None:
    home = directory / "libvirt"
    home.mkdir()
    disk = make_disk(home / f"{_NAME}.qcow2", fill_end_mb=memory_mb - 16)
    _hand_over(home)
    domain = libvirtd.base / "domain.xml"
    values = {
        "name": _NAME,
        "memory_mb": memory_mb,
        "emulator": shutil.which("qemu-system-x86_64", path=_PATH),
        "disk": disk,
        "serial": libvirtd.base / "serial.log",
        "socket": libvirtd.base / "ruler.sock",
    }
    domain.write_text(_DOMAIN.format(**{key: escape(str(value)) for key, value in values.items()}))
    domain.chmod(0o644)
    await libvirtd.virsh("create", str(domain))


async def _end(libvirtd: Libvirtd, process: trio.Process) -> None:
    """End the guest and the daemon, by force where they take their time."""
    with trio.move_on_after(_END_S), suppress(RefusedError):
        await libvirtd.virsh("destroy", _NAME)
    process.terminate()
    with trio.move_on_after(_END_S):
        await process.wait()
    process.kill()
    await process.wait()
    # Its QEMUs outlive a daemon that had no time for them; from here on, nobody starts any more.
    for file in libvirtd.base.rglob("*.pid"):
        with suppress(OSError, ValueError):
            await _end_straggler(int(file.read_text()), str(libvirtd.base))


async def _end_straggler(pid: int, base: str) -> None:
    with trio.move_on_after(_END_S):
        while base in _command_line(pid):
            os.kill(pid, signal.SIGKILL)
            await trio.sleep(_POLL_S)


def _command_line(pid: int) -> str:
    """What tells a QEMU of ours from a later process with its id: our directory is among its arguments."""
    return os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes())
