"""The guest of the stand-in: memory and disks of real bytes, and a counter in them that goes on while it runs."""

import os
import threading

COUNTER = 8
"""Bytes at the begin of the memory, and of each writable disk, that hold the counter."""
_CHUNK = 1 << 18


class Machine:
    """A guest. `lock` is held by whoever changes it: a tick is never half done when a pause returns."""

    def __init__(self, memory: int, disks: list[str], tick_s: float) -> None:
        self.memory = bytearray(b"M" * memory)
        self.disks = [os.open(disk, os.O_RDWR) for disk in disks]
        self.held: list[int] = []
        self.kvm = os.memfd_create("kvm-vm")  # by a descriptor of this name a process that runs a guest is known
        self.tick_s = tick_s
        self.running = False
        self.lock = threading.Lock()
        threading.Thread(target=self._live, daemon=True).start()

    def hold(self, path: str) -> None:
        """Have a file open, as that of any device; the counter is not in it."""
        self.held.append(os.open(path, os.O_RDWR))

    @property
    def count(self) -> int:
        return int.from_bytes(self.memory[:COUNTER], "little")

    def run(self) -> None:
        with self.lock:
            self.running = True

    def pause(self) -> None:
        with self.lock:
            self.running = False

    def save(self, path: str, seconds: float, *, exclusive: bool) -> None:
        """Write the memory in pieces, over *seconds*. A request that is served keeps all others waiting."""
        flags = os.O_WRONLY | os.O_CREAT | (os.O_EXCL if exclusive else os.O_TRUNC)
        descriptor = os.open(path, flags, 0o600)
        pieces = range(0, len(self.memory), _CHUNK)
        try:
            for start in pieces:
                os.write(descriptor, self.memory[start : start + _CHUNK])
                threading.Event().wait(seconds / len(pieces))
        finally:
            os.close(descriptor)

    def load(self, path: str) -> None:
        with open(path, "rb") as file:
            self.memory = bytearray(file.read())

    def _live(self) -> None:
        while True:
            threading.Event().wait(self.tick_s)
            with self.lock:
                if self.running:
                    self._tick()

    def _tick(self) -> None:
        count = (self.count + 1).to_bytes(COUNTER, "little")
        self.memory[:COUNTER] = count
        for disk in self.disks:
            os.pwrite(disk, count, 0)
