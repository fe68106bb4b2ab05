"""Settling in the place of a daemon that has died: what the guard has done, in a fresh process."""

import structlog
import trio
from attrs import define, field

from hypemand.config import Config
from hypemand.engine.offline import Recovered, settle_held
from hypemand.engine.recovery import CRASHED
from hypemand.state.lock import LockHeldError, StateLock, lock_holder

LOOK_S = 0.01
OTHERS_S = 60.0
"""How long a `recover` or another guard is waited for."""
_log = structlog.get_logger()


@define
class TakeOver:
    """One try to settle what the daemon of process id *dead* left open.

    Attributes:
        frozen: Runs whose guests stood still for it; it held leases for them.
        crashed: How it ended, for the history.
    """

    config: Config
    dead: int
    frozen: frozenset[str]
    crashed: str = CRASHED
    _lock: StateLock | None = field(init=False, default=None)

    async def settle(self, patience_s: float) -> Recovered:
        """Settle every open run, unless another daemon has the duty; keeps trying for *patience_s*.

        Raises:
            LockHeldError: A `recover` or another guard has the state for a long time.
            OSError: The state directory is not there, or can't be read.
        """
        if not await self._take_lock():
            return Recovered("left to another daemon", ())
        try:
            if self._lock is None:
                return await self._settle_without_lock(patience_s)
            return await settle_held(self.config, patience_s, frozen=self.frozen, crashed=self.crashed)
        finally:
            if self._lock is not None:
                self._lock.release()

    async def _settle_without_lock(self, patience_s: float) -> Recovered:
        result = Recovered("left to another process", ("all: somebody else has taken the state meanwhile",))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_lock, nursery.cancel_scope)
            result = await settle_held(self.config, patience_s, frozen=self.frozen, crashed=self.crashed)
            nursery.cancel_scope.cancel()
        return result

    async def _take_lock(self) -> bool:
        """Wait for the lock; go without it where only what is left of the dead daemon has it.

        A thread that hangs in a filesystem outlives the rest of its process,
        and keeps the lock from everybody: no guest has to wait for that.

        Returns:
            Whether the duty is ours.
        """
        with trio.move_on_after(OTHERS_S):
            while True:
                try:
                    self._lock = StateLock.acquire(self.config.state_dir, "guard", create=False)
                except LockHeldError as error:
                    held = error
                else:
                    return True
                holder = lock_holder(self.config.state_dir)
                if holder == self.dead:
                    _log.warning("what is left of the daemon keeps the lock", pid=holder)
                    return True
                if held.owner.role == "daemon" and held.owner.pid not in (0, self.dead):
                    return False
                await trio.sleep(LOOK_S)
        raise held

    async def _keep_lock(self, settling: trio.CancelScope) -> None:
        """Have the lock as soon as it is free; stop settling when somebody else was faster."""
        while self._lock is None:
            try:
                self._lock = StateLock.acquire(self.config.state_dir, "guard", create=False)
            except LockHeldError:
                if lock_holder(self.config.state_dir) not in (None, self.dead):
                    settling.cancel()
                    return
            await trio.sleep(LOOK_S)
