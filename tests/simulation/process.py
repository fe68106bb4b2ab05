"""The life of one process over the state: a daemon, a guard or ``recover``, up to its end or its death."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import trio
from attrs import define, field

from hypemand.backends.base import Backend
from hypemand.config import BackendConfig
from hypemand.engine.engine import Engine
from hypemand.engine.fleet import Fleet
from hypemand.engine.leases import NoGuardError, NoLeases
from hypemand.engine.outside import Outside
from hypemand.state.codec import Line
from hypemand.state.segments import LogContent
from tests.disks import Crash
from tests.fakes import FakeRoom
from tests.simulation.client import Client
from tests.simulation.disk import SimDisk

if TYPE_CHECKING:
    from tests.simulation.world import World

ROTATE_BYTES = 24 * 1024
PATIENCE_S = 30.0
PAUSE_S = 1.0


@define(eq=False)
class SimLeases:
    """The leases of one daemon with its guard, which may be dead."""

    life: "Life"

    async def check(self) -> None:
        await trio.lowlevel.checkpoint()
        self._guarded()

    def _guarded(self) -> None:
        if self.life.world.chaos.guard_is_dead:
            self.life.world.chaos.note("no guard", "lease")
            raise NoGuardError("the guard is dead")

    async def open(self, run_id: str, within_s: float) -> None:
        life, chaos = self.life, self.life.world.chaos
        await life.gate()
        life.check()
        chaos.crash_point(life, "lease", "before")
        await trio.sleep(0.001)
        await life.gate()
        life.check()
        self._guarded()
        self.life.world.leased.add(run_id)
        chaos.crash_point(life, "lease", "after")

    def close(self, run_id: str) -> None:
        self.life.world.leased.discard(run_id)


@define(eq=False)
class Life:
    """One process. Dead, nothing of it reaches disk or hypervisor any more."""

    world: "World"
    role: str
    number: int
    dead: bool = False
    hung: trio.Event | None = None
    loaded_at: float = math.inf
    reads_late: bool = False
    engine: Engine | None = None
    background: trio.Nursery | None = None
    scope: trio.CancelScope = field(factory=trio.CancelScope)
    over: trio.Event = field(factory=trio.Event)

    def check(self) -> None:
        if self.dead:
            raise Crash

    async def gate(self) -> None:
        while self.hung is not None and not self.dead:
            await self.hung.wait()

    @property
    def serves(self) -> bool:
        return not self.dead and self.role == "daemon" and self.loaded_at < math.inf

    async def run(self) -> None:
        try:
            with self.scope:
                await self._run()
        finally:
            if self.engine is not None:
                self.engine.runlog.close()
            if not self.dead:
                self.loaded_at = math.inf
            self.over.set()

    async def _run(self) -> None:
        try:
            async with trio.open_nursery() as background:
                self.background = background
                self.engine = engine = Engine(self.world.config, self._fleet(), self._outside(), background)
                self._watch(engine)
                await engine.load()
                self._loaded(engine)
                if self.role == "daemon":
                    await engine.start()
                    if engine.config is not self.world.config:  # edited while it started
                        await engine.apply_config(self.world.config)
                    await engine.serve()
                else:
                    await self._settle(engine)
                background.cancel_scope.cancel()
        except* Crash:
            pass
        except* OSError as group:
            self.world.trace(f"{self.role} can't go on: {group.exceptions[0]}")
        except* Exception as group:  # noqa: BLE001 - whatever it is, it is a finding
            if not self.dead:
                self.world.oracle.fail(4, "the engine ended with an error", repr(group.exceptions))

    async def _settle(self, engine: Engine) -> None:
        """As ``recover`` does it; see `hypemand.engine.offline`."""
        with trio.move_on_after(PATIENCE_S):
            await engine.recovery.settle_each(PAUSE_S, {})
        await engine.close()

    def _fleet(self) -> Fleet:
        def build(name: str, config: BackendConfig) -> Backend:
            return Client(self.world.hypervisors[name], self, self.world.chaos)

        def connect(name: str, connection: Mapping[str, Any]) -> Backend:
            return Client(self.world.hypervisors[name], self, self.world.chaos)

        return Fleet(build, connect)

    def _outside(self) -> Outside:
        world = self.world
        return Outside(
            clock=world.clock,
            disk=SimDisk(world.platter, self, world.chaos),
            measure=FakeRoom().measure,
            new_id=world.new_id,
            boot_id=world.boot_id,
            leases=SimLeases(self) if world.has_guard and self.role == "daemon" else NoLeases(),
        )

    def _watch(self, engine: Engine) -> None:
        """Have the ledger hear what the engine takes for done."""
        runlog, ledger = engine.runlog, self.world.ledger
        runlog._rotate_bytes = ROTATE_BYTES
        append, open_log = runlog.append, runlog.open

        async def watched_append(line: Line) -> None:
            await append(line)
            self.check()
            ledger.acknowledged(line)

        async def watched_open() -> LogContent:
            content = await open_log()
            ledger.check_log(content)
            return content

        runlog.append = watched_append  # type: ignore[method-assign]
        runlog.open = watched_open  # type: ignore[method-assign]

    def _loaded(self, engine: Engine) -> None:
        world = self.world
        self.loaded_at = world.oracle.owner_since = trio.current_time()
        self.reads_late = bool(engine.store.unreadable)
        world.ledger.check_schedules(engine.store.schedules, engine.store.unreadable_instances)
        for instance in sorted(world.events.editors.edited):
            world.ledger.new_grid(instance)
        world.check_quarantine()
        world.trace(f"{self.role} {self.number} lives")
