"""The daemon's process: state lock, signals, the config file, the engine in between, and the API in front of it."""

import contextlib
import os
import signal
from collections.abc import AsyncIterable, Iterator
from pathlib import Path

import structlog
import trio
from attrs import define, evolve, field

from hypemand import __version__
from hypemand.backends import registry
from hypemand.config import Config, config_warnings
from hypemand.config_files import load_config
from hypemand.core.errors import HypemandError, InvalidInput
from hypemand.core.fields import format_instant
from hypemand.engine.engine import Engine
from hypemand.engine.fleet import new_fleet
from hypemand.engine.guarding import Guarding, settle_command
from hypemand.engine.outside import Outside, this_machine
from hypemand.engine.reload import watch_file
from hypemand.engine.requests import Requests
from hypemand.garbage import lasting
from hypemand.state.files import Signature
from hypemand.state.lock import take_lock
from hypemand.surface.api.app import api_routes, make_app
from hypemand.surface.api.control import Control, control_routes
from hypemand.surface.api.imports import import_route
from hypemand.surface.api.openapi import openapi_route
from hypemand.surface.hooks.hooks import Hooks
from hypemand.surface.http.access import Access, CurrentAccess
from hypemand.surface.http.inherited import Inherited, take_inherited
from hypemand.surface.http.serving import Serving
from hypemand.surface.http.sockets import socket_path
from hypemand.surface.lasting import keep_up
from hypemand.surface.log import set_up_log
from hypemand.surface.metrics.page import Metrics
from hypemand.surface.status_line import StatusLine
from hypemand.surface.systemd import Service, take_notifier

CONFIG_PATIENCE_S = 30.0
DOORS_S = 10.0
"""How long a start waits for the API's doors: a port that is taken must not keep schedules from being called ready."""
LAST_ANSWERS_S = 2.0
"""How long clients are waited for, at the end, that have an answer to come."""
_log = structlog.get_logger()


class StateUnusableError(HypemandError):
    """The state directory can't be made, read or written."""


