"""Processes, told apart from later ones that get the same number. Blocking, but never for long."""

import os
import select
from pathlib import Path

_START = 19
"""Place of the start time in the stat file of a process, counted from after its name."""
_HYPERVISORS = ("kvm", "mshv")
"""In the names of descriptors: a machine of KVM, or of Microsoft's hypervisor."""


def started_of(pid: int) -> int | None:
    """When process *pid* began, in clock ticks after boot; None where that is not seen."""
    try:
        told = Path(f"/proc/{pid}/stat").read_text()
        return int(told.rpartition(")")[2].split()[_START])
    except (OSError, ValueError, IndexError):
        return None


def lives(pid: int, started: int | None) -> bool:
    """Whether the process *pid* that began at *started* is there, and not just what is left of it.

    What can't be told may be there.
    """
    now = started_of(pid) if started is not None else None
    if now is not None and now != started:
        return False  # its number is another's by now
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    except OSError:  # of another namespace: it has no number here
        return True
    try:
        ended = select.poll()
        ended.register(descriptor, select.POLLIN)
        return not ended.poll(0)
    finally:
        os.close(descriptor)


def has_no_guest(pid: int) -> bool:
    """Whether it is seen that process *pid* has no virtual machine: one that only hands sockets on to others."""
    try:
        with os.scandir(f"/proc/{pid}/fd") as entries:
            names = [os.readlink(entry.path) for entry in entries]  # noqa: PTH115 - most of them are no paths
    except OSError:  # not ours to see, or it opens and closes files right now
        return False
    return not any(hypervisor in name for name in names for hypervisor in _HYPERVISORS)


def seconds(started: int) -> float:
    """*started* on the boot-time clock."""
    return started / os.sysconf("SC_CLK_TCK")


def namespace() -> str:
    """In which the numbers of processes, and the times when they began, mean something."""
    try:
        return " ".join(str(Path(f"/proc/self/ns/{kind}").readlink()) for kind in ("pid", "time"))
    except OSError:
        return ""
