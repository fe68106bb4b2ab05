"""What goes wrong at a call, and when a process dies: all of it from the seed."""

import errno
import os
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING

import trio
from attrs import define, field

from tests.disks import Crash
from tests.simulation import coverage

if TYPE_CHECKING:
    from tests.simulation.process import Life
    from tests.simulation.world import World

LATE_S = 3.0
SLOW_S = (0.5, 4.0)
SELDOM_ASKED = ("truncate", "remove", "open_append", "write_again", "read")


@define
class Temper:
    """How much goes wrong in a world, drawn once from its seed."""

    call_faults: float
    disk_faults: float
    lies: float
    partial: float
    crash_every_s: float
    event_every_s: float
    capture_s: tuple[float, float]

    @classmethod
    def drawn(cls, rng: Random) -> "Temper":
        return cls(
            call_faults=rng.choice([0.0, 0.01, 0.03, 0.06]),
            disk_faults=rng.choice([0.0, 0.001, 0.004, 0.01]),
            lies=rng.choice([0.0, 0.005, 0.02]),
            partial=rng.choice([0.0, 0.02, 0.05]),
            crash_every_s=rng.choice([120.0, 240.0, 600.0]),
            event_every_s=rng.choice([40.0, 90.0, 200.0]),
            capture_s=rng.choice([(0.05, 0.5), (0.5, 3.0), (2.0, 25.0)]),
        )


@define
class Armed:
    """The next death of the process: how, and at the how-manieth passing of which point."""

    how: str
    step: str
    when: str
    count: int


@define(eq=False)
class Chaos:
    """Draws faults. *calm*: nothing more goes wrong, the end of the world is looked at."""

    world: "World"
    rng: Random
    temper: Temper
    seen: Counter[tuple[str, str]] = field(factory=Counter)
    armed: Armed | None = None
    calm: bool = False
    disk_full: bool = False
    slow_disk: bool = False
    guard_is_dead: bool = False

    def note(self, fault: str, step: str) -> None:
        self.seen[fault, step] += 1
        self.world.trace(f"! {fault} @ {step}")

    # Deaths

    def arm(self, how: str) -> None:
        """Let the process die soon: at a step of the event loop, or at a call, each kind of call in its turn."""
        if self.rng.random() < 0.3:
            self.armed = Armed(how, coverage.STEP, "", self.rng.randrange(1, 400))
            return
        wanted = [pair for pair in coverage.CRASHES if pair[0].startswith(how)]
        fault, step = self.rng.choice(wanted)
        count = self.rng.choice([1, 1, 1, 3])
        self.armed = Armed(how, step, fault.split()[1], 1 if step in SELDOM_ASKED else count)

    def arm_here(self, steps: int) -> None:
        """Let the process that settles what another one left die as well, after so many steps."""
        self.armed = Armed("guard killed", coverage.STEP, "", steps)

    def disarm_guard(self) -> None:
        if self.armed is not None and self.armed.how == "guard killed":
            self.armed = None

    def _strikes(self, step: str, when: str) -> bool:
        armed = self.armed
        if armed is None or self.calm or (armed.step, armed.when) != (step, when):
            return False
        armed.count -= 1
        return armed.count <= 0

    def crash_point(self, life: "Life", step: str, when: str) -> None:
        """A point at which the process may die; raises `Crash` where it does."""
        if self.armed is not None and self._strikes(step, when):
            armed, self.armed = self.armed, None
            self.note(f"{armed.how} {when}", step)
            self.world.die(life, armed.how)
            raise Crash

    def loop_step(self) -> None:
        """A step of the event loop."""
        if self.armed is not None and self._strikes(coverage.STEP, ""):
            armed, self.armed = self.armed, None
            self.note(armed.how, coverage.STEP)
            self.world.die(self.world.life, armed.how)

    # Hypervisors

    def answer_delay(self, name: str) -> float:
        return self.rng.uniform(0.0005, 0.01 if name == "steady" else 0.03)

    def capture_s(self, name: str) -> float:
        return 0.2 if name == "steady" or self.calm else self.rng.uniform(*self.temper.capture_s)

    def hypervisor_fault(self, name: str, step: str) -> str | None:
        """What goes wrong with this call; `answer_delay` was not asked yet."""
        if self.calm or name == "steady":
            return None
        draw = self.rng.random()
        fault = None
        if step == "stale state":
            fault = "stale" if draw < self.temper.lies else None
            step = "state"
        elif step == "capturing":
            fault = self.rng.choice(["partial", "partial", "hang"]) if draw < self.temper.partial else None
        else:
            fault = self._call_fault(step, draw)
        if fault is not None:
            self.note(fault, step)
        return fault

    def _call_fault(self, step: str, draw: float) -> str | None:
        rare = 4.0 if step in ("open", "instances", "settle", "delete_snapshot") else 1.0
        if draw >= self.temper.call_faults * rare:
            return None
        fault = self.rng.choice(["error", "error", "lost", "lost", "slow", "hang", "mute"])
        if step == "pause" and self.rng.random() < 0.3:
            fault = "late"
        return fault

    def slow(self) -> float:
        return self.rng.uniform(*SLOW_S)

    def told(self, step: str, instance: str, answer: str) -> None:
        self.world.trace(f"{self.world.role()} {step} {instance}: {answer}")

    def in_trouble(self, name: str, instance: str, until: float) -> None:
        self.world.oracle.in_trouble(name, instance, until)

    def lied(self, instance: str) -> None:
        self.world.oracle.lied(instance)

    def later(self, effect: Callable[[], None]) -> None:
        async def wait() -> None:
            await trio.sleep(self.rng.uniform(0.1, LATE_S))
            effect()

        self.world.nursery.start_soon(wait)

    # Disks

    def disk_delay(self) -> float:
        if self.slow_disk and not self.calm:
            self.world.oracle.disturbed("slow disk")
            return self.rng.uniform(0.0, 2.0)
        return 0.0

    def disk_fault(self, operation: str) -> OSError | None:
        if self.calm:
            return None
        if self.disk_full and operation in ("write", "open_append", "sync_directory", "rename"):
            return self._disk_error(errno.ENOSPC, operation)
        rare = 20.0 if operation in SELDOM_ASKED else 1.0
        if self.rng.random() >= self.temper.disk_faults * rare:
            return None
        full = operation in ("write", "open_append", "rename") and self.rng.random() < 0.5
        return self._disk_error(errno.ENOSPC if full else errno.EIO, operation)

    def _disk_error(self, number: int, operation: str) -> OSError:
        self.note(errno.errorcode[number], operation)
        self.world.oracle.disturbed(f"{operation} failed")
        return OSError(number, os.strerror(number))

    def torn_at(self, operation: str, size: int) -> int | None:
        """Where a write breaks off, because the process dies in it."""
        armed = self.armed
        if armed is None or self.calm or (armed.step, armed.when) != (operation, "torn") or armed.count > 1:
            return None
        return self.rng.randrange(size)
