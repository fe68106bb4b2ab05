"""What runs work with, put together once by the engine."""

from collections.abc import Callable

import trio
from attrs import frozen

from hypemand.config import RunsConfig
from hypemand.core.model import RunStarted
from hypemand.engine.beside import Beside
from hypemand.engine.clock import Clock
from hypemand.engine.events import Events
from hypemand.engine.fleet import Fleet
from hypemand.engine.gone import GoneWatch
from hypemand.engine.leases import Leases
from hypemand.engine.limits import Patience
from hypemand.engine.pruning import Pruner
from hypemand.engine.recorder import Recorder
from hypemand.engine.recovery import LeftOpen
from hypemand.engine.rush import Rush
from hypemand.engine.slots import Slots
from hypemand.engine.space import Space
from hypemand.state.runlog import RunLog
from hypemand.state.store import Store


@frozen(kw_only=True)
class Means:
    """What runs work with.

    Attributes:
        limits: The table ``[runs]`` in force.
        give_up: Set when hypemand has to end; what is then still being retried is left to the next start.
        hand_over: Takes an open run that could not be settled.
    """

    clock: Clock
    store: Store
    runlog: RunLog
    fleet: Fleet
    slots: Slots
    beside: Beside
    rush: Rush
    space: Space
    pruner: Pruner
    recorder: Recorder
    events: Events
    gone: GoneWatch
    leases: Leases
    limits: Callable[[], RunsConfig]
    patience: Patience
    new_id: Callable[[], str]
    boot_id: str
    give_up: trio.Event
    hand_over: Callable[[RunStarted, LeftOpen], None]
