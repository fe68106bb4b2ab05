"""The clocks of a world: the true time, and a wall clock that jumps."""

from datetime import UTC, datetime, timedelta, tzinfo

import trio
from attrs import define

EPOCH = datetime(2026, 3, 9, 1, 0, tzinfo=UTC)


@define
class SimClock:
    """Follows trio's clock from `EPOCH`.

    Attributes:
        offset: How wrong the wall clock is.
        suspended: How long the machine slept in all: wall and boot clock went on.
        earlier_boots_s: What the boot clock does not count.
    """

    offset: timedelta = timedelta(0)
    suspended: timedelta = timedelta(0)
    synced: bool | None = None
    earlier_boots_s: float = 0.0

    def true_now(self) -> datetime:
        return EPOCH + timedelta(seconds=trio.current_time()) + self.suspended

    @property
    def is_wrong(self) -> bool:
        return bool(self.offset)

    def now(self) -> datetime:
        return self.true_now() + self.offset

    def went_by_s(self) -> float:
        return trio.current_time() + self.suspended.total_seconds()

    def boot_s(self) -> float:
        return self.went_by_s() - self.earlier_boots_s

    def reboot(self) -> None:
        self.earlier_boots_s = self.went_by_s()

    def synchronised(self) -> bool | None:
        return self.synced

    def zone(self) -> tzinfo:
        return UTC
