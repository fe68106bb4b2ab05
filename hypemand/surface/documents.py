"""Reports as JSON values, for programs: stable keys, instants in RFC 3339, durations in seconds."""

from datetime import datetime
from typing import Any

from hypemand.core.fields import format_instant
from hypemand.core.forecast import PlannedRun
from hypemand.core.model import InstanceId, RunFinished, Snapshot
from hypemand.state.codec import line_document, schedule_document
from hypemand.surface.report import InstanceView, Overview


def overview_document(overview: Overview, config_problems: list[str], now: datetime) -> dict[str, Any]:
    """The answer to ``status --json``."""
    state = overview.state
    return {
        "daemon": {"running": _daemon_runs(overview), "pid": state.owner.pid if state.owner else None},
        "state_dir": str(state.state_dir),
        "config_problems": config_problems,
        "problems": overview.problems,
        "warnings": overview.warnings,
        "unreadable_state_files": list(state.trouble),
        "quarantine": list(state.quarantine),
        "damaged_log_lines": state.log.damaged,
        "open_runs": sorted(state.log.open_runs()),
        "instances": [_view_document(view, now) for view in overview.instances],
    }


def _daemon_runs(overview: Overview) -> bool:
    owner = overview.state.owner
    return owner is not None and owner.role == "daemon"


def _view_document(view: InstanceView, now: datetime) -> dict[str, Any]:
    last = view.snapshots[-1] if view.snapshots else None
    return {
        "instance_id": view.instance_id,
        "backend": view.backend,
        "state": view.state,
        "covered": view.schedule is not None,
        "made": view.made,
        "schedule": schedule_document(view.schedule) if view.schedule else None,
        "last_run": line_document(view.last_run) if view.last_run else None,
        "open_run": view.open_run,
        "under_way": view.under_way,
        "last_snapshot": snapshot_document(last) if last else None,
        "last_snapshot_age_s": round((now - last.created_at).total_seconds(), 3) if last else None,
        "snapshots_kept": None if view.snapshots is None else len(view.snapshots),
        "snapshots_bytes": None if view.snapshots is None else sum(s.size_bytes for s in view.snapshots),
        "freeze": _freeze_document(view),
        "trouble": view.trouble,
    }


def _freeze_document(view: InstanceView) -> dict[str, Any]:
    longest, found = view.longest, view.found_frozen
    return {
        "last_s": view.last_run.freeze_s if view.last_run else None,
        "longest_s": longest.freeze_s if longest else None,
        "longest_at": format_instant(longest.at) if longest else None,
        "found_frozen_s": found.freeze_s if found else None,
        "found_frozen_at": format_instant(found.at) if found else None,
        "budget_s": view.max_freeze.total_seconds() if view.max_freeze else None,
        "over_budget": view.over_budget,
    }


def snapshot_document(snapshot: Snapshot) -> dict[str, Any]:
    """One snapshot of ``snapshots --json``."""
    return {
        "id": snapshot.id,
        "instance_id": snapshot.instance_id,
        "name": snapshot.name,
        "kind": str(snapshot.kind),
        "created_at": format_instant(snapshot.created_at),
        "size_bytes": snapshot.size_bytes,
        "tags": dict(snapshot.tags),
        "restore": [{"action": str(step.action), "command": step.command} for step in snapshot.restore],
    }


def run_document(run: RunFinished) -> dict[str, Any]:
    """One run of ``history --json``."""
    return line_document(run)


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
