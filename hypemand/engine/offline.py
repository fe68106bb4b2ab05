"""Settling open runs without a daemon: what ``hypemand recover`` does."""

import trio
from attrs import frozen

from hypemand.config import Config
from hypemand.engine.engine import Engine, this_machine
from hypemand.engine.fleet import new_fleet
from hypemand.state.files import Disk
from hypemand.state.lock import LockHeldError, take_lock
from hypemand.state.runlog import read_log

PATIENCE_S = 30.0
PAUSE_S = 1.0


@frozen
class Recovered:
    """What came of it: a line to print, and one for each run that is still open."""

    summary: str
    left: tuple[str, ...]


async def recover(config: Config) -> Recovered:
    """Settle every open run in the state of *config*; keeps trying for up to 30 s.

    Beside a daemon or guard, which settle runs themselves, it only reports.
    """
    if not config.state_dir.exists():
        return Recovered(f"nothing to recover: there is no state in {config.state_dir}", ())
    try:
        lock = await take_lock(config.state_dir, "recover", Disk())
    except LockHeldError as error:
        return await _leave_to(error, config)
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
    errors: list[str] = []
    with trio.move_on_after(patience_s):
        while True:
            errors = await engine.recovery.settle_all()
            if not errors:
                break
            await trio.sleep(PAUSE_S)
    left = engine.runlog.open_runs
    unsaid = [f"{run.instance_id}: run {run.run_id}: no answer" for run in left] if left and not errors else errors
    summary = f"{runs - len(left)} of {runs} open runs settled" if runs else "no open runs"
    return Recovered(summary, tuple(unsaid))


async def _leave_to(held: LockHeldError, config: Config) -> Recovered:
    log = await trio.to_thread.run_sync(read_log, config.state_dir, Disk())
    left = [f"{run.instance_id}: run {run.run_id}" for run in log.open_runs().values()]
    return Recovered(f"left to hypemand {held.owner}, which settles open runs itself", tuple(left))
