"""One hypervisor hangs, and 1,000 runs on another are due: is any of them later for it? By turns, with and without."""

from collections.abc import Sequence

from benchmarks.scale.due_at_once import FULL, QUICK, Flood, flood
from benchmarks.scale.host import Host, Table
from benchmarks.scale.rows import Goal, Of, Row, late_row
from benchmarks.scale.setting import Setting

NAME = "hung"
ABOUT = "lateness of 1,000 schedules while the hypervisor of another one hangs, beside the same without it"
GOAL_RATIO = 1.25
"""Not later, but for noise."""


async def measure(setting: Setting) -> Sequence[Row]:
    """The order turns from round to round."""
    count = setting.size(FULL, QUICK)
    alone = Table(count=count)
    stuck = Table(name="stuck", prefix="stuck", count=1, hang=True)
    found: dict[bool, list[Flood]] = {True: [], False: []}
    for number in range(setting.runs):
        for hangs in (True, False) if number % 2 else (False, True):
            setting.tell(f"{NAME}: round {number + 1} of {setting.runs}, {'with' if hangs else 'without'} it")
            tables = [stuck, alone] if hangs else [alone]
            host = Host(setting.place("hypemand"))
            found[hangs].append(await flood(host, tables, counted=alone, concurrency=count))
    return [
        late_row(
            figure=NAME,
            key=key,
            title=f"one hypervisor hung, {count:,} others due, {title}",
            ours=[getattr(one, f"{key}_s") for one in found[True]],
            peer="without it",
            theirs=[getattr(one, f"{key}_s") for one in found[False]],
            goal=Goal(GOAL_RATIO, Of.RATIO),
            checked=True,
            luck_below=1.0,
        )
        for key, title in (("claimed", "claimed (late_s)"), ("called", "hypervisor called"))
    ]
