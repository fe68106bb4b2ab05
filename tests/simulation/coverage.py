"""Which faults are injected at which steps: what must be seen, and what was."""

from collections import Counter
from collections.abc import Iterable, Mapping

STEPS = (
    "state",
    "prepare",
    "make_ready",
    "pause",
    "resume",
    "capture",
    "complete",
    "publish",
    "list_snapshots",
    "delete_snapshot",
    "settle",
    "instances",
    "open",
)
"""What a hypervisor is asked."""
CALL_FAULTS = ("error", "hang", "lost", "mute", "slow")
"""Not done and said so; never answered, not done; done, and the answer is an error; done, never answered; late."""
EXTRA_FAULTS = (("late", "pause"), ("stale", "state"), ("partial", "capturing"), ("hang", "capturing"))

WRITES = ("write", "write_again", "sync", "rename", "sync_directory", "truncate", "open_append", "remove")
READS = ("read",)
DISK_FAULTS = ("EIO", "ENOSPC")
ENDS = ("kill", "power")
CRASHING_DISK = ("write", "write_again", "sync", "rename", "sync_directory", "truncate", "remove")
WORLD = (
    "jump +1h",
    "jump -1h",
    "jump +1d",
    "jump -1d",
    "jump +10y",
    "jump to 1970",
    "suspend a week",
    "unsynchronised",
    "config edit",
    "API put",
    "API delete",
    "API run",
    "hand edit",
    "invalid hand edit",
    "operator pauses",
    "operator resumes ours",
    "operator stops",
    "vanishes",
    "unavailable",
    "refuses resume",
    "disk full",
    "slow disk",
    "loop blocked",
    "hung, then killed",
    "stopped, then continued",
    "guard dies",
)
STEP = "event loop"


def expected() -> list[tuple[str, str]]:
    """Every (fault, step) pair that a full simulation must have injected."""
    pairs = [(fault, step) for step in STEPS for fault in CALL_FAULTS]
    pairs += EXTRA_FAULTS
    pairs += [("EIO", step) for step in (*WRITES, *READS)]
    pairs += [("ENOSPC", step) for step in ("write", "open_append", "sync_directory", "rename")]
    pairs += [(f"kill {when}", step) for step in (*STEPS, *CRASHING_DISK) for when in ("before", "after")]
    pairs += [(f"power {when}", step) for step in (*STEPS, *CRASHING_DISK) for when in ("before", "after")]
    pairs += [("no guard", "lease"), *((f"{how} {when}", "lease") for how in ENDS for when in ("before", "after"))]
    pairs += [("kill torn", "write"), ("power torn", "write"), ("kill done", "capture"), ("power done", "capture")]
    pairs += [("kill", STEP), ("power", STEP)]
    pairs += [("guard killed", STEP)]
    pairs += [("world", what) for what in WORLD]
    return pairs


CRASHES = tuple(pair for pair in expected() if pair[0].split()[0] in ENDS and pair[1] != STEP)


def missing(seen: Mapping[tuple[str, str], int]) -> list[tuple[str, str]]:
    """Expected pairs that were not seen."""
    return [pair for pair in expected() if not seen.get(pair)]


def merged(counts: Iterable[Mapping[str, int]]) -> Counter[tuple[str, str]]:
    """Counts by ``fault @ step``, as they travel between processes, put together."""
    total: Counter[tuple[str, str]] = Counter()
    for one in counts:
        for key, number in one.items():
            fault, _, step = key.partition(" @ ")
            total[fault, step] += number
    return total
