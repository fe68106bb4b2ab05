"""Wall clock, boot-time clock and time zone, and the watch that notices when the wall clock jumps."""

import ctypes
import itertools
import os
import struct
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any, Protocol
from zoneinfo import ZoneInfo

import structlog
from attrs import frozen

from hypemand.core.fields import format_instant

JUMP = timedelta(seconds=30)
LONGEST_WAIT = timedelta(days=1)
_STA_UNSYNC = 0x0040
_STATUS_OFFSET = 40  # of `status` in struct timex, 64-bit Linux: four longs and a padded int before it
_log = structlog.get_logger()


class Clock(Protocol):
    """Where the engine gets its time from. Sleeping is trio's."""

    def now(self) -> datetime:
        """Wall clock, aware UTC. May jump."""

    def boot_s(self) -> float:
        """Seconds since boot, suspend included. Never jumps."""

    def synchronised(self) -> bool | None:
        """Whether the kernel calls the wall clock synchronised; None where it can't tell."""

    def zone(self) -> tzinfo:
        """The local time zone, for times of day in the config."""


class SystemClock:
    """The clocks of this machine."""

    def now(self) -> datetime:
        """See `Clock.now`."""
        return datetime.now(UTC)

    def boot_s(self) -> float:
        """See `Clock.boot_s`."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def synchronised(self) -> bool | None:
        """See `Clock.synchronised`: asks adjtimex(2)."""
        try:
            buffer = ctypes.create_string_buffer(512)
            if ctypes.CDLL(None).adjtimex(buffer) < 0 or struct.calcsize("l") != 8:
                return None
        except (OSError, AttributeError):
            return None
        (status,) = struct.unpack_from("i", buffer.raw, _STATUS_OFFSET)
        return not status & _STA_UNSYNC

    def zone(self) -> tzinfo:
        """See `Clock.zone`: ``$TZ``, else /etc/localtime, else UTC."""
        try:
            if os.environ.get("TZ"):
                return ZoneInfo(os.environ["TZ"])
            with Path("/etc/localtime").open("rb") as file:
                return ZoneInfo.from_file(file)
        except (OSError, ValueError, KeyError):
            return UTC


def boot_id() -> str:
    """The kernel's id of this boot; empty where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


@frozen
class _Doubt:
    """Why the wall clock is not trusted: when that was seen, and by how much it may be wrong.

    Attributes:
        may_be_downtime: A clock far ahead of what was recorded; right, if hypemand was down for so long.
    """

    seen_s: float
    by: timedelta
    may_be_downtime: bool = False

    def holds(self, boot_s: float, interval: timedelta) -> bool:
        """Whether a schedule of *interval* must still wait: for that, or as long as the doubt is large."""
        if self.may_be_downtime and self.by <= interval:
            return False
        return timedelta(seconds=boot_s - self.seen_s) < min(LONGEST_WAIT, max(interval, self.by))


class ClockWatch:
    """Compares the wall clock with the boot-time clock, and says when pruning by age has to wait.

    Pruning by age waits while the kernel calls the clock unsynchronised, and
    for a clean interval after a jump, after a start whose clock precedes what
    was recorded last, or one that is more than an interval ahead of it. After
    a jump of more than an interval it waits for as long as that; never for
    more than a day.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._wall = clock.now()
        self._boot_s = clock.boot_s()
        self._doubt: _Doubt | None = None
        self.jumps = 0

    def check_start(self, last_recorded: datetime | None, of_this_boot: Iterable[tuple[datetime, float]] = ()) -> None:
        """Compare the clock with *last_recorded*, the latest instant in the state, and with what both clocks showed.

        Args:
            of_this_boot: Instants of this boot on wall and boot-time clock, oldest first. The process that saw a
                jump may be gone, and one between two processes was seen by nobody.
        """
        if last_recorded is None:
            return
        self._compare(last_recorded)
        for before, after in itertools.pairwise([*of_this_boot, (self._clock.now(), self._clock.boot_s())]):
            jump = (after[0] - before[0]) - timedelta(seconds=after[1] - before[1])
            if abs(jump) > JUMP:
                self._doubt = _Doubt(after[1], abs(jump))
                _log.warning("the clock jumped before this start; pruning by age waits", **self._told(jump))

    def _compare(self, last_recorded: datetime) -> None:
        by = self._clock.now() - last_recorded
        if by < timedelta(0):
            self._doubt = _Doubt(self._clock.boot_s(), -by)
            _log.error("the clock stands before what was recorded; pruning by age waits", **self._told(by))
        elif by > JUMP:
            self._doubt = _Doubt(self._clock.boot_s(), by, may_be_downtime=True)
            _log.log(
                30 if by > LONGEST_WAIT else 20,
                "the clock stands after what was recorded, hypemand was down for so long or it is wrong;"
                " where that is more than an interval, pruning by age waits",
                **self._told(by),
            )

    def _told(self, by: timedelta) -> dict[str, Any]:
        now = self._clock.now()
        return {
            "by_s": round(by.total_seconds(), 3),
            "clock": format_instant(now),
            "recorded": format_instant(now - by),
        }

    def check(self, on_jump: Callable[[timedelta], None]) -> None:
        """Call *on_jump* with how far the wall clock jumped since the last check, if it did by more than 30 s."""
        jump = self._since_last_look()
        wall, boot_s = self._clock.now(), self._clock.boot_s()
        self._wall, self._boot_s = wall, boot_s
        if abs(jump) > JUMP:
            self.jumps += 1
            self._doubt = _Doubt(boot_s, abs(jump))
            _log.warning(
                "the clock jumped; pruning by age waits, times are set anew",
                by_s=round(jump.total_seconds(), 3),
                was=format_instant(wall - jump),
                clock=format_instant(wall),
            )
            on_jump(jump)

    def _since_last_look(self) -> timedelta:
        """How far the wall clock has moved away from the boot-time clock since the last check."""
        return (self._clock.now() - self._wall) - timedelta(seconds=self._clock.boot_s() - self._boot_s)

    def why_age_waits(self, interval: timedelta) -> str | None:
        """Why a schedule of *interval* must not prune by age now, or None when it may."""
        if self._clock.synchronised() is False:
            return "the kernel says that the clock is not synchronised"
        if self.distrusted(interval):
            return "the clock was wrong or jumped a short while ago, or hypemand was down for long"
        return None

    def distrusted(self, interval: timedelta) -> bool:
        """Whether the clock jumped, or may be wrong, so lately that a schedule of *interval* has to wait."""
        if abs(self._since_last_look()) > JUMP:
            return True  # just now; the next check will tell
        return self._doubt is not None and self._doubt.holds(self._clock.boot_s(), interval)
