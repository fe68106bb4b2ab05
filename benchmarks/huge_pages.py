"""How much of a guest's memory is in huge pages, and putting it back into them.

A background snapshot breaks them up, and the next one takes longer to begin
for that: it has to touch each page on its own, while the guest stands still.
The kernel's khugepaged leaves memory that the guest does not use as it is.
"""

import ctypes
import os
from contextlib import suppress
from pathlib import Path

_PROCESS_MADVISE = 440  # the same on every architecture
_MADV_COLLAPSE = 25


class _Range(ctypes.Structure):
    """C's ``struct iovec``."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def huge_mb(pid: int) -> float | None:
    """Megabytes of process *pid* in huge pages; None where the kernel does not tell."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "AnonHugePages":
                return int(value.split()[0]) / 1024
    return None


def make_whole(pid: int, memory_mb: int) -> None:
    """Have the kernel put the guest's RAM into huge pages now.

    Raises:
        OSError: It can't: it is older than Linux 6.1, we are not root, or memory is short.
    """
    size = memory_mb * 1024 * 1024
    libc = ctypes.CDLL(None, use_errno=True)
    process = os.pidfd_open(pid)
    try:
        for start in _mappings(pid, size):
            wanted = _Range(start, size)
            # A libc that has a function for it is newer than those of today's distributions.
            done = libc.syscall(
                ctypes.c_long(_PROCESS_MADVISE), process, ctypes.byref(wanted), ctypes.c_size_t(1), _MADV_COLLAPSE, 0
            )
            if done < 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        os.close(process)


def _mappings(pid: int, size: int) -> list[int]:
    """Where *pid* has mappings of just that size: the guest's RAM is one of its own."""
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if end - start == size:
            found.append(start)
    return found
