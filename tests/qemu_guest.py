"""A real QEMU with the ticker in it: started, asked, killed. A helper for tests, not a test."""

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import frozen

from hypemand.backends import qmp
from hypemand.backends.base import BackendUnavailable
from hypemand.core.model import InstanceId

TICKER = Path(__file__).parent / "guest" / "ticker.bin"
BEATS_AT, TICK_AT, FILL_END_AT = 498, 500, 504
BEAT_MS = 55
BOOT_PATIENCE_S = 30


def require_qemu() -> None:
    """Skip where QEMU is not installed; fail where it must be.

    Best called from a sync fixture: pytest-trio drops the reason of a skip in async code.
    """
    missing = [program for program in ("qemu-system-x86_64", "qemu-img") if shutil.which(program) is None]
    if missing:
        text = f"{' and '.join(missing)} not found; on Debian: apt-get install qemu-system-x86 qemu-utils"
        if os.environ.get("HYPEMAND_REQUIRE_QEMU") == "1":
            pytest.fail(text)
        pytest.skip(text)


@frozen(kw_only=True)
class Guest:
    """A running ticker. Its first monitor is hypemand's, the second the test's."""

    instance_id: InstanceId
    socket_template: Path
    test_socket: Path
    disk: Path
    log: Path
    process: trio.Process

    @property
    def socket(self) -> Path:
        return Path(str(self.socket_template).replace("{instance}", self.instance_id))

    async def qmp(self, command: str, **arguments: Any) -> Any:
        """Run one command on the test's monitor."""
        async with qmp.connect(self.test_socket) as monitor:
            return await monitor.execute(command, **arguments)

    def serial(self) -> str:
        """All that the guest has printed since QEMU was started."""
        return self.log.read_text() if self.log.exists() else ""

    def ticks(self) -> list[int]:
        """Ticks printed in full, without the first line: a restored guest begins in the middle of one."""
        lines = self.serial().split("\n")[1:-1]
        return [int(line, 16) for line in lines if re.fullmatch("[0-9a-f]{8}", line)]

    async def next_ticks(self, count: int = 2) -> list[int]:
        """Wait until the guest has printed *count* more, and return all."""
        seen = len(self.ticks())
        with trio.fail_after(BOOT_PATIENCE_S):
            while len(ticks := self.ticks()) < seen + count:
                if self.process.poll() is not None:
                    pytest.fail(f"QEMU ended: {self.log.with_suffix('.err').read_text()}")
                await trio.sleep(0.01)
        return ticks

    async def answers(self) -> None:
        """Wait until QEMU has made its monitors."""
        with trio.fail_after(BOOT_PATIENCE_S):
            while True:
                with suppress(BackendUnavailable):
                    await self.qmp("query-status")
                    return
                await trio.sleep(0.01)

    async def kill(self) -> None:
        """SIGKILL its QEMU, and return once that is gone."""
        self.process.kill()
        with trio.CancelScope(shield=True):
            await self.process.wait()


def make_disk(path: Path, *, fill_end_mb: int = 0, tick_ms: int = 10) -> Path:
    """A qcow2 disk that boots the ticker, which fills its RAM up to *fill_end_mb* (0: not at all)."""
    code = bytearray(TICKER.read_bytes())
    # An idle QEMU is woken by each interrupt: long waits are counted in the few of the timer, short ones need more.
    beats = tick_ms // BEAT_MS if tick_ms >= 3 * BEAT_MS else 0
    code[BEATS_AT : BEATS_AT + 2] = beats.to_bytes(2, "little")
    code[TICK_AT : TICK_AT + 4] = (tick_ms * 1000).to_bytes(4, "little")
    code[FILL_END_AT : FILL_END_AT + 4] = (fill_end_mb * 1024 * 1024).to_bytes(4, "little")
    raw = path.with_suffix(".raw")
    raw.write_bytes(code.ljust(1024 * 1024, b"\0"))
    run_img("convert", "-f", "raw", "-O", "qcow2", raw, path)
    raw.unlink()
    return path


def run_img(*args: str | Path) -> str:
    """Run qemu-img."""
    require_qemu()
    return subprocess.run(["qemu-img", *args], check=True, capture_output=True, text=True).stdout


