"""What must hold after a daemon was killed and somebody settled what it left. Nothing here repairs or waits."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from attrs import frozen

from hypemand.core.fields import check_instant
from hypemand.core.model import InstanceId
from hypemand.state.codec import Line, decode_schedule
from hypemand.state.files import Disk
from hypemand.state.lock import lock_owner
from hypemand.state.replay import lay_over
from hypemand.state.segments import read_log
from tests.kills.grounds import KEPT, Ground
from tests.kills.places import GUEST, OPERATORS

FROZEN, OPEN, LOST, TWICE = "left frozen", "run left open", "run lost", "run or snapshot twice"
PARTIAL, GONE, OFF_GRID, UNDONE = "partial left", "snapshot gone", "off the grid", "operator's pause undone"
HELD, LATE, FAILED = "lock or process left", "thawed late", "next slot failed"


@frozen
class Finding:
    """Something that must not be: its kind, for counting, and what it is."""

    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


async def findings(ground: Ground, due_at: datetime, *, paused: bool = False) -> list[Finding]:
    """All that is not as promised, after the run due at *due_at* was cut short and settled.

    Args:
        paused: Whether an operator has paused the guest before it was frozen, so that it has to be so still.
    """
    found = [
        *_of_runs(ground, due_at),
        *_of_snapshots(ground),
        *await _of_guests(ground, paused=paused),
        *(Finding(PARTIAL, text) for text in await ground.leftovers()),
    ]
    if (owner := lock_owner(ground.lab.state)) is not None:
        found.append(Finding(HELD, f"the lock is held by {owner}"))
    return found


async def _of_guests(ground: Ground, *, paused: bool) -> list[Finding]:
    found = []
    state = await ground.state()
    if paused:
        if state != "paused":
            found.append(Finding(UNDONE, f"{GUEST}, paused by an operator before the freeze, is {state}"))
    elif state != "running":
        found.append(Finding(FROZEN, f"{GUEST} is {state}"))
    elif not await ground.ticks():
        found.append(Finding(FROZEN, f"{GUEST} is said to run, but does not get on"))
    theirs = await ground.state(OPERATORS)
    if theirs != "paused":
        found.append(Finding(UNDONE, f"{OPERATORS}, paused by an operator, is {theirs}"))
    return found


def _of_runs(ground: Ground, due_at: datetime) -> Iterator[Finding]:
    log = read_log(ground.lab.state, Disk())
    for run in log.open_runs().values():
        yield Finding(OPEN, f"run {run.run_id} of {run.instance_id} is open")
    started, history = log.started(), log.finished()
    for what, lines in (("started", started), ("in the history", history)):
        for (instance, due), times in Counter((line.instance_id, line.due_at) for line in lines).items():
            if times > 1:
                yield Finding(TWICE, f"the run of {instance} due at {due} is {what} {times} times")
    for line in started:
        if line.run_id not in {run.run_id for run in history}:
            yield Finding(LOST, f"run {line.run_id} due at {line.due_at} was started and is not in the history")
    for bad in log.damaged:
        yield Finding(LOST, f"damaged line in the run log: {bad}")
    yield from _of_next_slot(ground, due_at, (*started, *history))


def _of_next_slot(ground: Ground, due_at: datetime, lines: Iterable[Line]) -> Iterator[Finding]:
    """A run that was begun has used its slot up, whatever the schedule's file says; another is due still."""
    begun = any(line.instance_id == GUEST and line.due_at == due_at for line in lines)
    next_run_at = effective_next_run_at(ground)
    now = datetime.now(UTC)
    if not begun:
        if next_run_at != due_at:
            yield Finding(LOST, f"the run due at {due_at} was not begun, and the next is at {next_run_at}")
        return
    if (next_run_at - due_at) % timedelta(hours=1):
        yield Finding(OFF_GRID, f"due at {due_at}, next at {next_run_at}")
    if not now - timedelta(seconds=60) < next_run_at <= now + timedelta(hours=1):
        yield Finding(OFF_GRID, f"at {now} the next run is at {next_run_at}")


def effective_next_run_at(ground: Ground, instance: str = GUEST) -> datetime:
    """When a guest's next run is due, by the schedule's file and the run log together."""
    schedule = decode_schedule(ground.lab.schedule_file(instance).read_bytes(), InstanceId(instance))
    lines = [line for line in read_log(ground.lab.state, Disk()).lines if line.instance_id == instance]
    return lay_over(schedule, lines).next_run_at


def _of_snapshots(ground: Ground) -> Iterator[Finding]:
    listed, runs = ground.listed(), ground.lab.history(GUEST)
    made = [run["snapshot_id"] for run in runs if run["snapshot_id"]]
    for snapshot_id, times in Counter(made).items():
        if times > 1:
            yield Finding(TWICE, f"snapshot {snapshot_id} is that of {times} runs")
    for name, times in Counter(listed.values()).items():
        if times > 1:
            yield Finding(TWICE, f"{times} snapshots are called {name}")
    for snapshot_id in listed.keys() - set(made):
        yield Finding(TWICE, f"snapshot {snapshot_id} is listed, and of no run in the history")
    pruned = {pruned["snapshot_id"] for run in runs for pruned in run["pruned"]} | _said_to_be_deleted(ground)
    told = " ".join(run["error"] or "" for run in runs)  # a run that was killed while it pruned
    for snapshot_id in {made_id for made_id in made if made_id not in told} - listed.keys() - pruned:
        yield Finding(
            GONE, f"snapshot {snapshot_id} is in the history, not listed, and nobody says that it was deleted"
        )
    if made and made[-1] not in listed:
        yield Finding(GONE, f"the newest snapshot {made[-1]} is gone")
    if len(listed) < min(KEPT, len(made)):
        yield Finding(GONE, f"{len(listed)} of {len(made)} snapshots are left, {KEPT} are to be kept")


def _said_to_be_deleted(ground: Ground) -> set[str]:
    """Snapshots whose deletion a daemon logged before it began with it; some were killed in the midst of it."""
    return {line["snapshot_id"] for line in _logged(ground) if line.get("event") == "deleting expired snapshot"}


def _logged(ground: Ground) -> Iterator[dict[str, Any]]:
    for path in sorted(ground.lab.directory.glob("*.log")):
        for line in path.read_text(errors="replace").splitlines():
            try:
                told = json.loads(line)
            except ValueError:
                continue  # a killed daemon's last line, or what a guest printed
            if isinstance(told, dict):
                yield told


def run_due_at(ground: Ground, due_at: datetime) -> dict[str, Any] | None:
    """The run due at *due_at* as the history has it, or None."""
    runs = [run for run in ground.lab.history(GUEST) if check_instant(run["due_at"]) == due_at]
    return runs[-1] if runs else None
