"""A clock for tests in virtual time that do nothing but wait for each other: it leaps, and costs nothing else."""

import math

import trio


class VirtualClock(trio.abc.Clock):
    """Stands still while a task can run, and leaps to the next deadline when none can.

    As `trio.testing.MockClock` with ``autojump_threshold=0``, in a third of
    its turns of the event loop; but nobody may wait for threads, sockets or
    `trio.testing.wait_all_tasks_blocked`.
    """

    def __init__(self) -> None:
        self._now_s = 0.0

    def start_clock(self) -> None:
        """See `trio.abc.Clock`; there is nothing to start."""

    def current_time(self) -> float:
        """Seconds since the begin."""
        return self._now_s

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """No time. trio asks only when no task can run."""
        if deadline == math.inf:
            return math.inf
        self._now_s = max(self._now_s, deadline)
        return 0.0

    def jump(self, seconds: float) -> None:
        """Let time pass at once, while a task holds the event loop."""
        self._now_s += seconds
