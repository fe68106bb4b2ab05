"""What is measured on: processors, kernel, filesystem, versions; and what a process takes of it."""

import os
import sqlite3
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_IN_MEMORY = frozenset({"tmpfs", "ramfs"})
_PACKAGES = ("hypemand", "trio", "APScheduler", "SQLAlchemy")


def filesystem_of(path: Path) -> str:
    """The type of the filesystem that *path* is on."""
    found, longest = "unknown", -1
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, source = line.partition(" - ")
        point = Path(mount.split()[4].replace("\\040", " "))
        if path.resolve().is_relative_to(point) and len(point.parts) >= longest:
            found, longest = source.split()[0], len(point.parts)
    return found


def is_in_memory(path: Path) -> bool:
    """Whether what is written at *path* never gets to a disk."""
    return filesystem_of(path) in _IN_MEMORY


def default_directory() -> Path:
    """A directory for temporary files on a real disk."""
    places = [Path(tempfile.gettempdir()), Path("/var/tmp"), Path.cwd()]  # noqa: S108 - directories in it are our own
    return next((place for place in places if place.is_dir() and not is_in_memory(place)), places[0])


def machine(directory: Path) -> dict[str, Any]:
    """What figures depend on, as JSON values. Call it before anything is measured."""
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "cpu_model": _cpu_model(),
        "kernel": os.uname().release,
        "directory": str(directory),
        "filesystem": filesystem_of(directory),
        "load_before": os.getloadavg()[0],
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {"Python": sys.version.split()[0], **_versions(), "sqlite": sqlite3.sqlite_version},
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return os.uname().machine


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def cpu_s(pid: int) -> float:
    """Processor time that the process *pid* has used, with its threads; to the nanosecond, where /proc has ticks."""
    return time.clock_gettime((~pid << 3) | 2)  # clock_getcpuclockid(3)


def memory_mb(pid: int, part: str = "Pss") -> float:
    """Memory of the process *pid*, in MB (10^6 bytes): ``Rss``, or ``Pss``, where pages that are shared are divided."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{part}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise LookupError(part)
