"""Which process has a guest stand still for a run: noted beside its snapshot, for whoever settles the run.

A VMM keeps no mark of whose pause it is. But a process that is gone has no
guest any more, and one that began later never had that one.
"""

import os
from pathlib import Path

import orjson

from hypemand.backends.vmm import processes
from hypemand.backends.vmm.client import Peer
from hypemand.core.model import RunStarted

NOTE = "process"
"""A file of a snapshot that is built; the finished one is without it."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def write_note(partial: Path, peer: Peer | None) -> None:
    """Note in *partial* that *peer* is the process whose guest will stand still. Blocking.

    Not of a process that has handed its socket on: nothing follows from its life or death.
    """
    if peer is not None and peer.is_known and not processes.has_no_guest(peer.pid):
        told = {"pid": peer.pid, "started": peer.started, "namespace": processes.namespace()}
        descriptor = os.open(partial / NOTE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(orjson.dumps(told))


def read_note(partial: Path) -> Peer | None:
    """The process that *partial* names; None where it names none that can be found from here. Blocking."""
    try:
        told = orjson.loads((partial / NOTE).read_bytes())
        if told["namespace"] != processes.namespace():
            return None
        started = told["started"]
        return Peer(int(told["pid"]), -1, -1, None if started is None else int(started))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def remove_note(partial: Path) -> None:
    """Of a snapshot that is whole: its guest runs. Blocking."""
    (partial / NOTE).unlink(missing_ok=True)


def is_later(peer: Peer | None, run: RunStarted) -> bool:
    """Whether the process *peer* is known to have begun after *run*, which then never had its guest stand still."""
    if peer is None or not peer.is_known or peer.started is None or run.boot_s is None:
        return False
    return run.boot_id == _boot_id() and processes.seconds(peer.started) > run.boot_s


def _boot_id() -> str | None:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return None
