"""The backends in use. One that the config changes or drops goes on serving the runs that began with it."""

from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import structlog
import trio
from attrs import define

from hypemand.backends import registry
from hypemand.backends.base import Backend, BackendError, Surroundings
from hypemand.config import BackendConfig
from hypemand.core.errors import HypemandError

OPEN_TIMEOUT_S = 30.0
CLOSE_TIMEOUT_S = 5.0
_log = structlog.get_logger()

Connect = Callable[[str, Mapping[str, Any]], Backend]
"""Name and connection to a backend; does no I/O."""
Build = Callable[[str, BackendConfig], Backend]
"""Name and config table to a backend; does no I/O."""


class UnknownBackendError(HypemandError):
    """A schedule names a backend that the config doesn't have."""


@define(eq=False)
class _Live:
    backend: Backend
    config: BackendConfig
    users: int = 0
    dropped: bool = False
    open: bool = False
    opening: bool = False


@define(eq=False)
class Lease:
    """A backend that stays open until the end of the block."""

    _live: _Live

    async def __aenter__(self) -> Backend:
        """It is not closed from now on."""
        self._live.users += 1
        return self._live.backend

    async def __aexit__(self, *_: object) -> None:
        """Close it, where it was only kept for the block."""
        self._live.users -= 1
        await _close_if_done(self._live)


class Fleet:
    """Backends by name, each counted by the runs that use it."""

    def __init__(self, build: Build, connect: Connect) -> None:
        self._build = build
        self._connect = connect
        self._live: dict[str, _Live] = {}
        self._dropped: list[_Live] = []

    @property
    def backends(self) -> dict[str, Backend]:
        """The backends of the config in force."""
        return {name: live.backend for name, live in self._live.items()}

    def resolve(self, name: str | None) -> str:
        """*name*, or where it is None that of the only backend there is.

        Raises:
            UnknownBackendError: There is no such backend, or several to choose from.
        """
        known = ", ".join(self._live) or "none"
        if name is None and len(self._live) == 1:
            return next(iter(self._live))
        if name is None:
            raise UnknownBackendError(f"the schedule names no backend, and the config has not just one: {known}")
        if name not in self._live:
            raise UnknownBackendError(f"backend {name!r} is not in the config (known: {known})")
        return name

    def lease(self, name: str) -> "Lease":
        """The backend called *name*, kept open until the end of the block.

        Raises:
            UnknownBackendError: There is no such backend.
        """
        return Lease(self._live[self.resolve(name)])

    @asynccontextmanager
    async def reconnect(self, name: str, connection: Mapping[str, Any]) -> AsyncIterator[Backend]:
        """The backend that a run began with: the one in use if its connection is still the same, else one of its own.

        Raises:
            InvalidInput: This version doesn't know the connection's type or settings.
        """
        live = self._live.get(name)
        if live is not None and live.backend.connection == connection:
            async with self.lease(name) as backend:
                yield backend
            return
        backend = self._connect(name, connection)
        try:
            yield backend
        finally:
            await _close(backend)

    def have(self, configs: Mapping[str, BackendConfig]) -> None:
        """Have the backends of *configs*, those whose table did not change as they are. Enough for looking."""
        for name in [*self._live]:
            if configs.get(name) != self._live[name].config:
                live = self._live.pop(name)
                live.dropped = True
                self._dropped.append(live)
        for name in configs.keys() - self._live.keys():
            self._live[name] = _Live(self._build(name, configs[name]), configs[name])

    @property
    def is_settled(self) -> bool:
        """Whether there is nothing to open, and nothing to close."""
        return not self._dropped and all(live.open for live in self._live.values())

    async def open_all(self, *, used: Collection[str]) -> None:
        """Open the backends that are not open yet, all at once, and close those that `have` dropped.

        Args:
            used: Names of backends through which something was captured before.
        """
        async with trio.open_nursery() as nursery:
            for live in self._live.values():
                if not live.open and not live.opening:
                    live.opening = True
                    nursery.start_soon(self._open, live, live.backend.name not in used)
            while self._dropped:
                nursery.start_soon(_close_if_done, self._dropped.pop())

    async def _open(self, live: _Live, first_use: bool) -> None:  # noqa: FBT001 - start_soon takes no keywords
        backend = live.backend
        try:
            with trio.fail_after(OPEN_TIMEOUT_S):
                await backend.open(first_use=first_use)
            live.open = True
        except (BackendError, trio.TooSlowError) as error:
            _log.error("backend not ready; trying again", backend=backend.name, error=str(error) or "no answer")
        except Exception as error:  # noqa: BLE001 - a bug in one backend stops no other
            _log.exception("internal error of a backend", backend=backend.name, error=str(error))
        finally:
            live.opening = False

    async def aclose(self) -> None:
        """Close every backend."""
        self.have({})
        await self.open_all(used=())


async def _close_if_done(live: _Live) -> None:
    if live.dropped and live.users == 0:
        await _close(live.backend)


async def _close(backend: Backend) -> None:
    try:
        with trio.move_on_after(CLOSE_TIMEOUT_S, shield=True):
            await backend.aclose()
    except Exception as error:  # noqa: BLE001 - it is not used again
        _log.exception("internal error of a backend", backend=backend.name, error=str(error))


def new_fleet(state_dir: Path) -> Fleet:
    """A fleet of the backend types that are installed, for the state in *state_dir*."""
    surroundings = Surroundings(state_dir)

    def build(name: str, config: BackendConfig) -> Backend:
        return registry.backend_type(config.type).build(name, config.settings, surroundings)

    def connect(name: str, connection: Mapping[str, Any]) -> Backend:
        return registry.connect(name, connection, surroundings)

    return Fleet(build, connect)
