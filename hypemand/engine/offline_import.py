"""Taking schedules in while no daemon runs."""

from collections.abc import Sequence

import trio

from hypemand.config import Config
from hypemand.engine.engine import Engine
from hypemand.engine.fleet import new_fleet
from hypemand.engine.importing import Imported, Wish, bring_in
from hypemand.engine.outside import this_machine
from hypemand.engine.requests import Requests
from hypemand.state.files import Disk
from hypemand.state.lock import take_lock
from hypemand.state.scan import scan_schedules

ROLE = "import"


async def import_offline(config: Config, wishes: Sequence[Wish], dry_run: bool) -> list[Imported]:  # noqa: FBT001 - trio.run takes no keywords
    """Do *wishes* in the state of *config*, one after the other. A dry run leaves every file as it is.

    Raises:
        LockHeldError: A daemon has the state.
        NewerFormatError, OSError: It can't be read.
    """
    if dry_run:
        return await _do(config, wishes, dry_run=True)
    lock = await take_lock(config.state_dir, ROLE, Disk())
    try:
        return await _do(config, wishes, dry_run=False)
    finally:
        lock.release()


async def _do(config: Config, wishes: Sequence[Wish], *, dry_run: bool) -> list[Imported]:
    async with trio.open_nursery() as background:
        engine = Engine(config, new_fleet(config.state_dir), this_machine(), background)
        engine.fleet.have(config.backends)
        try:
            if dry_run:
                await _look_only(engine, config)
            else:
                await engine.load()
            requests = Requests(engine)
            done = [await bring_in(requests, wish) for wish in wishes]
        finally:
            await engine.close()
        background.cancel_scope.cancel()
    return done


async def _look_only(engine: Engine, config: Config) -> None:
    disk = Disk()
    scan = await disk.call(scan_schedules, config.state_dir / "schedules", disk)
    for schedule, _ in scan.schedules.values():
        engine.store.remember(schedule)
    engine.store.unreadable = (*scan.unreadable, *scan.newer)