def blockdev(node: str, file: Path, *, fails: Mapping[str, int] | None = None, once: bool = False) -> list[str]:
    """Arguments for one more writable qcow2 disk.

    Args:
        fails: Error number by the event of QEMU's blkdebug driver after which the disk fails with it.
        once: Whether it fails for one request alone.
    """
    below: dict[str, Any] = {"driver": "file", "filename": str(file)}
    if fails:
        errors = [{"event": event, "errno": number, "once": once} for event, number in fails.items()]
        below = {"driver": "blkdebug", "image": below, "inject-error": errors}
    spec = {"driver": "qcow2", "node-name": node, "file": below}
    return ["-blockdev", json.dumps(spec), "-device", f"virtio-blk-pci,drive={node}"]


def _files(directory: Path, log_in: Path, instance_id: str, fill_end_mb: int, tick_ms: int) -> tuple[Path, Path]:
    disk = directory / f"{instance_id}.qcow2"
    if not disk.exists():
        make_disk(disk, fill_end_mb=fill_end_mb, tick_ms=tick_ms)
    return disk, log_in / f"{instance_id}-{len(list(log_in.glob(f'{instance_id}-*.log')))}.log"


@asynccontextmanager
async def running_guest(
    directory: Path,
    *,
    instance_id: str = "web-1",
    memory_mb: int = 64,
    filled: bool = False,
    tick_ms: int = 10,
    sockets_in: Path | None = None,
    log_in: Path | None = None,
    loadvm: str | None = None,
    wait: bool = True,
    reboots: bool = False,
    fails: Mapping[str, int] | None = None,
    fails_once: bool = True,
    before: Sequence[str] = (),
    extra: Sequence[str] = (),
) -> AsyncIterator[Guest]:
    """A guest that ticks, until the end of the block.

    Args:
        directory: Holds its disk ``<instance_id>.qcow2``, made when it is not
            there; a second guest in the same directory goes on with it.
        filled: Whether its RAM has no zero pages, so that a save takes a while.
        tick_ms: How long it waits between ticks; a host of many guests wants them slow.
        sockets_in: Where its sockets go, below its id; a directory of its own, if None.
        log_in: Where what it prints goes, if not beside its disk.
        loadvm: Snapshot to start from, instead of booting.
        wait: Whether to wait until it ticks, or only until QEMU answers.
        reboots: Whether a reset boots it again, instead of ending QEMU.
        fails, fails_once: As for `blockdev`, of its own disk; such a guest stops at every failed write.
        before: Arguments for disks that come before its own: the first holds the memory of snapshots.
        extra: More arguments for QEMU.
    """
    require_qemu()
    disk, log = _files(directory, log_in or directory, instance_id, memory_mb - 16 if filled else 0, tick_ms)
    # Not below directory: a unix socket's path has 107 bytes at most.
    with tempfile.TemporaryDirectory(prefix="hypemand-") as short:
        template = (sockets_in or Path(short)) / "{instance}" / "qmp.sock"
        template.parent.with_name(instance_id).mkdir(exist_ok=True)
        sockets = [template.parent.with_name(instance_id) / name for name in ("qmp.sock", "test.sock")]
        command = [
            *("qemu-system-x86_64", "-nodefaults", "-accel", "tcg", "-machine", "pc", "-m", str(memory_mb)),
            *("-display", "none", "-serial", f"file:{log}", *(() if reboots else ("-no-reboot",))),
            *(part for socket in sockets for part in ("-qmp", f"unix:{socket},server=on,wait=off")),
            *before,
            *blockdev("disk0", disk, fails=fails, once=fails_once)[:3],
            f"virtio-blk-pci,drive=disk0,bootindex=0{',werror=stop' if fails else ''}",
            *(("-loadvm", loadvm) if loadvm else ()),
            *extra,
        ]
        with log.with_suffix(".err").open("wb") as errors:
            process = await trio.lowlevel.open_process(command, stderr=errors)
        guest = Guest(
            instance_id=InstanceId(instance_id),
            socket_template=template,
            test_socket=sockets[1],
            disk=disk,
            log=log,
            process=process,
        )
        try:
            await (guest.next_ticks() if wait else guest.answers())
            yield guest
        finally:
            await guest.kill()
