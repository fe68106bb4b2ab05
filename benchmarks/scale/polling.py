"""The loop that Hypeman has for its schedules, simulated: once a minute all that is due is run, one by one. Pure.

Nothing of Hypeman is run. All schedules come due at one instant, which is
anywhere in the minute between two looks; each run begins after the one before.
"""

from collections.abc import Sequence

POLL_S = 60.0
SNAPSHOT_S = 2.0
"""What the capture of a small guest takes, for the second of two assumptions; the first is that it takes no time."""


def polled_late_s(count: int, run_s: float, phase: float) -> list[float]:
    """How late each of *count* runs begins that are due at one instant, in seconds.

    Args:
        run_s: How long a run takes.
        phase: The part of the minute that is over at that instant, from 0 to 1.
    """
    first = POLL_S * (1.0 - phase)
    return [first + number * run_s for number in range(count)]


def polled_anywhere(count: int, run_s: float, phases: int = 60) -> Sequence[float]:
    """The same over so many instants, spread evenly over the minute."""
    return [late for number in range(phases) for late in polled_late_s(count, run_s, (number + 0.5) / phases)]
