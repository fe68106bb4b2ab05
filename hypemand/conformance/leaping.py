"""A clock that can be put forward: nobody waits for a time limit to pass, however long it is."""

import time

import trio


class LeapingClock(trio.abc.Clock):
    """The real clock, and how far it was put forward."""

    def __init__(self) -> None:
        self._ahead_s = 0.0

    def start_clock(self) -> None:
        """See `trio.abc.Clock`; there is nothing to start."""

    def current_time(self) -> float:
        """Seconds since some moment."""
        return time.monotonic() + self._ahead_s

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """Real seconds until *deadline*."""
        return deadline - self.current_time()

    def leap_to(self, deadline: float) -> None:
        """Put the clock forward to *deadline*; what is due until then is due now."""
        self._ahead_s += max(0.0, deadline - self.current_time())
