"""Guests of the stand-in for Cloud Hypervisor and Firecracker (`tests.vmm_server`), and an operator's hand on them."""

import http.client
import json
import os
import socket as sockets
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio
from attrs import define, field

from hypemand.core.model import InstanceId

SERVER = Path(__file__).parent / "vmm_server" / "server.py"
CLOUD_HYPERVISOR, FIRECRACKER = "cloud-hypervisor", "firecracker"
KINDS = (CLOUD_HYPERVISOR, FIRECRACKER)
MIB = 1 << 20
PATIENCE_S = 20.0
_SAVE = {CLOUD_HYPERVISOR: "PUT /api/v1/vm.snapshot", FIRECRACKER: "PUT /snapshot/create"}
_LOOK = {CLOUD_HYPERVISOR: "GET /api/v1/vm.info", FIRECRACKER: "GET /"}
_PAUSE = {CLOUD_HYPERVISOR: "PUT /api/v1/vm.pause", FIRECRACKER: "PATCH /vm"}


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=PATIENCE_S)
        self._path = path

    def connect(self) -> None:
        self.sock = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM)
        self.sock.settimeout(PATIENCE_S)
        self.sock.connect(str(self._path))


def ask(socket: Path, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    """Status and content of an answer, by a connection of its own."""
    connection = _Connection(socket)
    try:
        connection.request(method, path, None if body is None else json.dumps(body))
        response = connection.getresponse()
        data = response.read()
        try:
            return response.status, json.loads(data) if data else None
        except json.JSONDecodeError:
            return response.status, data.decode()
    finally:
        connection.close()


@define(eq=False)
class Guest:
    """A guest in a stand-in, which is a process of its own.

    Attributes:
        home: Holds its disk ``root.raw``, the stand-in's log of requests, and its faults.
        socket: Its API socket.
        root: What its paths are below (Firecracker under the jailer), or None.
    """

    kind: str
    instance_id: InstanceId
    home: Path
    socket: Path
    disks: Sequence[Path]
    process: trio.Process
    root: Path | None = None
    away: Path = field(init=False)

    @away.default
    def _away(self) -> Path:
        return self.socket.with_suffix(".away")

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """As an operator does, also while the socket is elsewhere."""
        return ask(self.socket if self.socket.exists() else self.away, method, path, body)

    def state(self) -> str:
        """In the VMM's word."""
        path = "/api/v1/vm.info" if self.kind == CLOUD_HYPERVISOR else "/"
        return str(self.ask("GET", path)[1]["state"])

    def pause(self) -> None:
        """As an operator. It may be paused already."""
        if self.kind == CLOUD_HYPERVISOR:
            self.ask("PUT", "/api/v1/vm.pause")
        else:
            self.ask("PATCH", "/vm", {"state": "Paused"})

    def resume(self) -> None:
        """As an operator."""
        if self.kind == CLOUD_HYPERVISOR:
            self.ask("PUT", "/api/v1/vm.resume")
        else:
            self.ask("PATCH", "/vm", {"state": "Resumed"})

    def count(self) -> int:
        """The counter in its first disk."""
        return count_in(self.disks[0])

    async def ticks(self) -> int:
        """Wait until it has counted on, which shows that it runs."""
        before = self.count()
        with trio.fail_after(PATIENCE_S):
            while (now := self.count()) == before:
                await trio.sleep(0.005)
        return now

    def fail(self, *faults: dict[str, Any]) -> None:
        """Have these faults come; see `tests.vmm_server.server.Fault`. None: no more."""
        new = self.home / "faults.new"
        new.write_text(json.dumps(faults))
        new.rename(self.home / "faults.json")

    def fail_save(self, **fault: Any) -> None:
        """Have its next save go wrong."""
        self.fail({"request": _SAVE[self.kind], **fault})

    def fail_look(self, **fault: Any) -> None:
        """Have the next question for its state go wrong."""
        self.fail({"request": _LOOK[self.kind], **fault})

    def fail_pause(self, **fault: Any) -> None:
        """Have its next pause go wrong."""
        self.fail({"request": _PAUSE[self.kind], **fault})

    def requests(self) -> list[str]:
        """What it was asked so far, each with the status of the answer."""
        log = self.home / "requests.log"
        return log.read_text().splitlines() if log.exists() else []

    def saves(self) -> int:
        """How often it was asked to save."""
        return sum(line.startswith(_SAVE[self.kind]) for line in self.requests())

    async def kill(self) -> None:
        """SIGKILL, and return once it is gone; the socket is left over."""
        self.process.kill()
        with trio.CancelScope(shield=True):
            await self.process.wait()


def count_in(file: Path) -> int:
    """The counter in a disk, a copy of one, or saved memory."""
    with file.open("rb") as opened:
        return int.from_bytes(opened.read(8), "little")


def make_disk(path: Path, size: int = MIB, data: int = 64 << 10) -> Path:
    """A raw disk, the most of it a hole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(b"\0" * 8 + b"D" * (data - 8))
        file.truncate(size)
    return path


@asynccontextmanager
async def running_guest(
    kind: str,
    directory: Path,
    *,
    instance_id: str = "web-1",
    socket: Path | None = None,
    disks: Sequence[tuple[Path, str]] | None = None,
    chroot: Path | None = None,
    memory: int = MIB,
    restore: str | None = None,
    keep_socket: bool = False,
    wait: bool = True,
    **options: Any,
) -> AsyncIterator[Guest]:
    """A guest that counts, until the end of the block.

    Args:
        directory: Its home is made below, by its id; a second one there goes on with the disk.
        disks: Files and "rw" or "ro"; its own disk alone, if None.
        chroot: Its root directory; disks are below it.
        restore: The option ``--restore`` of Cloud Hypervisor.
        keep_socket: Whether one that was left over stays, with which a VMM does not start.
        wait: Whether to wait until it counts, or only until the VMM listens.
        options: Of `tests.vmm_server.server.Options`.
    """
    home = directory / instance_id
    home.mkdir(parents=True, exist_ok=True)
    own = (chroot or home) / "root.raw"
    if not own.exists():
        make_disk(own)
    disks = [(own, "rw")] if disks is None else disks
    # Not below directory, unless wanted: a unix socket's path has 107 bytes at most.
    with tempfile.TemporaryDirectory(prefix="hypemand-") as short:
        socket = socket or Path(short) / f"{instance_id}.sock"
        if not keep_socket:
            socket.unlink(missing_ok=True)
        given = {
            "socket": str(socket),
            "home": str(home),
            "memory": memory,
            "disks": [(str(file if chroot is None else f"/{file.relative_to(chroot)}"), mode) for file, mode in disks],
            "chroot": None if chroot is None else str(chroot),
            **options,
        }
        process = await _started(kind, given, restore)
        guest = Guest(kind, InstanceId(instance_id), home, socket, [file for file, _ in disks], process, chroot)
        try:
            await _listens(guest)
            if wait:
                await guest.ticks()
            yield guest
        finally:
            await guest.kill()


async def _started(kind: str, given: dict[str, Any], restore: str | None) -> trio.Process:
    command = [sys.executable, "-I", "-S", str(SERVER), kind, json.dumps(given)]
    return await trio.lowlevel.open_process([*command, *(("--restore", restore) if restore else ())])


async def _listens(guest: Guest) -> None:
    with trio.fail_after(PATIENCE_S):
        while not guest.socket.exists() or not _connects(guest.socket):
            assert guest.process.poll() is None, "the stand-in has ended"
            await trio.sleep(0.005)


def _connects(path: Path) -> bool:
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as socket:
        try:
            socket.connect(str(path))
        except OSError:
            return False
    return True


def environment() -> dict[str, str]:
    """For a shell that carries out the steps of a restore."""
    return {**os.environ, "LC_ALL": "C"}
