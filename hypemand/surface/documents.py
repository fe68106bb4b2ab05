"""Answers as JSON values: stable keys, instants in RFC 3339, durations in seconds. Tables are made from them alone.

The daemon sends them over its socket, and programs get them with ``--json``:
what is shown is the same, whoever has answered.
"""

from datetime import datetime
from typing import Any

from hypemand.core.fields import format_instant
from hypemand.core.model import Snapshot
from hypemand.state.codec import line_document, schedule_document
from hypemand.surface.known import OpenRun
from hypemand.surface.report import Overview
from hypemand.surface.views import InstanceView

Document = dict[str, Any]


def status_document(overview: Overview) -> Document:
    """The answer to ``status --json``."""
    state = overview.state
    return {
        "at": format_instant(overview.at),
        "answered_by": state.answered_by,
        "daemon": {
            "running": state.owner is not None and state.owner.role == "daemon",
            "pid": state.owner.pid if state.owner else None,
        },
        "lock": None
        if state.owner is None
        else {
            "role": state.owner.role,
            "pid": state.owner.pid,
            "since": _instant(state.owner.since),
        },
        "state_dir": str(state.state_dir),
        "config_problems": [],
        "problems": overview.problems,
        "clock_doubts": overview.clock_doubts,
        "warnings": _warnings(overview),
        "unreadable_state_files": list(state.trouble),
        "quarantine": list(state.quarantine),
        "damaged_log_lines": list(state.damaged),
        "open_runs": sorted(open_run.run.run_id for open_run in state.open_runs.values()),
        "instances": [_view_document(view, overview.at) for view in overview.instances],
    }


def _warnings(overview: Overview) -> list[str]:
    of_instances = [f"{view.instance_id}: {warning}" for view in overview.instances for warning in view.warnings]
    return [*overview.warnings, *overview.clock_doubts, *of_instances]


def _instant(at: datetime | None) -> str | None:
    return None if at is None else format_instant(at)


def _view_document(view: InstanceView, now: datetime) -> Document:
    last = view.snapshots[-1] if view.snapshots else None
    attempt = view.last_attempt
    return {
        "instance_id": view.instance_id,
        "backend": view.backend,
        "state": view.state,
        "covered": view.schedule is not None,
        "made": view.made,
        "schedule": schedule_document(view.schedule) if view.schedule else None,
        "last_run": line_document(view.last_run) if view.last_run else None,
        "last_attempt": {
            "started_at": format_instant(attempt.started_at),
            "outcome": str(attempt.outcome),
            "error": attempt.error,
        }
        if attempt
        else None,
        "open_run": view.open_run is not None,
        "under_way": view.open_run is not None and view.open_run.under_way,
        "current_run": _open_document(view.open_run) if view.open_run else None,
        "last_snapshot": snapshot_document(last) if last else None,
        "last_snapshot_age_s": round((now - last.created_at).total_seconds(), 3) if last else None,
        "last_good_at": _instant(_last_good_at(view)),
        "snapshots_kept": None if view.snapshots is None else len(view.snapshots),
        "snapshots_bytes": None if view.snapshots is None else sum(s.size_bytes for s in view.snapshots),
        "freeze": _freeze_document(view),
        "trouble": view.trouble,
    }


def _last_good_at(view: InstanceView) -> datetime | None:
    """When its last snapshot was taken: as it is listed; where that can't be had, as the run log tells."""
    if view.snapshots is None:
        return view.last_good_at
    return view.snapshots[-1].created_at if view.snapshots else None


def _open_document(open_run: OpenRun) -> Document:
    run = open_run.run
    return {
        "run_id": run.run_id,
        "trigger": str(run.trigger),
        "started_at": format_instant(run.started_at),
        "max_freeze_s": run.max_freeze_s,
        "frozen_s": None if open_run.frozen_s is None else round(open_run.frozen_s, 3),
        "error": open_run.error,
    }


def _freeze_document(view: InstanceView) -> Document:
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


def snapshots_document(overview: Overview) -> Document:
    """What ``snapshots`` tells: those kept, and the instances whose snapshots can't be listed."""
    views = overview.instances
    return {
        "at": format_instant(overview.at),
        "instances": [view.instance_id for view in views],
        "problems": overview.problems,
        "unlisted": [_unlisted(view) for view in views if view.snapshots is None],
        "snapshots": [snapshot_document(s) for view in views for s in (*(view.snapshots or ()), *view.future)],
    }


def _unlisted(view: InstanceView) -> str:
    return f"{view.instance_id}: snapshots can't be listed: {view.trouble or 'a run of it is under way'}"


def snapshot_document(snapshot: Snapshot) -> Document:
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


def forecast_document(overview: Overview) -> Document:
    """What ``plan`` is worked out from. By whoever asks: a plan of a year would keep a daemon from its runs."""
    return {
        "at": format_instant(overview.at),
        "instances": [view.instance_id for view in overview.instances],
        "notes": [*overview.problems, *_warnings(overview)],
        "schedules": [
            {
                "schedule": schedule_document(view.schedule),
                "snapshots": [_bare(snapshot) for snapshot in view.snapshots or ()],
                "in_order": list(view.in_order),
                "over_budget": view.over_budget,
            }
            for view in overview.instances
            if view.schedule is not None
        ],
    }


def _bare(snapshot: Snapshot) -> Document:
    return {key: value for key, value in snapshot_document(snapshot).items() if key != "restore"}
