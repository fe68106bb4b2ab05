"""HTTP/1.1, a thread for each connection."""

import json
import select
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

from tests.hypeman_server.answers import Server
from tests.hypeman_server.files import CutError, Document, RefusedError, Store


class Wire:
    """A connection, as the server has it."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._kept = b""

    def gone(self) -> bool:
        """Whether the client has closed it."""
        readable, _, _ = select.select([self._connection], [], [], 0)
        if not readable or hasattr(self._connection, "cipher"):
            return bool(readable)
        try:
            return self._connection.recv(1, socket.MSG_PEEK) == b""
        except OSError:
            return True

    def serve(self, server: Server) -> None:
        """Answer what comes, until its end."""
        try:
            while (request := self._receive()) is not None:
                method, target, headers, body = request
                fault: Document = {}
                try:
                    status, told, fault = server.answer(method, target, headers, body, self.gone)
                except RefusedError as refused:
                    status, told = refused.status, refused.document
                self._respond(status, told, fault)
        except (OSError, CutError):
            pass
        finally:
            self._connection.close()

    def _receive(self) -> tuple[str, str, dict[str, str], Any] | None:
        if not self._fill(lambda: b"\r\n\r\n" in self._kept):
            return None
        head, _, self._kept = self._kept.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = int(headers.get("content-length", 0))
        if not self._fill(lambda: len(self._kept) >= length):
            return None
        body, self._kept = self._kept[:length], self._kept[length:]
        method, target, _ = first.split(" ")
        return method, target, headers, json.loads(body) if body else {}

    def _fill(self, enough: Callable[[], bool]) -> bool:
        while not enough():
            data = self._connection.recv(65536)
            if not data:
                return False
            self._kept += data
        return True

    def _respond(self, status: int, told: Any, fault: Document) -> None:
        body = b"" if told is None else told.encode() if isinstance(told, str) else json.dumps(told).encode()
        kind = "text/plain" if isinstance(told, str) else "application/json"
        lines = [f"HTTP/1.1 {status} Told", f"Content-Type: {kind}", f"Content-Length: {len(body)}"]
        if "location" in fault:
            lines.append(f"Location: {fault['location']}")
        if fault.get("cut") == "then":
            lines.append("Connection: close")
        data = "\r\n".join([*lines, "", ""]).encode() + body
        if fault.get("cut") == "midst":
            self._connection.sendall(data[: len(data) // 2])
            raise CutError
        self._connection.sendall(data)
        if fault.get("cut") == "then":
            raise CutError


def by_tls(certificate: str, key: str) -> Callable[[socket.socket], socket.socket]:
    """What makes a connection a secured one."""
    import ssl  # noqa: PLC0415 - it takes as long as all the rest

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return lambda connection: context.wrap_socket(connection, server_side=True)


def main() -> None:
    """Serve for ever; say so on stdout once clients can come."""
    directory, port, *tls = sys.argv[1:]
    listening = socket.socket()
    # Whoever started this keeps the port for it, also while it is not there.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listening.bind(("127.0.0.1", int(port)))
    listening.listen(64)
    secured = by_tls(*tls) if tls else None
    server = Server(Store(directory))

    def handle(connection: socket.socket) -> None:
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            served = connection if secured is None else secured(connection)
        except OSError:
            connection.close()
        else:
            Wire(served).serve(server)

    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        connection, _ = listening.accept()
        threading.Thread(target=handle, args=(connection,), daemon=True).start()


if __name__ == "__main__":
    main()
