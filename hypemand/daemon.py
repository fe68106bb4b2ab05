"""The daemon's process: state lock, signals, the config file, and the engine in between."""

import signal
from pathlib import Path

import structlog
import trio
from attrs import frozen

from hypemand import __version__
from hypemand.backends import registry
from hypemand.config import Config, config_warnings
from hypemand.config_files import load_config
from hypemand.core.errors import InvalidInput
from hypemand.core.structure import format_instant
from hypemand.engine.engine import Engine, this_machine
from hypemand.engine.fleet import new_fleet
from hypemand.engine.reload import watch_file
from hypemand.state.lock import take_lock
from hypemand.surface.log import set_up_log

_log = structlog.get_logger()


@frozen
class Daemon:
    """A running daemon, between its config file and its engine."""

    config_path: Path
    engine: Engine

    async def serve(self) -> None:
        """Serve until SIGTERM or SIGINT; what is under way gets its grace, a second signal cuts it short."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._obey_signals)
            nursery.start_soon(watch_file, self.config_path, self._reload_edit)
            await self.engine.serve()
            nursery.cancel_scope.cancel()

    async def _obey_signals(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            stopping = False
            async for number in signals:
                if number == signal.SIGHUP:
                    await self._reload_all()
                    continue
                grace_s = 0.0 if stopping else self.engine.config.runs.shutdown_grace.total_seconds()
                _log.info("stopping", signal=signal.Signals(number).name, grace_s=grace_s)
                self.engine.stop(grace_s)
                stopping = True

    async def _reload_all(self) -> None:
        await self.engine.reread()
        await self._reload_edit()

    async def _reload_edit(self) -> None:
        log = _log.bind(path=str(self.config_path))
        try:
            config = await trio.to_thread.run_sync(load_config, self.config_path, registry.parse_settings)
        except InvalidInput as error:
            for problem in error.problems:
                log.error("invalid config; the one before stays in force", error=str(problem))
            return
        except OSError as error:
            log.error("config unreadable; the one before stays in force", error=str(error))
            return
        if config.state_dir != self.engine.config.state_dir:
            _log.warning("a new state_dir takes a restart", state_dir=str(config.state_dir))
        set_up_log(config.log)
        log_warnings(config)
        await self.engine.apply_config(config)
        log.info("config in force", schedules=len(self.engine.store.schedules))


def log_warnings(config: Config) -> None:
    """Log what *config* allows, but what is worth a second look."""
    for warning in config_warnings(config):
        _log.warning("config", warning=warning)


async def run_daemon(config_path: Path, config: Config) -> None:
    """Run the daemon until it is told to stop.

    Raises:
        LockHeldError: Another one runs on the same state.
        NewerFormatError: The state is that of a later version.
    """
    outside = this_machine()
    lock = await take_lock(config.state_dir, "daemon", outside.disk)
    try:
        async with trio.open_nursery() as background:
            engine = Engine(config, new_fleet(config.state_dir), outside, background)
            await engine.load()
            _log.info("hypemand starts", version=__version__, config=str(config_path), state_dir=str(config.state_dir))
            log_warnings(config)
            await engine.start()
            for schedule in sorted(engine.store.schedules.values(), key=lambda s: s.next_run_at)[:10]:
                _log.info("next run", instance_id=schedule.instance_id, at=format_instant(schedule.next_run_at))
            await Daemon(config_path, engine).serve()
            background.cancel_scope.cancel()
        _log.info("stopped")
    finally:
        lock.release()
