"""Settling open runs without a daemon: what ``hypemand recover`` does."""

from contextlib import suppress

import structlog
import trio
from attrs import evolve, frozen

from hypemand.backends.base import BackendError
from hypemand.config import Config
from hypemand.core.errors import InvalidInput
from hypemand.core.model import RunFinished, RunStarted
from hypemand.engine.engine import Engine
from hypemand.engine.events import Event, RunEnded
from hypemand.engine.fleet import new_fleet
from hypemand.engine.outside import this_machine
from hypemand.engine.recovery import CRASHED
from hypemand.state.codec import NewerFormatError
from hypemand.state.files import Disk
from hypemand.state.lock import LockHeldError, LockOwner, take_lock
from hypemand.state.replay import under_way
from hypemand.state.scan import scan_schedules
from hypemand.state.segments import LogContent, read_log

_log = structlog.get_logger()
PATIENCE_S = 30.0
PAUSE_S = 1.0
BESIDE_S = 5.0


@frozen
class Recovered:
    """What came of it: a line to print, one for each run that is still open, and the runs recorded."""

    summary: str
    left: tuple[str, ...]
    ended: tuple[RunFinished, ...] = ()


async def recover(config: Config) -> Recovered:
    """Settle every open run in the state of *config*; keeps trying for up to 30 s.

    Beside a daemon, which settles runs itself, it gives that a few seconds,
    and takes over only should the daemon end meanwhile. Another `recover` or a
    guard is waited for.
    """
    if not config.state_dir.exists():
        return Recovered(f"nothing to recover: there is no state in {config.state_dir}", ())
    deadline = trio.current_time() + BESIDE_S
    while True:
        try:
            lock = await take_lock(config.state_dir, "recover", Disk())
            break
        except LockHeldError as error:
            beside = await trio.to_thread.run_sync(_look_beside, error.owner, config)
            if beside.done or trio.current_time() >= deadline:
                return beside.told()
        await trio.sleep(PAUSE_S)
    try:
        return await settle_held(config, PATIENCE_S)
    finally:
        lock.release()


async def settle_held(
    config: Config, patience_s: float, *, frozen: frozenset[str] | None = None, crashed: str = CRASHED
) -> Recovered:
    """Settle every open run in the state of *config*, whose lock the caller holds; keeps trying for *patience_s*.

    What keeps runs from being recorded keeps no guest from being thawed.

    Args:
        frozen: The runs whose guests stand still, where that is known for sure.
        crashed: Why they are open, for the history.

    Raises:
        NewerFormatError: A schedule is that of a later version; the runs were settled nevertheless.
        OSError: The run log can't be read, or is not the one that has the runs of *frozen*.
    """
    disk = Disk()
    log = await disk.call(read_log, config.state_dir, disk)
    if unknown := (frozen or frozenset()) - {line.run_id for line in log.started()}:
        raise OSError(f"no run {', '.join(sorted(unknown))} in {config.state_dir}: is its filesystem mounted?")
    async with trio.open_nursery() as background:
        engine = Engine(config, new_fleet(config.state_dir), this_machine(), background)
        engine.recovery.frozen, engine.recovery.crashed = frozen, crashed
        background.start_soon(_give_up_after, engine, patience_s)
        newer = await _load_what_can_be(engine)
        if engine.runlog.is_open:
            result = await _settle_recorded(engine, patience_s)
        else:
            result = await _settle_unrecorded(engine, log)
        await engine.close()
        background.cancel_scope.cancel()
    if newer is not None and frozen is None:
        raise newer
    return result


async def _give_up_after(engine: Engine, seconds: float) -> None:
    await trio.sleep(seconds)
    engine.give_up.set()


async def _load_what_can_be(engine: Engine) -> NewerFormatError | None:
    """Load the state; if need be the run log alone, or nothing. Returns what a newer version has written."""
    newer = None
    try:
        await engine.load()
    except NewerFormatError as error:
        newer = error
    except OSError as error:
        _log.error("the state can't be loaded; guests are thawed first", error=str(error))
    if not engine.runlog.is_open:
        with suppress(OSError):  # as said above
            await engine.runlog.open()
    return newer


async def _settle_unrecorded(engine: Engine, log: LogContent) -> Recovered:
    """Settle what is open, though nothing can be written down: that is done when it can."""
    left: list[str] = []

    async def settle(run: RunStarted) -> None:
        try:
            settled = await engine.recovery.ask_backend(run)
            outcome = (
                "its guest was found frozen and was resumed" if settled.resumed else "its guest does not stand still"
            )
        except (BackendError, InvalidInput) as error:
            outcome = str(error)
        left.append(f"{run.instance_id}: run {run.run_id}: {outcome}; not recorded, the state can't be written")

    async with trio.open_nursery() as nursery:
        for run in log.open_runs().values():
            nursery.start_soon(settle, run)
    return Recovered("open runs can't be recorded", tuple(left))


async def _settle_recorded(engine: Engine, patience_s: float) -> Recovered:
    ended: list[RunFinished] = []

    def heard(event: Event) -> None:
        if isinstance(event, RunEnded):
            ended.append(event.run)

    with engine.events.heard_by(heard):
        result = await _settle(engine, patience_s)
    return evolve(result, ended=tuple(ended))


async def _settle(engine: Engine, patience_s: float) -> Recovered:
    runs = len(engine.runlog.open_runs)
    errors: dict[str, str] = {}
    with trio.move_on_after(patience_s):
        await engine.recovery.settle_each(PAUSE_S, errors)
    left = engine.runlog.open_runs
    unsaid = [errors.get(run.run_id, f"{run.instance_id}: run {run.run_id}: no answer") for run in left]
    summary = f"{runs - len(left)} of {runs} open runs settled" if runs else "no open runs"
    return Recovered(summary, tuple(unsaid))


@frozen
class _Beside:
    """What is open while somebody else holds the state, a line for each run."""

    owner: LockOwner
    under_way: tuple[str, ...]
    left: tuple[str, ...]

    @property
    def done(self) -> bool:
        return not self.under_way and not self.left

    def told(self) -> Recovered:
        summary = f"left to hypemand {self.owner}, which settles open runs itself"
        if self.under_way:
            summary += f"; under way there: {', '.join(self.under_way)}"
        return Recovered(summary, self.left)


def _look_beside(owner: LockOwner, config: Config) -> _Beside:
    disk = Disk()
    log = read_log(config.state_dir, disk)
    open_runs = log.open_runs().values()
    schedules = scan_schedules(config.state_dir / "schedules", disk).schedules if open_runs else {}
    told: dict[bool, list[str]] = {True: [], False: []}
    for run in open_runs:
        schedule, _ = schedules.get(run.instance_id, (None, None))
        told[under_way(run, schedule, owner)].append(f"{run.instance_id}: run {run.run_id}")
    return _Beside(owner, tuple(told[True]), tuple(told[False]))
