"""Many runs that are due at one moment: all of them are written down before the first one's work delays the last."""

import trio
from attrs import define, field

MANY = 8
"""Fewer that begin at one moment are no rush."""
QUIET_S = 0.2
"""Once none of them has come forward for so long nobody waits for them: they may wait for hypervisors that hang."""
LONGEST_S = 5.0
"""Nobody waits longer: where hypervisors hang, there may always be others that come forward, or give up."""


@define(eq=False)
class Rush:
    """The runs between their slot and their claim, which need little work each; how late a run is shows there."""

    _beginning: int = field(init=False, default=0)
    _steps: int = field(init=False, default=0)
    _over: trio.Event | None = field(init=False, default=None)

    def __enter__(self) -> None:
        """Within the block a run comes nearer to its claim."""
        self._beginning += 1

    def __exit__(self, *_: object) -> None:
        """It is claimed, or waits, or came to nothing."""
        self._beginning -= 1
        self.step()
        if self._beginning < MANY and self._over is not None:
            self._over.set()

    def step(self) -> None:
        """One of those that begin has come forward."""
        self._steps += 1

    async def wait(self) -> bool:
        """Let those that begin go first, where they are many, and as long as they come forward.

        Returns:
            Whether that took any time.
        """
        if self._beginning < MANY:
            return False
        if self._over is not None:
            await self._over.wait()
            return True
        over = self._over = trio.Event()
        try:
            before, until = -1, trio.current_time() + LONGEST_S
            while before != self._steps and not over.is_set() and trio.current_time() < until:
                before = self._steps
                with trio.move_on_after(QUIET_S):
                    await over.wait()
        finally:
            self._over = None
            over.set()
        return True
