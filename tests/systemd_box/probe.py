"""Run in a sandbox: tells what can be done there, as JSON."""

import ctypes
import errno
import fcntl
import json
import mmap
import os
import pwd
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypemand.engine.clock import SystemClock, boot_id

MADE = "made-by-a-probe"


def outcome(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def writable(directory: str) -> Any:
    path = Path(directory) / MADE
    path.write_text("")
    path.unlink()
    return True


def locks_seen() -> bool:
    with tempfile.TemporaryFile() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        return f" {os.getpid()} " in Path("/proc/locks").read_text()


def send_out() -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"", ("192.0.2.1", 9))
    return True


def read_umask() -> int:
    os.umask(before := os.umask(0))
    return before


def unshare() -> bool:
    if ctypes.CDLL(None, use_errno=True).unshare(0x10000000) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    return True


def looks() -> dict[str, Any]:
    return {"boot id": boot_id() or None, "clock": SystemClock().synchronised(), "locks": outcome(locks_seen)}


def tries() -> dict[str, Any]:
    return {
        "state": outcome(lambda: writable(os.environ["STATE_DIRECTORY"])),
        "runtime": outcome(lambda: writable(os.environ["RUNTIME_DIRECTORY"])),
        "tokens": outcome(lambda: Path(os.environ["CREDENTIALS_DIRECTORY"], "tokens").read_text()),
        "user": pwd.getpwuid(os.getuid()).pw_name,
        "umask": read_umask(),
        "config": outcome(lambda: writable("/etc/hypemand")),
        "etc": outcome(lambda: writable("/etc")),
        "opt": outcome(lambda: writable("/opt/hypemand")),
        "home": outcome(lambda: [*map(str, Path("/root").iterdir())]),
        "writable code": outcome(lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_WRITE | mmap.PROT_EXEC) and True),
        "new namespace": outcome(unshare),
        "real-time": outcome(lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))),
        "clock set": outcome(lambda: time.clock_settime(time.CLOCK_REALTIME, time.time())),
        "packet socket": outcome(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close()),
        "network": outcome(send_out),
    }


sandboxed = "CREDENTIALS_DIRECTORY" in os.environ
json.dump(looks() | (tries() if sandboxed else {}), sys.stdout)
