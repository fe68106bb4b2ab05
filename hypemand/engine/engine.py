"""The engine's parts put together: load, settle, reconcile, serve, stop. Knows nothing of processes and signals."""

import math

import structlog
import trio

from hypemand.config import Config
from hypemand.core.model import InstanceId
from hypemand.engine.beside import Beside
from hypemand.engine.clock import ClockWatch
from hypemand.engine.events import Events
from hypemand.engine.fleet import Fleet
from hypemand.engine.gone import GoneWatch
from hypemand.engine.means import Means
from hypemand.engine.outside import Outside
from hypemand.engine.past import lay_over_all, readings, used_backends
from hypemand.engine.pruning import Pruner
from hypemand.engine.reconcile import Discovery, Reconciler, discover
from hypemand.engine.recorder import Recorder
from hypemand.engine.recovery import Recovery
from hypemand.engine.runner import Runner
from hypemand.engine.rush import Rush
from hypemand.engine.scheduler import Scheduler
from hypemand.engine.slots import Slots
from hypemand.engine.space import Space
from hypemand.state.replay import remembered
from hypemand.state.runlog import RunLog
from hypemand.state.segments import LogContent, read_log
from hypemand.state.store import Store

LAST_THAW_S = 5.0
START_PATIENCE_S = 5.0
_log = structlog.get_logger()


