"""A world: hypervisors, a disk, a clock, and one process after the other that looks after the guests."""

import hashlib
import itertools
import math
from collections import deque
from datetime import timedelta
from pathlib import Path
from random import Random

import orjson
import trio
from attrs import define

from hypemand.config import BackendConfig, Config, RetentionEntry, RunsConfig, ScheduleEntry
from hypemand.core.model import Freezer, InstanceId, Retention
from tests.simulation.chaos import Chaos, Temper
from tests.simulation.clock import SimClock
from tests.simulation.events import Events
from tests.simulation.hypervisor import Hypervisor, Machine
from tests.simulation.ledger import Ledger
from tests.simulation.oracle import Oracle, Violation
from tests.simulation.platter import Platter
from tests.simulation.process import Life

TOLD = 60
OLD_WISH_S = 700.0
HOURS = 3.0


@define(eq=False)
class _Steps(trio.abc.Instrument):
    """Tells chaos of each step of the event loop."""

    chaos: Chaos

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.chaos.loop_step()


class World:
    """One seed's world. Make it, `run` it, and read `oracle.violation` and the figures.

    Attributes:
        leased: Runs whose freeze the guard knows of, also those of processes that are dead.
        has_guard: A dead daemon's open runs are settled within a second.
        is_local: Hypemand and the guests share a host: a power cut stops them all.
    """

    def __init__(self, seed: int, root: Path) -> None:
        self.seed = seed
        rng = Random(f"{seed}/world")
        self.rng = rng
        self.clock = SimClock()
        self.oracle = Oracle(self)
        self.ledger = Ledger(self)
        self.platter = Platter(root, self.ledger.on_line, self.ledger.twice)
        self.chaos = Chaos(self, Random(f"{seed}/chaos"), Temper.drawn(rng))
        self.has_guard = rng.random() < 0.7
        self.is_local = rng.random() < 0.6
        self.boot = 1
        self.crashes = 0
        self.leased: set[str] = set()
        self.lives = itertools.count(1)
        self.last_events: deque[str] = deque(maxlen=TOLD)
        self._digest = hashlib.sha256()
        self._ids = itertools.count(1)
        self.hypervisors = {name: self._hypervisor(name) for name in ("alpha", "beta", "steady")}
        self.config = self._first_config(root)
        self.kept: dict[str, list[tuple[float, Retention]]] = {}
        self.intervals: dict[str, float] = {}
        self.take_note_of_config()
        self.expected_aside: set[str] = set()
        self.events = Events(self, Random(f"{seed}/events"))
        self.life = Life(self, "nobody", 0)
        self.scope = trio.CancelScope()

    # How it is made

    def _hypervisor(self, name: str) -> Hypervisor:
        rng, steady = self.rng, name == "steady"
        made = Hypervisor(
            name=name,
            witness=self.oracle,
            freezes=Freezer.ENGINE if steady or rng.random() < 0.75 else Freezer.HYPERVISOR,
            abortable=steady or rng.random() < 0.7,
            marks=steady or not self.is_local or rng.random() < 0.6,
            goes_on=rng.random() < 0.5,
            adopts=rng.random() < 0.5,
            complete_s=None if steady or rng.random() < 0.5 else rng.uniform(0.1, 5.0),
        )
        count = 1 if steady else rng.randrange(3, 6)
        for number in range(count):
            instance = InstanceId("control" if steady else f"{name}-{number}")
            made.machines[instance] = Machine()
        return made

    def _first_config(self, root: Path) -> Config:
        rng = self.rng
        minutes = rng.choice([(1, 2, 3), (2, 3, 5), (5, 10), (10, 20, 30)])
        entries = [ScheduleEntry(instance="control", backend="steady", interval=timedelta(minutes=min(minutes)))]
        for name in ("alpha", "beta"):
            entries += [self.drawn_entry(one, name, rng, minutes) for one in self.hypervisors[name].machines]
        runs = RunsConfig(
            concurrency=12,
            max_freeze=timedelta(seconds=rng.choice([5, 12, 30])),
            capture_timeout=timedelta(seconds=rng.choice([40, 120])),
            shutdown_grace=timedelta(seconds=5),
            min_free=0,
        )
        tables = {name: BackendConfig("sim", name, 4) for name in self.hypervisors}
        return Config(root, runs=runs, backends=tables, schedules=tuple(entries))

    @staticmethod
    def drawn_entry(instance: str, backend: str, rng: Random, minutes: tuple[int, ...]) -> ScheduleEntry:
        interval = timedelta(minutes=rng.choice(minutes))
        max_count = rng.choice([None, 1, 2, 5])
        max_age = rng.choice([None, interval * 2.5, interval * 10]) if max_count != 1 else None
        return ScheduleEntry(
            instance=instance,
            backend=backend,
            interval=interval,
            retention=RetentionEntry(max_age, max_count),
            first_run=rng.choice([None, "now"]),
            max_freeze=rng.choice([None, timedelta(seconds=8)]),
        )

    # What others ask

    def new_id(self) -> str:
        return f"r{next(self._ids):06d}"

    @property
    def boot_id(self) -> str:
        return f"boot-{self.boot}"

    def role(self) -> str:
        return self.life.role

    def trace(self, text: str) -> None:
        line = f"{trio.current_time():12.4f} {text}"
        self.last_events.append(line)
        self._digest.update(line.encode() + b"\n")

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()

    def interval_of(self, instance: str) -> float:
        return self.intervals.get(instance, 60.0)

    def should_run(self) -> list[str]:
        enabled = [entry.instance for entry in self.config.schedules if entry.enabled]
        return sorted([*enabled, *self.events.editors.made_over_api])

    def retentions(self, instance: str) -> list[Retention]:
        since = trio.current_time() - OLD_WISH_S
        # What was asked for without an answer, or edited behind the daemon's back, may or may not hold.
        wished = [wish.retention for wish in self.ledger.wished.get(instance, []) if wish is not None]
        return [kept for until, kept in self.kept.get(instance, []) if until >= since] + wished

    def keeps(self, instance: str, retention: Retention) -> None:
        """From now on *instance* has *retention*; for a while runs may still go by the one before."""
        now = self._time()
        held = [(min(until, now), kept) for until, kept in self.kept.get(instance, [])]
        self.kept[instance] = [*held, (math.inf, retention)]

    def take_note_of_config(self) -> None:
        for entry in self.config.schedules:
            if not self.kept.get(entry.instance) or self.kept[entry.instance][-1][1] != entry.kept():
                self.keeps(entry.instance, entry.kept())
            self.intervals[entry.instance] = entry.interval.total_seconds()

    @staticmethod
    def _time() -> float:
        try:
            return trio.current_time()
        except RuntimeError:
            return 0.0

    def durable_last_snapshot(self, instance: str) -> str | None:
        try:
            document = orjson.loads((self.platter.root / "schedules" / f"{instance}.json").read_bytes())
        except (OSError, orjson.JSONDecodeError):
            return None
        return document.get("last_snapshot_id") if isinstance(document, dict) else None

    def is_surely_gone(self, hypervisor: Hypervisor, instance: InstanceId) -> bool:
        if self.clock.is_wrong and not self._jump_is_known:
            return True
        since = self.events.away_since.get(instance)
        return since is not None and self.clock.true_now() - since >= timedelta(hours=23, minutes=59)

    def clock_is_suspicious(self, instance: str) -> bool:
        """Whether the design forbids pruning by age: unsynchronised, or a jump that can be known, too short ago."""
        events = self.events
        if self.clock.synced is False:
            return True
        if events.jumped_at is None or trio.current_time() - events.jumped_at < 5 or not self._jump_is_known:
            return False  # what was asked for before may be under way
        within_s = min(self.interval_of(instance), 86400.0)
        is_recent = self.clock.went_by_s() - events.jumped_after_s < within_s - 6
        return is_recent and (self.clock.is_wrong or events.jumped_life == self.life.number)

    @property
    def _jump_is_known(self) -> bool:
        """Whether the process that lives now can know of the last jump: it saw it, or the run log tells of it."""
        return self.events.jumped_life == self.life.number or self.events.jump_in_log

    def is_excused(self, name: str, instance: str) -> bool:
        hypervisor = self.hypervisors[name]
        busy = hypervisor.busy_with(InstanceId(instance)) is not None
        return not hypervisor.available or instance in hypervisor.refuses_resume or busy or self.life.hung is not None

    def check_quarantine(self) -> None:
        for path in sorted((self.platter.root / "quarantine").glob("*.note")):
            note = path.read_text(errors="replace")
            # A retired file that can't be read when the schedule is retired again makes room for the new one.
            if path.name.split(".json")[0] not in self.expected_aside and "retired again" not in note:
                self.oracle.fail(5, "a file that we wrote ourselves is in quarantine", f"{path.name}: {note}")

    # What happens

    def stop(self) -> None:
        self.scope.cancel()

    def die(self, life: Life, how: str) -> None:
        """The process ends here and now; with the power, what was not durable goes too."""
        if life.dead:
            return
        life.dead = True
        self.oracle.died(life.number)
        self.crashes += 1
        self.oracle.owner_since = math.inf
        self.oracle.disturbed("a death")
        self.trace(f"{life.role} {life.number} dies ({how})")
        for file in self.platter.files.values():
            file.poisoned = None  # the next process reads the kernel's own copy, and has it written
        if how == "power":
            self.platter.rebuild(self.platter.after_power_cut(self.rng))
            self.boot += 1
            self.events.reboot()
            for hypervisor in self.hypervisors.values():
                hypervisor.pending.clear()
                if self.is_local:
                    hypervisor.restart()
        if life.hung is not None:
            life.hung.set()
        life.scope.cancel()
        life.over.set()

    async def run(self) -> Violation | None:
        """From the first start to the look at the end."""
        for directory in ("schedules/retired", "quarantine"):
            (self.platter.root / directory).mkdir(parents=True, exist_ok=True)
        self.platter.adopt()
        steps = _Steps(self.chaos)
        trio.lowlevel.add_instrument(steps)
        try:
            async with trio.open_nursery() as self.nursery:
                try:
                    with self.scope:
                        self.nursery.start_soon(self.events.happen, HOURS * 3600)
                        await self._owners()
                        self.oracle.look_at_the_end()
                        self.ledger.look_at_the_end()
                        self.check_quarantine()
                finally:
                    self.life.dead = True  # else it would try for ever to record on a full disk
                    if self.life.hung is not None:
                        self.life.hung.set()
                self.nursery.cancel_scope.cancel()
        finally:
            trio.lowlevel.remove_instrument(steps)
        return self.oracle.violation

    async def _owners(self) -> None:
        while True:
            await self._live("daemon")
            if self.events.over:
                return
            died = self.life
            if died.dead and self.has_guard and self.boot == self.events.boot_seen:
                await trio.sleep(self.rng.uniform(0.05, 0.6))
                await self._live("guard")
            self.events.boot_seen = self.boot
            await self._down()

    async def _live(self, role: str) -> None:
        self.life = Life(self, role, next(self.lives))
        if role != "daemon" and not self.chaos.calm and self.rng.random() < 0.15:
            self.chaos.arm_here(self.rng.randrange(1, 200))
        self.nursery.start_soon(self.life.run)
        await self.life.over.wait()
        if not self.life.dead:
            self.oracle.owner_since = math.inf
        if role != "daemon":
            self.chaos.disarm_guard()

    async def _down(self) -> None:
        """Between two processes: a moment, or a while; things are done to state and clock behind their backs."""
        rng = self.rng
        if self.chaos.calm:
            await trio.sleep(0.5)
            return
        await trio.sleep(rng.choice([0.1, 1.0, 5.0, 30.0, 200.0]) * rng.random())
        self.events.while_down()
        if rng.random() < 0.2:
            await self._live("recover")
