"""What clients may ask of a running engine: schedules made, changed and deleted by the API's rules, runs at once."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
import trio
from attrs import evolve, field, frozen

from hypemand.backends.base import Backend, BackendError, InstanceNotFound
from hypemand.core.cadence import first_run
from hypemand.core.model import InstanceId, ManagedBy, RunFinished, Schedule
from hypemand.engine.changes import Home, SetSchedule, changed
from hypemand.engine.engine import Engine
from hypemand.engine.fleet import UnknownBackendError
from hypemand.engine.limits import answer
from hypemand.engine.refusals import ConflictError, NotFoundError, UnavailableError
from hypemand.engine.scheduler import BusyError, RunUnderWay, StoppingError

ASK_S = 5.0
"""How long a backend is waited for that is asked whether it knows an instance."""
MOST_WAITING = 64
"""So many changes of one schedule wait for their turn."""
_log = structlog.get_logger()


@frozen
class Requests:
    """Does what clients ask of *engine*, which serves. One at a time for each instance."""

    engine: Engine
    _turns: dict[InstanceId, trio.Lock] = field(factory=dict)

    def get(self, instance: InstanceId) -> Schedule:
        """The schedule of *instance*.

        Raises:
            NotFoundError: There is none.
        """
        schedule = self.engine.store.schedules.get(instance)
        if schedule is None:
            raise NotFoundError(f"instance {instance!r} has no snapshot schedule")
        return schedule

    def all(self) -> list[Schedule]:
        """Every schedule, by instance."""
        return [schedule for _, schedule in sorted(self.engine.store.schedules.items())]

    async def put(self, instance: InstanceId, wanted: SetSchedule, client: str) -> Schedule:
        """Make or replace the schedule of *instance*; durable when this returns.

        ``created_at`` and the ``last_*`` fields survive an update, and so does
        ``next_run_at``, but for a new interval: that begins a new cadence.

        Raises:
            NotFoundError: No backend knows the instance.
            ConflictError: The config has a schedule for it, several backends know it, or its file can't be read.
            UnavailableError: Whether it exists can't be told now, or hypemand is about to end; or the schedule can't
                be written yet. Then it is in force, and written as soon as that is possible.
        """
        await self.engine.rush.wait()  # no client makes runs late, however much it asks for
        async with self.turn(instance):
            self.refuse_if_not_ours(instance)
            store, clock = self.engine.store, self.engine.clock
            home = await self.home(instance)
            self.refuse_if_closed()
            retired = None
            if instance not in store.schedules:
                retired = await store.read_retired(instance)
            self.refuse_if_not_ours(instance)  # once more: much may have changed while others were asked
            self.refuse_if_a_pattern_has(instance, home.name)
            present = store.schedules.get(instance)
            first = first_run(instance, wanted.interval, now=clock.now(), wanted=None, zone=clock.zone())
            schedule = changed(
                instance, wanted, present=present, retired=retired, home=home, now=clock.now(), first=first
            )
            try:
                await self.write(schedule)
            finally:  # also when it is not written yet: it is in force
                self.engine.scheduler.refresh(instance)
            if retired is not None:
                await self.forget_retired(instance)
        _tell(present, schedule, client)
        return self.get(instance)

    async def delete(self, instance: InstanceId, client: str) -> None:
        """Delete the schedule of *instance*, durably. Its snapshots stay.

        Raises:
            NotFoundError: There is none.
            ConflictError: It is the config's.
            UnavailableError: The file can't be removed.
        """
        async with self.turn(instance):
            self.refuse_if_not_ours(instance)
            schedule = self.get(instance)
            try:
                await self.engine.store.remove(instance)
            except OSError as error:
                if instance not in self.engine.store.schedules:
                    self.engine.store.hold(schedule)
                raise _unwritable(instance, error) from error
            finally:  # also when it stays: a slot that came up meanwhile was passed over
                self.engine.scheduler.refresh(instance)
            await self.forget_retired(instance)  # one that a full disk left there, before this one was in force
        self.engine.look_soon()  # the config may have been waiting to have the instance
        _log.info("schedule deleted by a client; its snapshots stay", instance_id=instance, client=client)

    def begin_run(self, instance: InstanceId, client: str | None = None) -> RunUnderWay:
        """Begin a run at once; the schedule's next one stays where it is.

        Args:
            client: Who asks for it; for the log.

        Raises:
            NotFoundError: The instance has no schedule.
            ConflictError: It is disabled, or has a run under way.
            UnavailableError: hypemand starts or stops just now.
        """
        schedule = self.get(instance)
        if not schedule.settings.enabled:
            raise ConflictError(f"the schedule of {instance!r} is disabled in the config: enable it there")
        try:
            run = self.engine.scheduler.begin_now(schedule)
        except BusyError as error:
            raise ConflictError(str(error), lasting=False) from error
        except StoppingError as error:
            raise UnavailableError(str(error)) from error
        if client is not None:
            _log.info("run asked for by a client", instance_id=instance, client=client)
        return run

    async def run_now(self, instance: InstanceId, client: str | None = None) -> RunFinished | None:
        """Do what `begin_run` begins, and wait for it.

        Returns:
            How it ended; None when it was left open until its hypervisor
            answers, or cut short by the end of hypemand.
        """
        return await self.begin_run(instance, client).ended()

    @asynccontextmanager
    async def turn(self, instance: InstanceId) -> AsyncIterator[None]:
        """Within the block, nobody else changes the schedule of *instance*."""
        lock = self._turns.setdefault(instance, trio.Lock())
        if lock.statistics().tasks_waiting >= MOST_WAITING:  # they go on when their clients have left
            raise UnavailableError(f"too many wait to change the schedule of {instance!r}")
        try:
            async with lock:
                yield
        finally:
            if not lock.locked():  # nobody waits for it either: clients may ask for any number of names
                self._turns.pop(instance, None)

    def refuse_if_not_ours(self, instance: InstanceId) -> None:
        """Raise `ConflictError` where the config file has the schedule, or its file can't be read."""
        store, config = self.engine.store, self.engine.config
        if instance in store.unreadable_instances:
            raise ConflictError(f"the schedule of {instance!r} has a file that can't be read: look at the log")
        present = store.schedules.get(instance)
        by_name = any(entry.instance == instance for entry in config.schedules)
        if (present is None and by_name) or (present is not None and present.managed_by is ManagedBy.CONFIG):
            raise ConflictError(f"the schedule of {instance!r} is managed by the config file: change it there")

    def refuse_if_closed(self) -> None:
        """Raise `UnavailableError` once hypemand stops."""
        if self.engine.closed:  # its backends are let go of: nobody would know any instance
            raise UnavailableError("hypemand stops just now: nothing is changed any more")

    def refuse_if_a_pattern_has(self, instance: InstanceId, backend: str) -> None:
        """Raise `ConflictError` where the config would make a schedule for *instance* by itself."""
        config = self.engine.config
        if instance in self.engine.store.schedules:
            return
        for entry in config.schedules:
            if entry.is_pattern and config.backend_of(entry) == backend and entry.matches(instance):
                raise ConflictError(f"the pattern {entry.instance!r} in the config file takes in {instance!r}")

    async def home(self, instance: InstanceId) -> Home:
        """The backend that knows *instance*, or, while nobody can tell, the one that had it.

        Raises:
            NotFoundError, ConflictError, UnavailableError: None knows it, several do, or that can't be told now.
        """
        self.refuse_if_closed()
        knowing: list[str] = []
        silent: list[str] = []

        async def ask(backend: Backend) -> None:
            try:
                await answer("state", ASK_S, lambda: backend.state(instance))
            except InstanceNotFound:
                return
            except BackendError:
                silent.append(backend.name)
            except Exception:  # noqa: BLE001 - a bug in one backend stops no other
                _log.exception("internal error of a backend", backend=backend.name)
                silent.append(backend.name)
            else:
                knowing.append(backend.name)

        async with trio.open_nursery() as nursery:
            for backend in [*self.engine.fleet.backends.values()]:
                nursery.start_soon(ask, backend)
        if len(knowing) > 1:
            names = ", ".join(sorted(knowing))
            raise ConflictError(f"instance {instance!r} is known to several backends: {names}")
        present = self.engine.store.schedules.get(instance)
        home = None if present is None else self._backend_of(present)
        if knowing and home in silent:
            raise UnavailableError(
                f"instance {instance!r} is that of {home}, which does not answer,"
                f" and {knowing[0]} knows one of that name, too"
            )
        if knowing:
            return Home(knowing[0], sure=True)
        return await self._home_before(instance, sorted(silent))

    def _backend_of(self, schedule: Schedule) -> str | None:
        """The backend of *schedule*; one that Hypeman wrote names none, and has the only one there is."""
        try:
            return self.engine.fleet.resolve(schedule.backend)
        except UnknownBackendError:
            return None

    async def _home_before(self, instance: InstanceId, silent: list[str]) -> Home:
        before = self.engine.store.schedules.get(instance) or await self.engine.store.read_retired(instance)
        home = None if before is None else self._backend_of(before)
        if home in silent:
            return Home(home, sure=False)
        if silent:
            raise UnavailableError(
                f"whether there is an instance {instance!r} can't be told now: no answer from {', '.join(silent)}"
            )
        raise NotFoundError(f"no backend knows an instance {instance!r}")

    async def write(self, schedule: Schedule) -> None:
        """Put *schedule* in force, durably; `UnavailableError` where it is in force, and not written yet."""
        try:
            await self.engine.store.put(schedule)
        except OSError as error:
            raise _unwritable(schedule.instance_id, error) from error

    async def forget_retired(self, instance: InstanceId) -> None:
        """Remove the file of a retired schedule: the instance has one in force again."""
        try:
            await self.engine.store.forget_retired(instance)
        except OSError as error:  # the file in force comes first at the next start, too
            _log.error("retired file not removed", instance_id=instance, error=str(error))


def _tell(present: Schedule | None, schedule: Schedule, client: str) -> None:
    """Log what a PUT did; programs that see to their schedules each minute are no news."""
    log = _log.bind(instance_id=schedule.instance_id, backend=schedule.backend, client=client)
    if present is not None and evolve(present, updated_at=schedule.updated_at) == schedule:
        log.debug("schedule set again by a client, as it was")
        return
    log.info("schedule changed by a client" if present else "schedule made by a client")
    if schedule.retention.keeps_everything and not (present and present.retention.keeps_everything):
        _log.warning("schedule sets no limit: its snapshots are kept for ever", instance_id=schedule.instance_id)


def _unwritable(instance: InstanceId, error: OSError) -> UnavailableError:
    _log.error("schedule of a client not written", instance_id=instance, error=str(error))
    return UnavailableError(f"the schedule of {instance!r} can't be written now; hypemand's log says why")
