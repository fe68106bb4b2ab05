"""What the guard has done in a fresh process when the daemon can't: settle all open runs. Not a command for people."""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

import structlog
import trio

from hypemand.backends import registry
from hypemand.config import Config, HooksConfig, LogConfig, LogFormat, LogLevel
from hypemand.config_files import load_config
from hypemand.core.errors import InvalidInput
from hypemand.engine.recovery import CRASHED
from hypemand.engine.takeover import TakeOver
from hypemand.surface.hooks.hooks import run_hooks
from hypemand.surface.log import set_up_log

PATIENCE_S = 20.0
"""Less than a daemon that starts waits for the lock."""
HOOKS_S = 20.0
"""What hooks get to tell of the runs: the guard does not wait for this process for ever."""


def main() -> NoReturn:
    """Settle the open runs in a state directory. Exits with 1 when some are left to be tried again."""
    options = _parser().parse_args()
    set_up_log(LogConfig(options.log_level, options.log_format))
    log = structlog.get_logger()
    frozen = frozenset(filter(None, options.frozen.split(",")))
    log.critical("the guard settles open runs", why=options.because, frozen=len(frozen))
    crashed = CRASHED
    if "did not answer" in options.because:
        crashed = f"{options.because.replace('the daemon', 'hypemand', 1)} and was killed by its guard during the run"
    take_over = TakeOver(Config(options.state_dir), options.daemon, frozen, crashed)
    try:
        result = trio.run(take_over.settle, PATIENCE_S)
    except* Exception as errors:  # noqa: BLE001 - the next try may do better
        log.critical("open runs can't be settled; trying again", error="; ".join(map(str, errors.exceptions)))
        sys.exit(1)
    if result.ended and options.config is not None:
        trio.run(run_hooks, _hooks(options.config), result.ended, HOOKS_S)
    for line in result.left:
        log.critical("run still open; trying again", error=line)
    if not result.left:
        log.info("the guard is done", result=result.summary)
    sys.exit(1 if result.left else 0)


def _hooks(path: Path) -> HooksConfig:
    try:
        return load_config(path, registry.parse_settings).hooks
    except (OSError, InvalidInput) as error:
        structlog.get_logger().error("no hooks are run: the config can't be read", path=str(path), error=str(error))
        return HooksConfig()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("state_dir", type=Path)
    parser.add_argument("--config", type=Path, help="the file that has the hooks to be run")
    parser.add_argument("--log-level", type=LogLevel, default=LogLevel.INFO)
    parser.add_argument("--log-format", type=LogFormat, default=LogFormat.AUTO)
    parser.add_argument("--because", default="")
    parser.add_argument("--daemon", type=int, required=True, help="process id of the daemon that has died")
    parser.add_argument("--frozen", default="", help="runs whose guests it held leases for")
    return parser