@define
class Daemon:
    """A daemon, between its config file and its engine.

    Attributes:
        version: The config file's, of which *config* is the content.
        access: Of clients that come over TCP.
        service: How it is seen by its service manager.
        inherited: Sockets that that one has opened for the API.
        life: Cancelled when it is told to stop while it still starts.
    """

    config_path: Path
    version: Signature | None
    config: Config
    access: CurrentAccess
    service: Service = field(factory=Service)
    inherited: Inherited = field(factory=Inherited)
    engine: Engine | None = field(init=False, default=None)
    api: Serving | None = field(init=False, default=None)
    guarding: Guarding | None = field(init=False, default=None)
    metrics: Metrics | None = field(init=False, default=None)
    life: trio.CancelScope = field(init=False, factory=trio.CancelScope)
    _is_up: trio.Event = field(init=False, factory=trio.Event)
    _reloading: trio.Lock = field(init=False, factory=trio.Lock)
    _edit_refused: bool = field(init=False, default=False)

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT; what is under way gets its grace, a second signal cuts it short."""
        # From the first moment on: a start may wait for `recover`, and a SIGHUP would end the process.
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._obey_signals, signals, nursery)
                nursery.start_soon(self.service.starting)
                with self.life:
                    await self._hold_state(nursery)
                nursery.cancel_scope.cancel()
        _log.info("stopped")

    async def _hold_state(self, nursery: trio.Nursery) -> None:
        guarding = Guarding(_settle_command(self.config, self.config_path), wanted=self.config.runs.guard)
        outside = evolve(this_machine(), leases=guarding)
        try:
            lock = await take_lock(self.config.state_dir, "daemon", outside.disk)
        except OSError as error:
            raise self._unusable(error) from error
        try:
            async with trio.open_nursery() as background:
                background.start_soon(guarding.serve)
                self.guarding = guarding
                with lasting():
                    self.engine = await self._started(outside, background)
                nursery.start_soon(self._watch)
                assert self.metrics is not None
                control = Control(self.engine, self.metrics.kept.of, troubles=self._troubles)
                self.api = self._front(self.engine, control)
                self._is_up.set()
                background.start_soon(self._serve_api, self.engine, self.api)
                background.start_soon(self._tell_service, self.engine, self.api)
                with self.engine.events.heard_by(control.hear):
                    await self.engine.serve()
                self.api.stop()
                with trio.move_on_after(LAST_ANSWERS_S):
                    await self.api.over.wait()
                background.cancel_scope.cancel()
        finally:
            lock.release()

    async def _started(self, outside: Outside, background: trio.Nursery) -> Engine:
        config = self.config
        engine = Engine(config, new_fleet(config.state_dir), outside, background)
        self.metrics = Metrics(engine)
        background.start_soon(self._tell_of, engine, self.metrics)
        try:
            await engine.load()
        except OSError as error:
            raise self._unusable(error) from error
        _log.info("hypemand starts", version=__version__, config=str(self.config_path), state_dir=str(config.state_dir))
        log_warnings(config)
        await engine.start()
        now = outside.clock.now()
        enabled = [schedule for schedule in engine.store.schedules.values() if schedule.settings.enabled]
        for schedule in sorted(enabled, key=lambda s: s.next_run_at)[:10]:
            at = "now" if schedule.next_run_at <= now else format_instant(schedule.next_run_at)
            _log.info("next run", instance_id=schedule.instance_id, at=at)
        return engine

    def _front(self, engine: Engine, control: Control) -> Serving:
        assert self.metrics is not None
        requests = Requests(engine)
        routes = [*api_routes(requests), openapi_route(), self.metrics.route()]
        return Serving(
            path=socket_path(self.config),
            socket_app=make_app([*routes, *control_routes(control), import_route(requests)]),
            listen=self.config.api.listen,
            tcp_app=make_app(routes, self.access.client_of),
            tls=self.access.tls,
            inherited=self.inherited,
        )

    def _troubles(self) -> list[str]:
        """Why clients of the API may have trouble; for the status."""
        unreachable = self.api.unreachable if self.api else {}
        return [*self.access.problems, *(f"API not reachable at {place}: {why}" for place, why in unreachable.items())]

    async def _serve_api(self, engine: Engine, api: Serving) -> None:
        await engine.scheduler.serving.wait()
        await keep_up("API", api.serve)

    async def _tell_service(self, engine: Engine, api: Serving) -> None:
        await engine.scheduler.serving.wait()
        with trio.move_on_after(DOORS_S):
            await api.listening.wait()
        await self.service.ready()
        line = StatusLine(engine, self._in_few_words)
        with engine.events.heard_by(line.hear):
            await keep_up("service", lambda: self.service.running(engine.scheduler, line.text))

    def _in_few_words(self) -> Iterator[str]:
        """What keeps it from working as it was told to; for the service manager, whose log has the rest."""
        if self._edit_refused:
            yield "the config file is invalid or unreadable, what it said before is in force"
        troubles = len(self._troubles())
        if troubles:
            yield f"API: {troubles} problem{'s' * (troubles > 1)}"

    async def _tell_of(self, engine: Engine, metrics: Metrics) -> None:
        """From the first on: what was left open is settled before anything is served."""
        hooks = Hooks(lambda: self.config.hooks)
        with engine.events.heard_by(hooks.heard), engine.events.heard_by(metrics.heard):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(keep_up, "metrics", metrics.keep_counting)
                await keep_up("hooks", hooks.serve)

    def _unusable(self, error: OSError) -> StateUnusableError:
        where = error.filename or self.config.state_dir
        return StateUnusableError(f"state directory {self.config.state_dir} can't be used: {where}: {error.strerror}")

    async def _obey_signals(self, signals: AsyncIterable[int], nursery: trio.Nursery) -> None:
        stopping = False
        async for number in signals:
            if number == signal.SIGHUP:
                # Not waited for: a SIGTERM behind it must not wait for a backend that hangs.
                nursery.start_soon(self._reload_all)
                continue
            grace_s = 0.0 if stopping else self.config.runs.shutdown_grace.total_seconds()
            _log.info("stopping", signal=signal.Signals(number).name, grace_s=grace_s)
            if self.engine is None:
                self.life.cancel()
            else:
                self.engine.stop(grace_s)
            if self.api is not None:
                self.api.stop()
            if not stopping:
                nursery.start_soon(self.service.stopping, grace_s)
            stopping = True

    async def _watch(self) -> None:
        await watch_file(self.config_path, self._reload_edit, known=self.version)

    async def _reload_all(self) -> None:
        await self._is_up.wait()  # asked for during a start: what was read by then may be older
        assert self.engine is not None
        async with self.service.reloading():
            await self.engine.reread()
            await self._reload_edit()

    async def _reload_edit(self) -> None:
        async with self._reloading:
            config = await self._read_config()
            self._edit_refused = config is None
            if config is not None:
                await self._apply(config)
            with trio.move_on_after(CONFIG_PATIENCE_S) as reading:
                await self.access.reread(self.config.api)  # also when the config is not: a token may be taken away
            if reading.cancelled_caught:
                _log.error("tokens and TLS unreadable; the ones before stay in force", error="reading them hangs")

    async def _read_config(self) -> Config | None:
        log = _log.bind(path=str(self.config_path))
        try:
            with trio.fail_after(CONFIG_PATIENCE_S):
                return await trio.to_thread.run_sync(
                    load_config, self.config_path, registry.parse_settings, abandon_on_cancel=True
                )
        except InvalidInput as error:
            for problem in error.problems:
                log.error("invalid config; the one before stays in force", error=str(problem))
        except (OSError, trio.TooSlowError) as error:
            log.error("config unreadable; the one before stays in force", error=str(error) or "reading it hangs")
        return None

    async def _apply(self, config: Config) -> None:
        assert self.engine is not None
        if config.state_dir != self.engine.store.state_dir:
            _log.warning("a new state_dir takes a restart", state_dir=str(config.state_dir))
        assert self.api is not None
        if socket_path(config) != self.api.path:
            _log.warning("a new api.socket takes a restart", socket=str(socket_path(config)))
        if config.api.listen != self.api.listen:
            _log.warning("a new api.listen takes a restart", listen=config.api.listen)
        set_up_log(config.log)
        log_warnings(config)
        self.config = config
        assert self.guarding is not None
        self.guarding.want(config.runs.guard)
        await self.engine.apply_config(config)
        _log.info("config in force", path=str(self.config_path), schedules=len(self.engine.store.schedules))


def _settle_command(config: Config, path: Path) -> list[str]:
    return settle_command(config.state_dir, config.log.level, config.log.format, path)


def log_warnings(config: Config) -> None:
    """Log what *config* allows, but what is worth a second look."""
    for warning in config_warnings(config):
        _log.warning("config", warning=warning)


async def run_daemon(config_path: Path, version: Signature | None, config: Config, access: Access | None) -> None:
    """Run the daemon until it is told to stop.

    Args:
        version: The config file's, from before *config* was read from it.
        access: What *config* asks for; None where it has no ``api.listen``.

    Raises:
        LockHeldError: Another one runs on the same state.
        NewerFormatError: The state is that of a later version.
        StateUnusableError: There is no state directory to be had.
    """
    service, inherited = Service(take_notifier(os.environ)), take_inherited(os.environ)
    with contextlib.closing(inherited):
        await Daemon(config_path, version, config, CurrentAccess(access), service, inherited).run()
