"""What will run, and what each run will prune."""

from datetime import datetime, timedelta

from hypemand.core.forecast import PlannedRun, forecast
from hypemand.surface.report import InstanceView, Overview


def planned_runs(overview: Overview, *, now: datetime, within: timedelta) -> list[tuple[InstanceView, PlannedRun]]:
    """The runs of enabled schedules until ``now + within``, in order.

    Where snapshots can't be listed, as if there were none.
    """
    planned = [
        (view, run)
        for view in overview.instances
        if view.schedule is not None and view.schedule.settings.enabled
        for run in forecast(view.schedule, view.snapshots or (), now=now, within=within)
    ]
    return sorted(planned, key=lambda pair: (pair[1].at, pair[0].instance_id))