class Engine:
    """One engine over one state directory, whose lock the caller holds.

    Call `load` first; then `start` and `serve`, or only ``recovery.settle_all``.

    Attributes:
        problems: What the config wants and can't be had as things are.
        closed: Set at the end: there are no backends any more.
    """

    def __init__(self, config: Config, fleet: Fleet, outside: Outside, background: trio.Nursery) -> None:
        self.config = config
        self._has_patterns = _has_patterns(config)  # asked often, of a config that may be long
        self.fleet = fleet
        self.problems: tuple[str, ...] = ()
        self.closed = False
        self._outside = outside
        self._background = background
        self._applying = trio.Lock()
        self._look_now = trio.Event()
        self._settled = trio.Event()
        self.clock = clock = outside.clock
        patience = outside.patience
        self.give_up = trio.Event()
        self.watch = ClockWatch(clock)
        self.store = Store(config.state_dir, outside.disk, clock.now)
        self.runlog = RunLog(config.state_dir, outside.disk)
        self.slots = Slots(config.runs.concurrency)
        self.rush = Rush()
        self.events = Events()
        self.recorder = Recorder(clock, self.store, self.runlog, self.give_up, self.events)
        self.recovery = Recovery(
            clock=clock,
            runlog=self.runlog,
            recorder=self.recorder,
            fleet=fleet,
            patience=patience,
            leases=outside.leases,
            boot_id=outside.boot_id,
        )
        self._pruner = Pruner(
            clock=clock,
            watch=self.watch,
            patience=patience,
            store=self.store,
            made=self.recorder.made,
            events=self.events,
        )
        self.runner = Runner(self._means())
        self.scheduler = Scheduler(
            clock=clock,
            watch=self.watch,
            store=self.store,
            runlog=self.runlog,
            runner=self.runner,
            events=self.events,
            on_crash=lambda: background.start_soon(self._give_up_after, LAST_THAW_S),
        )

    def _means(self) -> Means:
        outside = self._outside
        gone = GoneWatch(
            clock=outside.clock,
            watch=self.watch,
            store=self.store,
            recorder=self.recorder,
            pruner=self._pruner,
            patience=outside.patience,
            on_removed=lambda instance: self.scheduler.refresh(instance),  # noqa: PLW0108 - it is made later
        )
        return Means(
            clock=outside.clock,
            store=self.store,
            runlog=self.runlog,
            fleet=self.fleet,
            slots=self.slots,
            beside=Beside(self._background),
            rush=self.rush,
            space=Space(outside.measure),
            pruner=self._pruner,
            recorder=self.recorder,
            events=self.events,
            gone=gone,
            leases=outside.leases,
            limits=lambda: self.config.runs,
            patience=outside.patience,
            new_id=outside.new_id,
            boot_id=outside.boot_id,
            give_up=self.give_up,
            hand_over=self.recovery.hand_over,
        )

    async def load(self) -> None:
        """Read the state, and lay the run log over the schedules.

        Raises:
            NewerFormatError: The state is that of a later version; it was not touched.
            OSError: The state can't be read.
        """
        await self.store.load()
        history = await self.runlog.open()
        lay_over_all(self.store, history.lines, self._outside.clock.now())
        self.recorder.learn(history.lines)
        self.watch.check_start(readings(history, self.store), self._outside.boot_id)
        self._used = await used_backends(history, self.store)
        self._reconciler = Reconciler(self._outside.clock, self.store, self.recorder, remembered(history.lines))

    @property
    def used_backends(self) -> frozenset[str]:
        """Names of backends through which something was captured, before this start or since."""
        captured = {s.backend for s in self.store.schedules.values() if s.backend and s.last_snapshot_id}
        return self._used | captured

    async def start(self) -> None:
        """Settle what a crash left behind, and bring the schedules in line with the config.

        A hypervisor that hangs holds this up for a few seconds; what concerns
        it then goes on while the others are served.
        """
        opened = self._use_backends()
        async with trio.open_nursery() as settling:
            # First of all, and all along: a guest may stand still, whatever else is slow.
            settling.start_soon(self._keep_settling)
            with trio.move_on_after(START_PATIENCE_S):
                await self._settled.wait()
            with trio.move_on_after(START_PATIENCE_S):
                await opened.wait()
            await self._reconcile(None)
            with trio.move_on_after(START_PATIENCE_S) as looking:
                await self._look()
            settling.cancel_scope.cancel()
        if looking.cancelled_caught:
            self._look_now.set()
        self._warn_of_clock()

    def _use_backends(self) -> trio.Event:
        """Have the backends of the config in force; they are opened in the background.

        Returns:
            Set once each has been opened, or could not be.
        """
        backends = self.config.backends
        limits = {name: backend.concurrency for name, backend in backends.items()}
        self.slots.resize(self.config.runs.concurrency, limits)
        self.fleet.have(backends)
        opened = trio.Event()
        self._background.start_soon(self._open_backends, opened)
        return opened

    async def _open_backends(self, opened: trio.Event) -> None:
        if not self.fleet.is_settled:  # mostly it is, and to tell which were used takes a look at all schedules
            await self.fleet.open_all(used=self.used_backends)
        opened.set()

    async def _look(self) -> None:
        """Ask the backends for their instances, and make the schedules that patterns want for them."""
        discovery = await discover(self.fleet.backends)
        for instance in await self._reconcile(discovery):
            self.scheduler.refresh(instance)

    async def _reconcile(self, discovery: Discovery | None) -> frozenset[InstanceId]:
        async with self._applying:
            changed, problems = await self._reconciler.apply(self.config, discovery or Discovery())
        if discovery is not None:
            for problem in problems:
                if problem not in self.problems:
                    _log.error("schedule not made as the config wants it", error=problem)
            self.problems = problems
        return changed

    def _warn_of_clock(self) -> None:
        by_age = [s.interval for s in self.store.schedules.values() if s.retention.max_age]
        why = self.watch.why_age_waits(min(by_age)) if by_age else None
        if why is not None:
            _log.warning("snapshots are not pruned by age for now", why=why, schedules=len(by_age))

    async def serve(self) -> None:
        """Run schedules until `stop`, and until what is under way then has ended."""
        async with trio.open_nursery() as housekeeping:
            housekeeping.start_soon(self._keep_saving)
            housekeeping.start_soon(self._keep_looking)
            housekeeping.start_soon(self._keep_settling)
            await self.scheduler.serve(self.config.runs.concurrency)
            housekeeping.cancel_scope.cancel()
        await self.close()

    async def close(self) -> None:
        """Write what is not written yet, and let go of files and backends."""
        self.closed = True
        with trio.CancelScope(shield=True):
            await self._save_unsaved()
            await self.fleet.aclose()
            self.runlog.close()

    def stop(self, grace_s: float) -> None:
        """Begin no more runs; those under way get *grace_s*, and then the time to resume their guests.

        Called again, it can only shorten the grace.
        """
        self.scheduler.stop(grace_s)
        self._background.start_soon(self._give_up_after, grace_s + LAST_THAW_S)

    async def _give_up_after(self, seconds: float) -> None:
        await trio.sleep(seconds)
        self.give_up.set()

    async def apply_config(self, config: Config) -> None:
        """Put *config* in force, for all but its state directory. New instances of patterns follow."""
        self.config, self._has_patterns = config, _has_patterns(config)
        self._use_backends()
        for instance in await self._reconcile(None):
            self.scheduler.refresh(instance)
        self._look_now.set()

    def look_soon(self) -> None:
        """Bring the schedules in line with the config again; what stood in the way of an entry may be gone."""
        self._look_now.set()

    async def reread(self) -> None:
        """Take in schedule files that were edited by hand."""
        async with self._applying:
            unreadable = self.store.unreadable_instances
            missed = LogContent()
            if unreadable:  # first: what could not be read at the start knows nothing of the runs since then
                disk = self._outside.disk
                try:
                    missed = await disk.call(read_log, self.config.state_dir, disk)
                except OSError as error:
                    _log.error("schedules not read again: the run log is unreadable", error=str(error))
                    return
            changed = await self.store.reread()
            came = changed & unreadable
            of_them = (line for line in missed.lines if line.instance_id in came)
            lay_over_all(self.store, of_them, self._outside.clock.now())
            if unreadable - self.store.unreadable_instances:
                self._look_now.set()  # one of them may have turned out to be invalid, or gone: it is made anew
            for instance in changed:
                _log.info("schedule file read again", instance_id=instance)
                self.scheduler.refresh(instance)

    async def _keep_saving(self) -> None:
        while True:
            await self.store.has_unsaved.wait()
            await self._save_unsaved()
            if self.store.unsaved:
                await trio.sleep(self._outside.tempo.save_s)

    async def _save_unsaved(self) -> None:
        try:
            await self.store.save_unsaved()
        except OSError as error:
            _log.error("schedules not written; trying again", schedules=len(self.store.unsaved), error=str(error))

    async def _keep_looking(self) -> None:
        while True:
            with trio.move_on_after(self._outside.tempo.discover_s) as waiting:
                await self._look_now.wait()
            self._look_now = trio.Event()
            unread = bool(self.store.unreadable)
            if unread:
                await self.reread()
            self._use_backends()
            if unread or self._has_patterns or not waiting.cancelled_caught:
                await self._look()

    async def _keep_settling(self) -> None:
        tempo = self._outside.tempo
        pause_s = tempo.settle_first_s
        async with trio.open_nursery() as rounds:
            while True:
                self.recovery.handed_over = trio.Event()
                busy = frozenset(progress.run_id for progress in self.runner.active.values())
                done = trio.Event()
                rounds.start_soon(self._settle_round, busy, done)
                with trio.move_on_after(pause_s):  # a run whose hypervisor hangs holds up no other's next try
                    await done.wait()
                left = any(run.run_id not in busy for run in self.runlog.open_runs)
                # What was handed over a moment ago may still be busy with its own run.
                more = left or bool(self.recovery.left_open)
                wait_s = 0.0 if not done.is_set() else pause_s
                with trio.move_on_after(wait_s if more else math.inf):
                    await self.recovery.handed_over.wait()
                waits = more and not self.recovery.is_urgent
                pause_s = min(2 * pause_s, tempo.settle_most_s) if waits else tempo.settle_first_s

    async def _settle_round(self, busy: frozenset[str], done: trio.Event) -> None:
        await self.recovery.settle_all(busy)
        self._settled.set()
        done.set()


def _has_patterns(config: Config) -> bool:
    return any(entry.is_pattern for entry in config.schedules)
