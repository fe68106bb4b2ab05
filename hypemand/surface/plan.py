"""What will run, and what each run will prune: worked out from the schedules and snapshots that a document tells."""

from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from itertools import islice
from typing import Any

from attrs import define, field

from hypemand.core.fields import check_instant, format_instant
from hypemand.core.forecast import PlannedRun, forecast
from hypemand.core.model import InstanceId, Snapshot, SnapshotKind
from hypemand.state.codec import schedule_of

MOST_RUNS = 2000
"""Planned runs of one schedule; more are not worked out."""


@define
class Plan:
    """Runs to come, in order, and what is to be said of those that are left out."""

    runs: list[tuple[InstanceId, PlannedRun]] = field(factory=list)
    notes: list[str] = field(factory=list)


def plan_runs(document: Mapping[str, Any], *, within: timedelta) -> Plan:
    """The runs of enabled schedules within that time; where snapshots can't be listed, as if there were none.

    Schedules that the config wants, but which are not made before the daemon
    starts, count too. Runs that will not begin are left out.

    Args:
        document: A `documents.forecast_document`.
    """
    plan = Plan()
    now = check_instant(document["at"])
    for told in document["schedules"]:
        instance = told["schedule"]["instance_id"]
        if told["over_budget"]:
            plan.notes.append(f"no run of {instance} is shown: it will not begin")
            continue
        runs = list(islice(_runs(told, now, within), MOST_RUNS + 1))
        plan.runs += [(instance, run) for run in runs[:MOST_RUNS]]
        if len(runs) > MOST_RUNS:
            plan.notes.append(f"only the next {MOST_RUNS} runs of {instance} are shown")
    plan.runs.sort(key=lambda pair: (pair[1].at, pair[0]))
    return plan


def planned_document(instance: InstanceId, run: PlannedRun) -> dict[str, Any]:
    """One run of ``plan --json``."""
    return {
        "at": format_instant(run.at),
        "instance_id": instance,
        "snapshot_name": run.snapshot_name,
        "prunes": [
            {"snapshot_id": e.snapshot.id, "snapshot_name": e.snapshot.name, "reasons": list(e.reasons)}
            for e in run.prunes
        ],
    }


def _runs(told: Mapping[str, Any], now: datetime, within: timedelta) -> Iterator[PlannedRun]:
    schedule = schedule_of(told["schedule"])
    if not schedule.settings.enabled:
        return iter(())
    snapshots = [_snapshot(snapshot) for snapshot in told["snapshots"]]
    return forecast(schedule, snapshots, now=now, within=within, made=told["in_order"])


def _snapshot(told: Mapping[str, Any]) -> Snapshot:
    return Snapshot(
        id=told["id"],
        instance_id=told["instance_id"],
        name=told["name"],
        kind=SnapshotKind(told["kind"]),
        created_at=check_instant(told["created_at"]),
        size_bytes=told["size_bytes"],
        tags=told["tags"],
    )
