"""What operators, hypervisors, disks and busy machines do meanwhile; see `events` for clocks and schedules."""

from random import Random
from typing import TYPE_CHECKING

import trio
from attrs import define

from hypemand.core.model import InstanceId, InstanceState
from tests.simulation.hypervisor import OPERATOR, Hypervisor
from tests.virtual_time import VirtualClock

if TYPE_CHECKING:
    from tests.simulation.events import Events
    from tests.simulation.world import World

PING_S = (0.3, 1.0)
"""How soon a guard notices that its daemon hangs, and kills it."""


@define(eq=False)
class Hosts:
    """Operators at work, outages and hangs."""

    world: "World"
    events: "Events"
    rng: Random

    def _note(self, what: str) -> None:
        self.world.chaos.note("world", what)

    def _guest(self) -> tuple[Hypervisor, InstanceId] | None:
        """One of those that things happen to: not the control's."""
        hypervisor = self.world.hypervisors[self.rng.choice(["alpha", "beta"])]
        there = [*hypervisor.machines]
        return (hypervisor, self.rng.choice(there)) if there else None

    def let_run(self, hypervisor: Hypervisor, instance: InstanceId) -> None:
        """An operator starts or resumes the guest."""
        machine = hypervisor.machines.get(instance)
        if machine is None or machine.state is InstanceState.RUNNING:
            return
        if machine.paused_by in (OPERATOR, None):
            hypervisor.let_run(instance, OPERATOR)
            self.world.trace(f"operator lets {instance} run")

    async def operator_pauses(self) -> None:
        """An operator pauses a guest, and resumes it after a while."""
        guest = self._guest()
        if guest is None or guest[0].machines[guest[1]].state is not InstanceState.RUNNING:
            return
        hypervisor, instance = guest
        self._note("operator pauses")
        self.world.trace(f"operator pauses {instance}")
        hypervisor.set_state(instance, InstanceState.PAUSED, OPERATOR)
        self.world.oracle.operator_paused(instance)
        self.events.later(self.rng.uniform(1, 400), lambda: self.let_run(hypervisor, instance))

    async def operator_lets_run(self) -> None:
        """An operator resumes a guest that we froze."""
        for (name, instance), frozen in [*self.world.oracle.frozen.items()]:
            hypervisor = self.world.hypervisors[name]
            if hypervisor.machines[InstanceId(instance)].paused_by == frozen.run_id and name != "steady":
                self._note("operator resumes ours")
                hypervisor.let_run(InstanceId(instance), OPERATOR)
                del self.world.oracle.frozen[name, instance]
                return
        self.events.later(self.rng.uniform(1, 30), self._try_again)

    def _try_again(self) -> None:
        self.world.nursery.start_soon(self.operator_lets_run)

    async def operator_stops(self) -> None:
        """An operator stops a guest for a while, or puts it to sleep."""
        guest = self._guest()
        if guest is None or guest[0].machines[guest[1]].state is not InstanceState.RUNNING:
            return
        hypervisor, instance = guest
        self._note("operator stops")
        state = self.rng.choice([InstanceState.STOPPED, InstanceState.STANDBY, InstanceState.SHUTDOWN])
        self.world.trace(f"operator: {instance} is {state}")
        hypervisor.set_state(instance, state)
        self.events.later(self.rng.uniform(1, 900), lambda: self.let_run(hypervisor, instance))

    async def vanish(self) -> None:
        """An instance is undefined, and comes back; sometimes much later."""
        guest = self._guest()
        if guest is None or not guest[0].vanish(guest[1]):
            return
        hypervisor, instance = guest
        self._note("vanishes")
        self.events.away_since[instance] = self.world.clock.true_now()

        def come_back() -> None:
            if instance in hypervisor.away:
                self.world.trace(f"{instance} comes back")
                hypervisor.come_back(instance)
                self.events.editors.came_back(instance)

        self.events.later(self.rng.uniform(10, 3000), come_back)

    async def unavailable(self) -> None:
        """A hypervisor answers nobody for a while."""
        hypervisor = self.world.hypervisors[self.rng.choice(["alpha", "beta"])]
        if hypervisor.available:
            self._note("unavailable")
            hypervisor.available = False

            def back() -> None:
                hypervisor.available = True
                self._were_in_trouble(hypervisor)

            self.events.later(self.rng.uniform(1, 300), back)

    async def refuse_resume(self) -> None:
        """A hypervisor refuses for a while to resume a guest: best one that stands still."""
        frozen = [(name, instance) for name, instance in self.world.oracle.frozen if name != "steady"]
        guest = self._guest()
        if frozen:
            name, instance = self.rng.choice(frozen)
            guest = self.world.hypervisors[name], InstanceId(instance)
        if guest is None or guest[1] in guest[0].refuses_resume:
            return
        hypervisor, refused = guest
        self._note("refuses resume")
        hypervisor.refuses_resume.add(refused)

        def relent() -> None:
            hypervisor.refuses_resume.discard(refused)
            self._were_in_trouble(hypervisor)

        self.events.later(self.rng.choice([3, 30, 120, 900]) * self.rng.random(), relent)

    def _were_in_trouble(self, hypervisor: Hypervisor) -> None:
        for instance in hypervisor.machines:
            at = self.world.oracle.trouble.get((hypervisor.name, instance), 0.0)
            self.world.oracle.in_trouble(hypervisor.name, instance, max(at, trio.current_time()))

    async def disk_full(self) -> None:
        """The disk is full for a while."""
        self._note("disk full")
        self.world.chaos.disk_full = True
        self.events.later(self.rng.uniform(1, 60), self._disk_has_room)

    def _disk_has_room(self) -> None:
        self.world.chaos.disk_full = False
        self.world.oracle.disturbed("disk")

    async def slow_disk(self) -> None:
        """Each operation takes up to two seconds, for a while."""
        self._note("slow disk")
        self.world.chaos.slow_disk = True

        def quick() -> None:
            self.world.chaos.slow_disk = False
            self.world.oracle.disturbed("disk")

        self.events.later(self.rng.uniform(1, 60), quick)

    async def block_loop(self) -> None:
        """A busy worker keeps the event loop from running: time passes at once."""
        self._note("loop blocked")
        self._leap(self.rng.uniform(0.05, 0.9))

    def _leap(self, seconds: float) -> None:
        clock = trio.lowlevel.current_clock()
        assert isinstance(clock, VirtualClock)
        clock.jump(seconds)
        self.world.oracle.disturbed("loop")

    async def hang(self) -> None:
        """The daemon hangs while a guest stands still, if one does; its guard kills it."""
        life = self.world.life
        if not self.world.has_guard or not life.serves or life.hung is not None:
            return
        self._note("hung, then killed")
        life.hung = trio.Event()
        self.world.oracle.disturbed("loop")

        def kill() -> None:
            self.world.die(life, "killed by its guard")

        self.events.later(self.rng.uniform(*PING_S), kill)

    async def guard_dies(self) -> None:
        """The guard dies, and the daemon needs a moment for another one."""
        self._note("guard dies")
        self.world.chaos.guard_is_dead = True

        def another() -> None:
            self.world.chaos.guard_is_dead = False
            self.world.oracle.disturbed("guard")

        self.events.later(self.rng.uniform(0.2, 20), another)

    async def stop_and_continue(self) -> None:
        """The daemon is stopped while no guest stands still, and continued: its time has leapt."""
        if not self.world.oracle.frozen and self.world.life.serves and self.world.life.hung is None:
            self._note("stopped, then continued")
            self._leap(self.rng.uniform(2, 50))
