"""The stand-in as a program: HTTP/1.1 on a unix socket, each request served when the one before is done.

``python -I -S server.py cloud-hypervisor|firecracker JSON [--restore source_url=file://DIR]``

The JSON: ``socket``, ``memory`` (bytes), ``disks`` ([path, "rw"|"ro"]), ``tick_s``, ``save_s``, ``home``,
and more, see `Options`. In *home* it appends each request to ``requests.log``, how long the guest
stood still each time to ``standstills.log``, and reads ``faults.json`` at each:
a list of what goes wrong with which request (see `Fault`).
"""

import json
import os
import resource
import selectors
import signal
import socket
import sys
import time
from typing import Any

sys.path.insert(0, os.path.abspath(f"{__file__}/../../.."))

from tests.vmm_server.cloud_hypervisor import CloudHypervisor
from tests.vmm_server.firecracker import Firecracker

KINDS = {"cloud-hypervisor": CloudHypervisor, "firecracker": Firecracker}
MOST_CONNECTIONS = 10
PHRASES = {200: "OK", 204: "No Content", 400: "Bad Request", 404: "Not Found", 503: "Service Unavailable"}


class Options:
    """What the program was given.

    Attributes:
        old: Answers errors as versions before 2026 do (Cloud Hypervisor).
        empty: Begins without a guest.
        locks: Locks its disks (Cloud Hypervisor since version 46).
        chroot: Where its paths are below (Firecracker).
        config: Taken over into the guest's configuration.
        user: Runs as this user and group.
        fsize: Writes no larger files: beyond it the kernel ends the process.
        version: Says that it is this one (Cloud Hypervisor).
    """

    def __init__(self, given: dict[str, Any], restore: str | None) -> None:
        self.socket: str = given["socket"]
        self.home: str = given["home"]
        self.memory: int = given.get("memory", 1 << 20)
        self.disks: list[tuple[str, str]] = given.get("disks", [])
        self.tick_s: float = given.get("tick_s", 0.02)
        self.save_s: float = given.get("save_s", 0.0)
        self.old: bool = given.get("old", False)
        self.empty: bool = given.get("empty", False)
        self.locks: bool = given.get("locks", True)
        self.chroot: str | None = given.get("chroot")
        self.config: dict[str, Any] = given.get("config", {})
        self.user: int | None = given.get("user")
        self.fsize: int | None = given.get("fsize")
        self.version: str = given.get("version", "51.1")
        self.restore = restore


class Fault:
    """What goes wrong with a request.

    Attributes:
        request: Method and path.
        times: So often; then no more.
        wait_s: Before it is served.
        late_s: Between what it does and its answer.
        status, body: Answered in place of doing it.
        raw: Written in place of an answer.
        cut: The connection ends: "before" it is served, "after", or within the "answer".
        close: It ends after a whole answer.
        huge: So many bytes of answer.
        endless: An answer that goes on until nobody takes it any more.
    """

    def __init__(self, given: dict[str, Any]) -> None:
        self.request: str = given["request"]
        self.times: int = given.get("times", 1)
        self.wait_s: float = given.get("wait_s", 0.0)
        self.late_s: float = given.get("late_s", 0.0)
        self.status: int | None = given.get("status")
        self.body: Any = given.get("body")
        self.raw: str | None = given.get("raw")
        self.cut: str | None = given.get("cut")
        self.close: bool = given.get("close", False)
        self.huge: int = given.get("huge", 0)
        self.endless: bool = given.get("endless", False)


CHUNK = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
NOTHING = Fault({"request": "", "times": 0})


