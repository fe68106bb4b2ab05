"""What people do to schedules meanwhile: in the config, over the API, in the files; see `events` for when."""

from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import orjson
from attrs import define, evolve, field

from hypemand.config import ScheduleEntry
from hypemand.core.cadence import first_run
from hypemand.core.model import InstanceId, Retention, Schedule, Settings
from tests.disks import Crash

if TYPE_CHECKING:
    from tests.simulation.events import Events
    from tests.simulation.world import World

ENDS_AFTER = timedelta(hours=23)


@define(eq=False)
class Editors:
    """People at work on schedules.

    Attributes:
        edited: Instances that an edit of the config may not have reached yet.
        made_over_api: Instances whose schedule was made over the API and holds.
    """

    world: "World"
    events: "Events"
    rng: Random
    edited: set[str] = field(factory=set)
    made_over_api: set[str] = field(factory=set)

    async def edit_config(self) -> None:
        world, rng = self.world, self.rng
        self.world.chaos.note("world", "config edit")
        entries = [*world.config.schedules]
        index = rng.randrange(1, len(entries))
        entry = entries[index]
        what = rng.randrange(4)
        if what == 0:
            entries[index] = evolve(entry, enabled=not entry.enabled)
        elif what == 1 and len(entries) > 5:
            del entries[index]
        elif what == 2:
            self._add_entry(entries)
        else:
            minutes = (int(entry.interval.total_seconds() // 60), rng.choice([2, 5, 10]))
            entries[index] = evolve(world.drawn_entry(entry.instance, entry.backend or "", rng, minutes))
        if rng.random() < 0.2:  # the connection changes: runs under way go on with theirs
            world.hypervisors["alpha"].version += 1
        world.config = evolve(world.config, schedules=tuple(entries))
        world.ledger.new_grid(entry.instance)
        world.take_note_of_config()
        self.edited.add(entry.instance)
        self._in_process(self._apply_config)

    def _add_entry(self, entries: list[ScheduleEntry]) -> None:
        world = self.world
        taken = {entry.instance for entry in world.config.schedules} | set(world.ledger.wished)
        for name in ("alpha", "beta"):
            free = [i for i in world.hypervisors[name].machines if i not in taken]
            if free:
                entries.append(world.drawn_entry(free[0], name, self.rng, (2, 5, 10)))
                self.edited.add(free[0])
                return

    async def _apply_config(self) -> None:
        assert self.world.life.engine is not None
        edited = [*self.edited]
        await self.world.life.engine.apply_config(self.world.config)
        for instance in edited:
            self.world.ledger.new_grid(instance)

    def _in_process(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do *work* inside the daemon, if there is one; what dies with it is lost."""
        life = self.world.life
        if not life.serves or life.background is None:
            return

        async def do() -> None:
            try:
                await life.gate()
                life.check()
                await work()
            except Crash:
                pass
            except OSError as error:
                self.world.trace(f"not acknowledged: {error}")

        life.background.start_soon(do)

    async def put(self) -> None:
        world, rng = self.world, self.rng
        in_config = {entry.instance for entry in world.config.schedules}
        free = [(name, i) for name in ("alpha", "beta") for i in world.hypervisors[name].machines if i not in in_config]
        if free and world.life.serves:
            name, instance = rng.choice(free)
            self.world.chaos.note("world", "API put")
            self._in_process(lambda: self._put_now(name, instance))

    async def _put_now(self, backend: str, instance: InstanceId) -> None:
        world, rng = self.world, self.rng
        engine = world.life.engine
        assert engine is not None
        now, interval = world.clock.now(), timedelta(minutes=rng.choice([2, 3, 5]))
        present = engine.store.schedules.get(instance)
        if instance in engine.store.unreadable_instances or (present is not None and present.managed_by != "api"):
            return
        retention = Retention(max_count=rng.choice([2, 3]))
        at = first_run(instance, interval, now=now, wanted=None, zone=world.clock.zone())
        made = present or Schedule(
            instance_id=instance, interval=interval, retention=retention, created_at=now, updated_at=now, next_run_at=at
        )
        schedule = evolve(
            made,
            interval=interval,
            retention=retention,
            updated_at=now,
            next_run_at=at,
            backend=backend,
            metadata={"put": str(rng.randrange(1000))},
            settings=Settings(),
            extra={"x-unknown": rng.randrange(1000)},
        )
        world.ledger.wish(schedule, instance, acknowledged=False)
        world.ledger.new_grid(instance)
        world.keeps(instance, retention)
        self.made_over_api.discard(instance)
        await engine.store.put(schedule)
        world.ledger.wish(schedule, instance, acknowledged=True)
        self.made_over_api.add(instance)
        engine.scheduler.refresh(instance)
        world.intervals[instance] = interval.total_seconds()
        world.ledger.new_grid(instance)

    def came_back(self, instance: str) -> None:
        """Somebody's instance is there again; a schedule made over the API may have ended with it."""
        ended = self.may_have_ended(instance)
        del self.events.away_since[instance]
        if instance in self.world.ledger.wished and ended:
            self.made_over_api.discard(instance)
            self.world.ledger.wish(None, instance, acknowledged=False)

    def may_have_ended(self, instance: str) -> bool:
        """Whether the schedule of an instance that is gone may have ended with it: after a day, by any clock."""
        since = self.events.away_since.get(instance)
        if since is None:
            return False
        return self.events.jumped_at is not None or self.world.clock.true_now() - since > ENDS_AFTER

    async def retry_api(self) -> None:
        """Whoever got no answer asks again."""
        for instance in sorted(self.world.ledger.wished.keys() - self.made_over_api):
            name = instance.split("-", maxsplit=1)[0]
            self._in_process(lambda i=instance, n=name: self._put_now(n, InstanceId(i)))  # type: ignore[misc]

    async def delete(self) -> None:
        made = sorted(self.made_over_api)
        if made and self.world.life.serves:
            self.world.chaos.note("world", "API delete")
            instance = self.rng.choice(made)
            self._in_process(lambda: self._delete_now(InstanceId(instance)))

    async def _delete_now(self, instance: InstanceId) -> None:
        world = self.world
        engine = world.life.engine
        assert engine is not None
        self.made_over_api.discard(instance)
        world.ledger.wish(None, instance, acknowledged=False)
        world.ledger.new_grid(instance)
        await engine.store.remove(instance)
        world.ledger.wish(None, instance, acknowledged=True)
        engine.scheduler.refresh(instance)

    # By hand, in the files

    def made_here(self) -> str | None:
        held = sorted(self.made_over_api)
        return self.rng.choice(held) if held else None

    async def edit_by_hand(self) -> None:
        instance = self.made_here()
        if instance is None or not self.world.life.serves:
            return
        if self.edit_file(instance):
            self._in_process(self._reread)

    async def _reread(self) -> None:
        assert self.world.life.engine is not None
        await self.world.life.engine.reread()

    def edit_file(self, instance: str) -> bool:
        """Somebody changes the number of snapshots that are kept, in an editor."""
        world = self.world
        path = world.platter.root / "schedules" / f"{instance}.json"
        wished = world.ledger.wished.get(instance, [])
        last = wished[-1] if wished else None
        if last is None or not path.exists():
            return False
        self.world.chaos.note("world", "hand edit")
        document = orjson.loads(path.read_bytes())
        count = self.rng.choice([2, 3, 4])
        document["retention"]["max_count"] = count
        document["x-by-hand"] = self.rng.randrange(1000)
        self._write(path, orjson.dumps(document))
        extra = {key: document[key] for key in ("x-unknown", "x-by-hand") if key in document}
        edited = evolve(last, retention=evolve(last.retention, max_count=count), extra=extra)
        # A daemon that writes the file before it reads it again overwrites the edit: both may hold.
        world.ledger.wish(edited, instance, acknowledged=False)
        world.keeps(instance, edited.retention)
        return True

    def _write(self, path: Path, data: bytes) -> None:
        new = path.with_name(f"by-hand-{path.name}.new")
        new.write_bytes(data)
        new.rename(path)
        self.world.platter.edited(path, data)

    async def break_by_hand(self) -> None:
        """Somebody makes a mess of the file of a schedule that the config has."""
        entry = self.rng.choice(self.world.config.schedules[1:])
        path = self.world.platter.root / "schedules" / f"{entry.instance}.json"
        if path.exists() and self.world.life.serves:
            self.break_file(path)
            self._in_process(self._reread)

    def break_file(self, path: Path) -> None:
        self.world.chaos.note("world", "invalid hand edit")
        self.world.expected_aside.add(path.stem)
        self.world.ledger.new_grid(path.stem)
        self.edited.add(path.stem)
        self._write(path, self.rng.choice([b"", b"{", b'{"format": 1}']))
