"""What people, clocks and hosts do meanwhile: edits, pauses, jumps, outages, deaths. All of it from the seed."""

from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from random import Random
from typing import TYPE_CHECKING

import trio
from attrs import define, field

from hypemand.core.model import InstanceState
from tests.simulation.editors import Editors
from tests.simulation.hosts import Hosts

if TYPE_CHECKING:
    from tests.simulation.world import World

CORRECTED_AFTER_S = (10.0, 70.0)
UNSEEN_S = 6.0
JUMPS = {
    "jump +1h": timedelta(hours=1),
    "jump -1h": timedelta(hours=-1),
    "jump +1d": timedelta(days=1),
    "jump -1d": timedelta(days=-1),
    "jump +10y": timedelta(days=3652),
    "jump to 1970": timedelta(days=-20521),
}


@define(eq=False)
class Events:
    """Everything that is not a call's own fault.

    Attributes:
        over: The last process is told to stop.
    """

    world: "World"
    rng: Random
    away_since: dict[str, datetime] = field(factory=dict)
    jumped_at: float | None = None
    jumped_after_s: float = 0.0
    jumped_life: int = 0
    jump_in_log: bool = False
    boot_seen: int = 1
    over: bool = False
    hosts: Hosts = field(init=False)
    editors: Editors = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.hosts = Hosts(self.world, self, self.rng)
        self.editors = Editors(self.world, self, self.rng)

    async def happen(self, for_s: float) -> None:
        """Let things happen for a while, then let all be well, and in the end have the process stop."""
        world, rng = self.world, self.rng
        until = trio.current_time() + for_s
        self.world.nursery.start_soon(self._kill, until)
        while trio.current_time() < until:
            await trio.sleep(rng.expovariate(1 / world.chaos.temper.event_every_s))
            await rng.choice(self._kinds())()
            world.oracle.look()
        self._heal()
        longest = max(world.interval_of(instance) for instance in world.should_run())
        await trio.sleep(30 + 15)
        await self.editors.retry_api()
        await trio.sleep(2.3 * longest + 400)
        self.over = True
        while not world.life.serves:
            await trio.sleep(0.1)
        assert world.life.engine is not None
        world.life.engine.stop(60)

    def _kinds(self) -> list[Callable[[], Awaitable[None]]]:
        hosts, editors = self.hosts, self.editors
        twice = [editors.edit_config, editors.put, hosts.operator_pauses, hosts.refuse_resume]
        return [
            *twice,
            *twice,
            self._jump,
            self._suspend,
            self._unsynchronised,
            editors.delete,
            editors.run_now,
            editors.edit_by_hand,
            editors.break_by_hand,
            hosts.operator_lets_run,
            hosts.operator_stops,
            hosts.vanish,
            hosts.unavailable,
            hosts.disk_full,
            hosts.slow_disk,
            hosts.block_loop,
            hosts.hang,
            hosts.stop_and_continue,
            hosts.guard_dies,
        ]

    def _note(self, what: str) -> None:
        self.world.chaos.note("world", what)

    async def _kill(self, until: float) -> None:
        while trio.current_time() < until:
            await trio.sleep(self.rng.expovariate(1 / self.world.chaos.temper.crash_every_s))
            if self.world.chaos.armed is None and not self.world.chaos.calm:
                self.world.chaos.arm("kill" if self.rng.random() < 0.6 else "power")

    def _heal(self) -> None:
        world = self.world
        world.trace("all is well from now on")
        world.chaos.calm, world.chaos.armed = True, None
        world.chaos.disk_full = world.chaos.slow_disk = world.chaos.guard_is_dead = False
        world.clock.synced = None
        if world.life.hung is not None:
            world.die(world.life, "killed by its guard")
        self._set_offset(timedelta(0))
        for hypervisor in world.hypervisors.values():
            hypervisor.available = True
            hypervisor.refuses_resume.clear()
            for instance in [*hypervisor.away]:
                hypervisor.come_back(instance)
                self.editors.came_back(instance)
            for instance, machine in hypervisor.machines.items():
                if machine.state is not InstanceState.RUNNING:
                    self.hosts.let_run(hypervisor, instance)

    def later(self, after_s: float, what: Callable[[], None]) -> None:
        async def wait() -> None:
            await trio.sleep(after_s)
            if not self.world.chaos.calm:
                what()

        self.world.nursery.start_soon(wait)

    # Clocks

    def _set_offset(self, offset: timedelta) -> None:
        clock = self.world.clock
        if clock.offset != offset:
            unseen = self.jumped_at is not None and trio.current_time() - self.jumped_at < UNSEEN_S
            ahead = offset > clock.offset  # by more than any interval: told from any line that was written before
            clock.offset = offset
            self.jumped_at, self.jumped_after_s = trio.current_time(), clock.went_by_s()
            self.jumped_life = self.world.life.number if self.world.life.serves else 0
            boot = self.world.ledger.boot_with_lines
            self.jump_in_log = boot == self.world.boot_id or (ahead and bool(boot))
            if unseen and not offset:  # gone before anybody looked at the clock
                self.jumped_life, self.jump_in_log = 0, False
            self.world.ledger.new_grid()
        self.world.oracle.disturbed("clock")

    async def _jump(self) -> None:
        if self.world.clock.is_wrong:
            return
        name = self.rng.choice(sorted(JUMPS))
        self._note(name)
        self._set_offset(JUMPS[name])
        self.later(self.rng.uniform(*CORRECTED_AFTER_S) * self.rng.choice([1, 1, 20]), self._correct_clock)

    def reboot(self) -> None:
        """A machine that comes up does not know whether its clock is right, until somebody in the net tells it."""
        self.world.clock.reboot()
        self.world.clock.synced = False
        self._set_offset(self.world.clock.offset)

        def told() -> None:
            self._set_offset(timedelta(0))
            self.world.clock.synced = True

        self.later(self.rng.uniform(2, 100), told)

    def _correct_clock(self) -> None:
        self._set_offset(timedelta(0))

    async def _suspend(self) -> None:
        if self.rng.random() < 0.3:
            self._note("suspend a week")
            self.world.clock.suspended += timedelta(days=7)
            self.world.oracle.disturbed("suspend")

    async def _unsynchronised(self) -> None:
        self._note("unsynchronised")
        self.world.clock.synced = False

        def synchronise() -> None:
            self.world.clock.synced = True

        self.later(self.rng.uniform(60, 600), synchronise)

    def while_down(self) -> None:
        """What is done to files and clock while nobody looks."""
        draw = self.rng.random()
        instance = self.editors.made_here()
        if draw < 0.1 and instance is not None:
            self.editors.edit_file(instance)
        elif draw < 0.2:
            entry = self.rng.choice(self.world.config.schedules[1:])
            path = self.world.platter.root / "schedules" / f"{entry.instance}.json"
            if path.exists():
                self.editors.break_file(path)
        elif draw < 0.3 and not self.world.clock.is_wrong:
            self.world.nursery.start_soon(self._jump)
