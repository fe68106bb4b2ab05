"""A guest under a libvirtd of its own, and snapshots of it by virsh."""

import shutil
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path

import trio
from attrs import define

from benchmarks.ruler import NotMeasuredError, RefusedError, Stage, Way, dial
from tests.libvirt_site import PATH, Libvirtd, NotStarted, domain_xml, running_libvirtd, ticker_disk

_NAME = "ticker"
_END_S = 10.0
_MONITOR = """<qemu:commandline>
  <qemu:arg value='-qmp'/><qemu:arg value='unix:{socket},server=on,wait=off'/>
</qemu:commandline>"""


async def virsh(libvirtd: Libvirtd, *args: str) -> str:
    """Run virsh.

    Raises:
        RefusedError: With what it said.
    """
    done = await trio.run_process(
        ["virsh", "--quiet", "-c", libvirtd.uri, *args],
        capture_stdout=True,
        capture_stderr=True,
        check=False,
        **libvirtd.process_options(),
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
        await virsh(self.libvirtd, "snapshot-create-as", _NAME, tag)

    async def remove(self) -> None:
        """Delete it from the disk and from libvirt's books."""
        await virsh(self.libvirtd, "snapshot-delete", _NAME, self._tag)


@asynccontextmanager
async def virsh_way(directory: Path, *, memory_mb: int) -> AsyncIterator[Way]:
    """The way by virsh, with its guest, until the end of the block; then nothing of it is left.

    Args:
        directory: Holds the guest's disk.

    Raises:
        NotMeasuredError: There is no libvirt, or it is without its qemu driver.
        RefusedError: It does not start.
    """
    if any(shutil.which(program, path=PATH) is None for program in ("virsh", "libvirtd")):
        raise NotMeasuredError("libvirt is not installed")
    async with ruled_guest(directory, name=_NAME, memory_mb=memory_mb) as (libvirtd, stage):
        yield Virsh(stage, libvirtd)


@asynccontextmanager
async def ruled_guest(directory: Path, *, name: str, memory_mb: int) -> AsyncIterator[tuple[Libvirtd, Stage]]:
    """A guest called *name* under a libvirtd of its own, until the end of the block, and its stage.

    Raises:
        NotMeasuredError: It is without its qemu driver.
        RefusedError: It does not start.
    """
    with ExitStack() as stack:
        try:
            libvirtd = stack.enter_context(running_libvirtd())
        except NotStarted as error:
            raise RefusedError(str(error)) from error
        await _can_do_qemu(libvirtd)
        socket, serial = libvirtd.base / "ruler.sock", libvirtd.base / "serial.log"
        await _start_guest(libvirtd, directory, socket, serial, name=name, memory_mb=memory_mb)
        async with dial(socket) as monitor:
            stage = Stage(monitor, serial, libvirtd.pid_of(name))
            await stage.ticks()
            try:
                yield libvirtd, stage
            finally:
                with trio.move_on_after(_END_S, shield=True), suppress(RefusedError):
                    await virsh(libvirtd, "destroy", name)


async def _can_do_qemu(libvirtd: Libvirtd) -> None:
    """It starts one or two, to see what they can do."""
    try:
        await virsh(libvirtd, "domcapabilities", "--virttype", "qemu")
    except RefusedError as error:
        if "no connection driver" in str(error):
            raise NotMeasuredError("libvirt is not installed with its qemu driver") from error
        raise


async def _start_guest(
    libvirtd: Libvirtd, directory: Path, socket: Path, serial: Path, *, name: str, memory_mb: int
) -> None:
    home = directory / "libvirt"
    home.mkdir()
    disk = ticker_disk(libvirtd, home / f"{name}.qcow2", fill_end_mb=memory_mb - 16)
    domain = libvirtd.base / "domain.xml"
    extra = _MONITOR.format(socket=socket)
    domain.write_text(domain_xml(name, disk, serial, memory_mb=memory_mb, extra=extra))
    domain.chmod(0o644)
    await virsh(libvirtd, "define", str(domain))
    await virsh(libvirtd, "start", name)
