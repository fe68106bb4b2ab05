"""What will run, and what each run will prune."""

from collections.abc import Iterator
from datetime import datetime, timedelta
from itertools import islice

from attrs import define, field

from hypemand.core.forecast import PlannedRun, forecast
from hypemand.core.model import InstanceId
from hypemand.surface.report import InstanceView, Overview

MOST_RUNS = 2000
"""Planned runs of one schedule; more are not worked out."""


@define
class Plan:
    """Runs to come, in order, and the instances that have more than `MOST_RUNS`."""

    runs: list[tuple[InstanceId, PlannedRun]] = field(factory=list)
    cut: list[InstanceId] = field(factory=list)


def plan_runs(overview: Overview, *, now: datetime, within: timedelta) -> Plan:
    """The runs of enabled schedules until ``now + within``; where snapshots can't be listed, as if there were none.

    Schedules that the config wants, but which are not made before the daemon starts, count too.
    """
    plan = Plan()
    for view in overview.instances:
        if view.schedule is not None and view.schedule.settings.enabled:
            runs = list(islice(_runs(view, now, within), MOST_RUNS + 1))
            plan.runs += [(view.instance_id, run) for run in runs[:MOST_RUNS]]
            if len(runs) > MOST_RUNS:
                plan.cut.append(view.instance_id)
    plan.runs.sort(key=lambda pair: (pair[1].at, pair[0]))
    return plan


def _runs(view: InstanceView, now: datetime, within: timedelta) -> Iterator[PlannedRun]:
    assert view.schedule is not None
    return forecast(view.schedule, view.snapshots or (), now=now, within=within, made=view.in_order)
