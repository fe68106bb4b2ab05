"""What there is to tell of one instance at one moment, from what the engine knows by itself: nobody is asked."""

from datetime import datetime

from attrs import frozen

from hypemand.core.cadence import stale_after
from hypemand.core.model import Outcome, RunFinished, Schedule, Snapshot
from hypemand.engine.engine import Engine
from hypemand.surface.metrics.kept import KeptSnapshots
from hypemand.surface.metrics.tallies import Tally


@frozen(kw_only=True)
class Sight:
    """One instance with a schedule, at *now*.

    Attributes:
        last_run: None where there was none, or where the run log has lost it.
        last_good_at: When the last good snapshot was made, as far as that is known.
        snapshots: None where they are not known.
    """

    schedule: Schedule
    now: datetime
    max_freeze_s: float
    last_run: RunFinished | None
    last_good_at: datetime | None
    snapshots: tuple[Snapshot, ...] | None
    tally: Tally

    @property
    def stale_after_s(self) -> float:
        """How old the last good snapshot may become."""
        return stale_after(self.schedule.instance_id, self.schedule.interval).total_seconds()

    @property
    def last_failed(self) -> bool | None:
        """Whether the last run did not end well; None where there was none."""
        if self.last_run is not None:
            return self.last_run.outcome is not Outcome.SUCCEEDED
        return None if self.schedule.last_run_at is None else self.schedule.last_error is not None

    def since(self, at: datetime | None) -> float | None:
        """Seconds from *at* until now; not less than 0, whatever the clock did."""
        return None if at is None else max(0.0, (self.now - at).total_seconds())


def see(engine: Engine, schedule: Schedule, kept: KeptSnapshots, tally: Tally, now: datetime) -> Sight:
    """Look at *schedule* as it is *now*."""
    budget = schedule.settings.max_freeze or engine.config.runs.max_freeze
    return Sight(
        schedule=schedule,
        now=now,
        max_freeze_s=budget.total_seconds(),
        last_run=engine.recorder.latest.of(schedule),
        last_good_at=_last_good_at(engine, schedule, kept),
        snapshots=kept.of(schedule.instance_id),
        tally=tally,
    )


def _last_good_at(engine: Engine, schedule: Schedule, kept: KeptSnapshots) -> datetime | None:
    """The run log has it, but for a run that is still pruning, and for one so old that it was rotated away."""
    if schedule.last_snapshot_id is None:
        return None
    made = engine.recorder.latest.that_made(schedule)
    if made is not None:
        return made.started_at
    listed_at = kept.made_at(schedule.instance_id, schedule.last_snapshot_id)
    if listed_at is not None:
        return listed_at
    return schedule.last_run_at if schedule.last_error is None else None
