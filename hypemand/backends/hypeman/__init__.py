"""Guests of a Hypeman server: it captures them itself, and keeps the snapshots; hypemand asks it over HTTP."""

from collections.abc import Callable

from attrs import frozen

from hypemand.backends.base import Backend, BackendType, Surroundings
from hypemand.backends.hypeman.settings import HypemanSettings


def _build(name: str, settings: HypemanSettings, surroundings: Surroundings) -> Backend:
    # The HTTP client takes longer to import than most commands take, which only read the config.
    from hypemand.backends.hypeman.backend import build  # noqa: PLC0415

    return build(name, settings, surroundings)


@frozen
class _Type:
    settings: type[HypemanSettings] = HypemanSettings
    build: Callable[[str, HypemanSettings, Surroundings], Backend] = _build


TYPE: BackendType = _Type()
