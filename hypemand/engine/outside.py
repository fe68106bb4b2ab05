"""What the engine takes from its machine: clock, disk, identity, and how patient it is."""

import secrets
from collections.abc import Callable

from attrs import field, frozen

from hypemand.engine.clock import Clock, SystemClock, boot_id
from hypemand.engine.leases import Leases, NoLeases
from hypemand.engine.limits import Patience
from hypemand.engine.space import Measure, measure
from hypemand.state.files import Disk


@frozen
class Tempo:
    """How often what failed is tried again, and patterns are looked up; seconds."""

    save_s: float = 1.0
    settle_first_s: float = 1.0
    settle_most_s: float = 30.0
    discover_s: float = 30.0


@frozen(kw_only=True)
class Outside:
    """What the engine takes from its machine; tests put their own in its place."""

    clock: Clock
    disk: Disk
    measure: Measure
    new_id: Callable[[], str]
    boot_id: str
    leases: Leases = field(factory=NoLeases)
    patience: Patience = field(factory=Patience)
    tempo: Tempo = field(factory=Tempo)


def this_machine() -> Outside:
    """The real clock, disk and identity."""
    return Outside(clock=SystemClock(), disk=Disk(), measure=measure, new_id=_new_run_id, boot_id=boot_id())


def _new_run_id() -> str:
    return f"r{secrets.token_hex(12)[1:]}"  # a letter first: it is part of QEMU job ids and file names
