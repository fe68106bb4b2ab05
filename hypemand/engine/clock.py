"""Wall clock, boot-time clock and time zone, and the watch that notices when the wall clock jumps."""

import ctypes
import os
import struct
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta, tzinfo
from functools import cache
from pathlib import Path
from typing import Any, Protocol
from zoneinfo import ZoneInfo

import structlog

from hypemand.core.doubt import JUMP, LONGEST_WAIT, Doubt, Reading, doubts_of
from hypemand.core.fields import format_instant

_STA_UNSYNC = 0x0040
_Timex = ctypes.c_char * 512  # more than a struct timex has
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


@cache
def _libc() -> ctypes.CDLL:
    """Loaded once: that takes a hundred times as long as a question to it."""
    return ctypes.CDLL(None)


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
            timex = _Timex()
            if _libc().adjtimex(timex) < 0 or struct.calcsize("l") != 8:
                return None
        except (OSError, AttributeError):
            return None
        (status,) = struct.unpack_from("i", timex.raw, _STATUS_OFFSET)
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


class ClockWatch:
    """Compares the wall clock with the boot-time clock, and says when pruning by age has to wait.

    Pruning by age waits while the kernel calls the clock unsynchronised, and
    for a clean interval after a jump, after a start whose clock precedes what
    was recorded last, or after a boot whose clock is more than an interval
    ahead of that. After a jump of more than an interval it waits for as long
    as that; never for more than a day.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._wall = clock.now()
        self._boot_s = clock.boot_s()
        self._doubts: list[Doubt] = []
        self.jumps = 0

    def check_start(self, past: Sequence[Reading], boot_id: str = "") -> None:
        """Find out what the clocks of the *past*, oldest first, and of now leave to doubt.

        The process that saw a jump may be gone, and one between two processes
        was seen by nobody. Neither another start nor a reboot ends a doubt.
        """
        if not past:
            return
        now, boot_s, recorded = self._clock.now(), self._clock.boot_s(), past[-1].wall
        self._doubts = doubts_of([*past, Reading(now, boot_id, boot_s)], boot_s)
        self._tell(self._doubts, boot_s)
        if now < recorded:
            self._doubts.append(Doubt(boot_s, now - recorded))
            _log.error(
                "the clock stands before what was recorded; pruning by age waits",
                by_s=round((now - recorded).total_seconds(), 3),
                clock=format_instant(now),
                recorded=format_instant(recorded),
            )

    @staticmethod
    def _tell(doubts: Sequence[Doubt], boot_s: float) -> None:
        jumps = [doubt for doubt in doubts if not doubt.may_be_downtime]
        gaps = [doubt for doubt in doubts if doubt.may_be_downtime]
        for doubt in jumps:
            _log.warning("the clock jumped before this start; pruning by age waits", **_told(doubt, boot_s))
        if gaps:
            widest = max(gaps, key=lambda doubt: doubt.by)
            _log.log(
                30 if widest.by > LONGEST_WAIT else 20,
                "the clock went far ahead over a boot, hypemand was down for so long or it is wrong;"
                " where that is more than an interval, pruning by age waits",
                **_told(widest, boot_s),
            )

    def check(self, on_jump: Callable[[timedelta], None]) -> None:
        """Call *on_jump* with how far the wall clock jumped since the last check, if it did by more than 30 s."""
        jump = self._since_last_look()
        wall, boot_s = self._clock.now(), self._clock.boot_s()
        self._wall, self._boot_s = wall, boot_s
        if abs(jump) > JUMP:
            self.jumps += 1
            self._doubts.append(Doubt(boot_s, jump))
            _log.warning(
                "the clock jumped; pruning by age waits, times are set anew",
                by_s=round(jump.total_seconds(), 3),
                was=format_instant(wall - jump),
                clock=format_instant(wall),
            )
            on_jump(jump)
        self._doubts = [doubt for doubt in self._doubts if doubt.age(boot_s) < LONGEST_WAIT]

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
        return any(doubt.holds(self._clock.boot_s(), interval) for doubt in self._doubts)


def _told(doubt: Doubt, boot_s: float) -> dict[str, Any]:
    return {"by_s": round(doubt.by.total_seconds(), 3), "ago_s": round(doubt.age(boot_s).total_seconds(), 3)}
