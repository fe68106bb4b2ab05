"""Settling open runs without a daemon: what ``hypemand recover`` does."""

import trio
from attrs import frozen

from hypemand.config import Config
from hypemand.engine.engine import Engine, this_machine
from hypemand.engine.fleet import new_fleet
from hypemand.state.files import Disk
from hypemand.state.lock import LockHeldError, LockOwner, take_lock
from hypemand.state.replay import under_way
from hypemand.state.runlog import read_log
from hypemand.state.scan import scan_schedules

PATIENCE_S = 30.0
PAUSE_S = 1.0
BESIDE_S = 5.0


@frozen
class Recovered:
    """What came of it: a line to print, and one for each run that is still open."""

    summary: str
    left: tuple[str, ...]


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


async def settle_held(config: Config, patience_s: float) -> Recovered:
    """Settle every open run in the state of *config*, whose lock the caller holds; keeps trying for *patience_s*."""
    async with trio.open_nursery() as background:
        engine = Engine(config, new_fleet(config.state_dir), this_machine(), background)
        await engine.load()
        result = await _settle(engine, patience_s)
        await engine.close()
    return result


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
