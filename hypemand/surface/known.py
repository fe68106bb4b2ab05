"""What hypemand itself knows of its instances, before any backend is asked: from the state files, or from an engine."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from attrs import frozen

from hypemand.core.model import InstanceId, InstanceState, RunStarted, Schedule
from hypemand.engine.latest import LatestRuns
from hypemand.engine.made import MakingOrder
from hypemand.engine.records import FreezeRecords
from hypemand.state.codec import Line
from hypemand.state.files import Disk
from hypemand.state.lock import LockOwner, lock_owner
from hypemand.state.replay import lay_over, under_way
from hypemand.state.scan import quarantine_notes, scan_schedules
from hypemand.state.segments import read_log


@frozen(kw_only=True)
class OpenRun:
    """A run that is not finished.

    Attributes:
        under_way: A daemon is at it; else it is to be settled.
        guest: What the engine itself knows of the guest's state meanwhile; None where only the backend can tell.
        frozen_s: For how long the guest stands still, where that is known.
        error: Why it is not settled yet, where that is known.
    """

    run: RunStarted
    under_way: bool
    guest: InstanceState | None = None
    frozen_s: float | None = None
    error: str | None = None


@frozen(kw_only=True)
class State:
    """What hypemand knows now.

    Attributes:
        answered_by: ``daemon``, of itself, or ``files``.
        used_backends: Names of backends through which something was captured before.
        trouble: State files that can't be read or are invalid.
        damaged: Places in the run log that can't be read.
    """

    state_dir: Path
    answered_by: str
    owner: LockOwner | None
    schedules: Mapping[InstanceId, Schedule]
    latest: LatestRuns
    open_runs: Mapping[InstanceId, OpenRun]
    freezes: FreezeRecords
    order: MakingOrder
    used_backends: frozenset[str]
    trouble: tuple[str, ...] = ()
    quarantine: tuple[str, ...] = ()
    damaged: tuple[str, ...] = ()


def read_state(state_dir: Path) -> State:
    """Read the state in *state_dir*. Blocking; also beside a running daemon. Changes nothing.

    Raises:
        OSError: It can't be read.
    """
    disk = Disk()
    scan = scan_schedules(state_dir / "schedules", disk)
    log = read_log(state_dir, disk)
    owner = lock_owner(state_dir)
    lines: defaultdict[str, list[Line]] = defaultdict(list)
    for line in log.lines:
        lines[line.instance_id].append(line)
    schedules = {i: lay_over(schedule, lines[i]) for i, (schedule, _) in scan.schedules.items()}
    latest, freezes, order = LatestRuns(), FreezeRecords(), MakingOrder()
    for learner in (latest, freezes, order):
        learner.learn(log.lines)
    return State(
        state_dir=state_dir,
        answered_by="files",
        owner=owner,
        schedules=schedules,
        latest=latest,
        open_runs={
            run.instance_id: OpenRun(run=run, under_way=under_way(run, schedules.get(run.instance_id), owner))
            for run in log.open_runs().values()
        },
        freezes=freezes,
        order=order,
        used_backends=frozenset(line.backend for line in log.started()),
        trouble=tuple(f"{bad.path}: {bad.problem}" for bad in (*scan.invalid, *scan.newer, *scan.unreadable)),
        quarantine=tuple(quarantine_notes(state_dir)),
        damaged=tuple(log.damaged),
    )