class Server:
    """The listening socket and its connections."""

    def __init__(self, vmm: Any, options: Options) -> None:
        self.vmm, self.options = vmm, options
        self.buffers: dict[socket.socket, bytes] = {}
        self.selector = selectors.DefaultSelector()
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(options.socket)
        self.listener.listen(128)
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.faults: list[Fault] = []
        self.faults_are: tuple[int, int] | None = None
        self.stopped_at: float | None = None

    def serve(self) -> None:
        while True:
            for key, _ in self.selector.select():
                if key.fileobj is self.listener:
                    self.accept()
                else:
                    assert isinstance(key.fileobj, socket.socket)
                    self.receive(key.fileobj)

    def accept(self) -> None:
        connection, _ = self.listener.accept()
        if len(self.buffers) >= MOST_CONNECTIONS:
            connection.sendall(answer_of(503, {"error": "Too many open connections"}))
            connection.close()
            return
        self.buffers[connection] = b""
        self.selector.register(connection, selectors.EVENT_READ)

    def close(self, connection: socket.socket) -> None:
        self.selector.unregister(connection)
        del self.buffers[connection]
        connection.close()

    def receive(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(65536)
        except OSError:
            data = b""
        if not data:
            self.close(connection)
            return
        self.buffers[connection] += data
        head, end, rest = self.buffers[connection].partition(b"\r\n\r\n")
        length = body_length(head)
        if end and len(rest) >= length:
            self.buffers[connection] = rest[length:]
            self.handle(connection, head.decode(), rest[:length])

    def handle(self, connection: socket.socket, head: str, body: bytes) -> None:
        method, path, _ = head.split("\r\n", maxsplit=1)[0].split(" ")
        fault = self.fault_of(f"{method} {path}")
        time.sleep(fault.wait_s)
        if fault.cut == "before":
            self.close(connection)
            return
        status, content = (
            (fault.status, fault.body) if fault.status is not None else self.vmm.answer(method, path, body)
        )
        self.watch()
        self.log(f"{method} {path} {status}")
        time.sleep(fault.late_s)
        if fault.cut == "after":
            self.close(connection)
            return
        data = answer_of(status, "x" * fault.huge if fault.huge else content)
        if fault.raw is not None:
            data = fault.raw.encode()
        if fault.endless:
            data = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        if fault.cut == "answer":
            data = data[: len(data) // 2]
        try:
            connection.sendall(data)
            while fault.endless:
                connection.sendall(CHUNK)
        except OSError:
            self.close(connection)
            return
        if fault.cut or fault.close or fault.raw is not None:
            self.close(connection)

    def fault_of(self, request: str) -> Fault:
        try:
            status = os.stat(f"{self.options.home}/faults.json")
        except FileNotFoundError:
            return NOTHING
        if (status.st_mtime_ns, status.st_ino) != self.faults_are:
            self.faults_are = (status.st_mtime_ns, status.st_ino)
            with open(f"{self.options.home}/faults.json") as file:
                self.faults = [Fault(given) for given in json.load(file)]
        fault = next((fault for fault in self.faults if fault.request == request and fault.times), NOTHING)
        fault.times -= 1
        return fault

    def watch(self) -> None:
        """Write down how long the guest stood still, once it runs again."""
        runs = self.vmm.machine is not None and self.vmm.machine.running
        if runs and self.stopped_at is not None:
            self.log(f"{time.monotonic() - self.stopped_at:.6f}", "standstills.log")
        if runs or self.stopped_at is None:
            self.stopped_at = None if runs else time.monotonic()

    def log(self, line: str, name: str = "requests.log") -> None:
        descriptor = os.open(f"{self.options.home}/{name}", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        os.write(descriptor, f"{line}\n".encode())
        os.close(descriptor)


def body_length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0


def answer_of(status: int, content: Any) -> bytes:
    body = b"" if content is None else (content if isinstance(content, str) else json.dumps(content)).encode()
    head = f"HTTP/1.1 {status} {PHRASES.get(status, 'Internal Server Error')}\r\nServer: stand-in\r\n"
    head += "Connection: keep-alive\r\n"
    if status != 204:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return f"{head}\r\n".encode() + body


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    kind, given, *others = sys.argv[1:]
    restore = others[1] if others[:1] == ["--restore"] else None
    options = Options(json.loads(given), restore)
    if options.fsize is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (options.fsize, options.fsize))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
    if options.user is not None:
        os.setgroups([])
        os.setgid(options.user)
        os.setuid(options.user)
    Server(KINDS[kind](options), options).serve()


if __name__ == "__main__":
    main()
