"""What the guard has done in a fresh process when the daemon can't: settle all open runs. Not a command for people."""

import argparse
import fcntl
import os
import sys
from pathlib import Path
from typing import NoReturn

import structlog
import trio

from hypemand.config import Config, LogConfig, LogFormat, LogLevel
from hypemand.engine.offline import settle_held
from hypemand.surface.log import set_up_log

PATIENCE_S = 20.0
"""Less than a daemon that starts waits for the lock."""


def main() -> NoReturn:
    """Settle the open runs of a state directory whose lock was handed over. Exits with 1 when some are left."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("state_dir", type=Path)
    parser.add_argument("--log-level", type=LogLevel, default=LogLevel.INFO)
    parser.add_argument("--log-format", type=LogFormat, default=LogFormat.AUTO)
    parser.add_argument("--because", default="")
    parser.add_argument("--lock", type=int, help="descriptor of the lock; without one nobody else can have it")
    options = parser.parse_args()
    if options.lock is not None:
        keep_lock(options.lock)
    set_up_log(LogConfig(options.log_level, options.log_format))
    log = structlog.get_logger()
    log.critical("the guard settles open runs", why=options.because)
    result = trio.run(settle_held, Config(options.state_dir), PATIENCE_S)
    for line in result.left:
        log.critical("run still open", error=line)
    log.log(40 if result.left else 20, "the guard is done", result=result.summary)
    sys.exit(1 if result.left else 0)


def keep_lock(descriptor: int) -> None:
    """Hold the lock until the end of this process, and hand it to no child."""
    os.set_inheritable(descriptor, False)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
