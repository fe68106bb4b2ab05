"""What people do to schedules meanwhile: in the config, over the API, in the files; see `events` for when."""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import orjson
from attrs import define, evolve, field

from hypemand.config import RetentionEntry, ScheduleEntry
from hypemand.core.model import InstanceId, Retention, Schedule
from hypemand.engine.changes import SetSchedule
from hypemand.engine.refusals import ConflictError, RequestRefusedError
from hypemand.engine.requests import Requests
from hypemand.state.codec import decode_schedule
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
    _asked: Requests | None = field(init=False, default=None)
    _busy: set[str] = field(init=False, factory=set)

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
            _, instance = rng.choice(free)
            self.world.chaos.note("world", "API put")
            self._in_process(lambda: self._put_now(instance))

    @property
    def _requests(self) -> Requests:
        """What the API of the daemon that lives now asks its engine by."""
        engine = self.world.life.engine
        assert engine is not None
        if self._asked is None or self._asked.engine is not engine:
            self._asked = Requests(engine)
            self._busy.clear()
        return self._asked

    @contextmanager
    def _asking(self, instance: str) -> Iterator[bool]:
        """One client for each instance: what two ask for at once, nobody knows. Whether this one may."""
        requests = self._requests
        if instance in self._busy:
            yield False
            return
        self._busy.add(instance)
        try:
            yield True
        finally:
            if self._asked is requests:
                self._busy.discard(instance)

    async def _put_now(self, instance: InstanceId) -> None:
        requests, ledger, rng = self._requests, self.world.ledger, self.rng
        interval = timedelta(minutes=rng.choice([2, 3, 5]))
        retention = RetentionEntry(max_count=rng.choice([2, 3]))
        wanted = SetSchedule(interval=interval, retention=retention, metadata={"put": str(rng.randrange(1000))})
        with self._asking(instance) as may:
            present = requests.engine.store.schedules.get(instance)
            if not may or (present is not None and present.managed_by != "api"):
                return
            is_certain = present is not None and len(ledger.wished.get(instance, [])) == 1
            new_grid = not is_certain or present is None or present.interval != interval
            was_made = instance in self.made_over_api
            before = [*ledger.wished.get(instance, [None])]
            for expected in self._expected(instance, wanted):
                ledger.wish(expected, instance, acknowledged=False)
            if new_grid:
                ledger.new_grid(instance)
            self.world.keeps(instance, wanted.kept(Retention()))
            self.made_over_api.discard(instance)
            try:
                made = await requests.put(instance, wanted, "somebody")
            except RequestRefusedError as error:
                self.world.trace(f"put of {instance} refused: {error}")
                if "can't be written" not in str(error):  # nothing was done
                    ledger.wished[instance] = before
                    if was_made:
                        self.made_over_api.add(instance)
                return
            asked = (wanted.interval, wanted.kept(made.retention), wanted.metadata)
            if (made.interval, made.retention, made.metadata) != asked:
                self.world.oracle.fail(5, "a put has another result than was asked for", f"{instance}: {made}")
            ledger.wish(made, instance, acknowledged=True)
            self.made_over_api.add(instance)
            self.world.intervals[instance] = interval.total_seconds()
            if new_grid:
                ledger.new_grid(instance)

    def _expected(self, instance: InstanceId, wanted: SetSchedule) -> list[Schedule]:
        """What the schedule of *instance* may become, as far as a user sees it.

        One that is retired goes on, unless its file can't be read just then.
        """
        store, now = self._requests.engine.store, self.world.clock.now()
        anew = Schedule(
            instance_id=instance,
            interval=wanted.interval,
            retention=Retention(),
            created_at=now,
            updated_at=now,
            next_run_at=now,
        )
        present = store.schedules.get(instance)
        retired = store.retired_directory / f"{instance}.json"
        before = [present] if present else [anew]
        if present is None and retired.exists():
            before.append(decode_schedule(retired.read_bytes(), instance))
        return [
            evolve(
                made,
                interval=wanted.interval,
                retention=wanted.kept(made.retention),
                metadata=wanted.metadata,
                settings=evolve(made.settings, first_run=None, enabled=True),
            )
            for made in before
        ]

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
            self._in_process(lambda i=instance: self._put_now(InstanceId(i)))  # type: ignore[misc]

    async def delete(self) -> None:
        made = sorted(self.made_over_api)
        if made and self.world.life.serves:
            self.world.chaos.note("world", "API delete")
            instance = self.rng.choice(made)
            self._in_process(lambda: self._delete_now(InstanceId(instance)))

    async def _delete_now(self, instance: InstanceId) -> None:
        requests, ledger = self._requests, self.world.ledger
        with self._asking(instance) as may:
            if not may:
                return
            self.made_over_api.discard(instance)
            before = [*ledger.wished.get(instance, [None])]
            ledger.wish(None, instance, acknowledged=False)
            ledger.new_grid(instance)
            try:
                await requests.delete(instance, "somebody")
            except RequestRefusedError as error:
                self.world.trace(f"delete of {instance} refused: {error}")
                if isinstance(error, ConflictError):  # nothing was done
                    ledger.wished[instance] = before
                    self.made_over_api.add(instance)
                return
            ledger.wish(None, instance, acknowledged=True)

    async def run_now(self) -> None:
        """Somebody wants a snapshot at once, of any instance."""
        instance = InstanceId(self.rng.choice(self.world.should_run()))
        if self.world.life.serves:
            self.world.chaos.note("world", "API run")
            self._in_process(lambda: self._run_now(instance))

    async def _run_now(self, instance: InstanceId) -> None:
        ledger = self.world.ledger
        try:
            run = await self._requests.run_now(instance)
        except RequestRefusedError as error:
            self.world.trace(f"run of {instance} refused: {error}")
            return
        if run is not None and run.run_id not in ledger.finished:
            self.world.oracle.fail(5, "a run was told to be over that is not recorded", run.run_id)

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
