"""Processes, told apart from later ones that get the same number. Blocking, but never for long."""

import os
import select
from pathlib import Path

_START = 19
"""Place of the start time in the stat file of a process, counted from after its name."""
OpenFile = tuple[str, os.stat_result]
"""A descriptor's name, which tells of what kind it is, and the file."""
_LOOKS = 5
"""At the files of a process that opens and closes some all the time."""
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


def open_files(pid: int) -> list[OpenFile] | None:
    """What process *pid* has open; None where that can't be seen.

    Looked at anew where something was closed during the look, as connections
    are all the time: what is open throughout is among it, maybe twice.
    """
    found = []
    for _ in range(_LOOKS):
        try:
            now, whole = _look(pid)
        except OSError:  # not ours to see, or gone
            return None
        found += now
        if whole:
            return found if now else None  # one that has nothing open has ended
    return found


def _look(pid: int) -> tuple[list[OpenFile], bool]:
    found, whole = [], True
    with os.scandir(f"/proc/{pid}/fd") as entries:
        for entry in entries:
            try:
                found.append((os.readlink(entry.path), os.stat(entry.path)))  # noqa: PTH115, PTH116 - many are no paths
            except FileNotFoundError:
                whole = False
    return found, whole


def has_no_guest(pid: int) -> bool:
    """Whether it is seen that process *pid* has no virtual machine: one that only hands sockets on to others."""
    opened = open_files(pid)
    return opened is not None and not any(hypervisor in name for name, _ in opened for hypervisor in _HYPERVISORS)


def seconds(started: int) -> float:
    """*started* on the boot-time clock."""
    return started / os.sysconf("SC_CLK_TCK")


def namespace() -> str:
    """In which the numbers of processes, and the times when they began, mean something."""
    try:
        return " ".join(str(Path(f"/proc/self/ns/{kind}").readlink()) for kind in ("pid", "time"))
    except OSError:
        return ""
