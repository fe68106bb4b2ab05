"""Whether a wall clock can be trusted: what readings of the clocks, one after the other, tell of jumps."""

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from itertools import pairwise

from attrs import frozen

JUMP = timedelta(seconds=30)
LONGEST_WAIT = timedelta(days=1)


@frozen
class Reading:
    """What the clocks showed at one moment.

    Attributes:
        boot_id, boot_s: The boot, and the seconds since it began; empty and None where nobody wrote them down.
    """

    wall: datetime
    boot_id: str = ""
    boot_s: float | None = None


@frozen
class Doubt:
    """Why the wall clock is not trusted.

    Attributes:
        seen_s: When that was seen, on the boot-time clock of this boot; negative before it.
        by: How far the wall clock moved more than time did.
        may_be_downtime: Nobody looked meanwhile: the clock is right, if nothing ran for so long.
    """

    seen_s: float
    by: timedelta
    may_be_downtime: bool = False

    def age(self, boot_s: float) -> timedelta:
        """How long ago it was seen."""
        return timedelta(seconds=boot_s - self.seen_s)

    def holds(self, boot_s: float, interval: timedelta) -> bool:
        """Whether a schedule of *interval* must still wait: for that, or as long as the doubt is large."""
        if self.may_be_downtime and self.by <= interval:
            return False
        return self.age(boot_s) < min(LONGEST_WAIT, max(interval, abs(self.by)))


@frozen
class _Step:
    """From one reading to the next: how long it took, and how far the wall clock jumped in it."""

    took: timedelta
    jump: timedelta
    may_be_downtime: bool = False


def doubts_of(readings: Sequence[Reading], boot_s: float) -> list[Doubt]:
    """What is still to be doubted after *readings*, oldest first.

    Within a boot the boot-time clock tells what is a jump, however long
    nothing ran. From one boot to the next, and where nobody wrote the
    boot-time clock down, the wall clock alone is left: a step forward may have
    been so long, and counts as time that went by; a step back is a jump.

    Args:
        readings: In the order in which they were taken; the last one now.
        boot_s: Of now.
    """
    ago = timedelta(0)
    doubts: list[Doubt] = []
    for step in reversed([*_steps(readings)]):
        if ago >= LONGEST_WAIT:
            break
        if abs(step.jump) > JUMP:
            doubts.append(Doubt(boot_s - ago.total_seconds(), step.jump, step.may_be_downtime))
        ago += step.took
    return doubts[::-1]


def _steps(readings: Sequence[Reading]) -> Iterator[_Step]:
    since_known: list[Reading] = []
    for reading in readings:
        since_known.append(reading)
        if reading.boot_s is None and reading is not readings[-1]:
            continue
        known = since_known[0]
        if known.boot_s is not None and reading.boot_s is not None and known.boot_id == reading.boot_id != "":
            took = timedelta(seconds=reading.boot_s - known.boot_s)
            yield _Step(max(took, timedelta(0)), reading.wall - known.wall - took)
        else:
            for before, after in pairwise(since_known):
                by = after.wall - before.wall
                yield _Step(max(by, timedelta(0)), by, may_be_downtime=by > timedelta(0))
        since_known = [reading]
