"""The promises as code: what may never happen to runs, slots and state. What is durable counts, nothing else."""

from collections import deque
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import trio
from attrs import define, field

from hypemand.core.model import InstanceId, RunStarted, Schedule
from hypemand.state.codec import Line
from hypemand.state.segments import LogContent

if TYPE_CHECKING:
    from tests.simulation.world import World

LATE_S = 1.0
SETTLED_S = 30.0
"""How long after a disturbance, or a start, a healthy schedule may be late."""
REMEMBERED = 25
Document = dict[str, Any]


@define(eq=False)
class Ledger:
    """Counts runs as the run log has them, durably."""

    world: "World"
    started: dict[str, Document] = field(factory=dict)
    finished: dict[str, Document] = field(factory=dict)
    open: dict[str, str] = field(factory=dict)
    grid_since: dict[str, float] = field(factory=dict)
    new_grids_at: float = 0.0
    used: dict[str, set[datetime]] = field(factory=dict)
    last: dict[str, datetime] = field(factory=dict)
    last_snapshot: dict[str, str] = field(factory=dict)
    acked: deque[tuple[str, str]] = field(factory=lambda: deque(maxlen=REMEMBERED))
    wished: dict[str, list[Schedule | None]] = field(factory=dict)
    latest_s: float = 0.0
    boot_with_lines: str = ""

    def has_open_run(self, instance: str) -> bool:
        return instance in self.open.values()

    def on_line(self, line: Document) -> None:
        """A line of the run log is durable now, or is found to be after a crash."""
        run_id, instance = line["run_id"], line["instance_id"]
        if (line["event"] == "finished" and run_id not in self.finished) or run_id not in self.started:
            self.world.trace(f"log: {instance} {run_id} {line.get('outcome', 'started')} due {line['due_at']}")
        if line["event"] == "started":
            if run_id not in self.started:
                self.boot_with_lines = line["boot_id"]
                self.started[run_id] = line
                self.open[run_id] = instance
                self._check_lateness(line)
        elif run_id not in self.finished:
            self.finished[run_id] = line
            if line["snapshot_id"]:
                self.last_snapshot[instance] = line["snapshot_id"]
            self.open.pop(run_id, None)
            self._check_slot(line)

    def twice(self, line: Document) -> None:
        self._fail(3, "a run has two finished lines", line["run_id"])

    def _fail(self, promise: int, rule: str, detail: str) -> None:
        self.world.oracle.fail(promise, rule, detail)

    # Promise 4

    def _check_lateness(self, line: Document) -> None:
        due_at, started_at = _instant(line["due_at"]), _instant(line["started_at"])
        late_s = (started_at - due_at).total_seconds()
        if line["instance_id"] != "control" or not self._is_quiet(late_s):
            return
        self.latest_s = max(self.latest_s, late_s)
        if late_s > LATE_S:
            self._fail(4, "a healthy schedule was late", f"{late_s:.2f} s, due {line['due_at']}")

    def _is_quiet(self, late_s: float) -> bool:
        """Whether nothing excuses a run that is *late_s* late now."""
        since = max(self.world.oracle.undisturbed_since, self.world.life.loaded_at)
        return trio.current_time() - late_s - since > SETTLED_S + self.world.interval_of("control") / 10

    # Promise 3

    def new_grid(self, instance: str | None = None) -> None:
        """From now on slots may lie elsewhere: the clock jumped (all), or the schedule of *instance* was edited."""
        if instance is None:
            self.new_grids_at = trio.current_time()
            self.last.clear()
            self.used.clear()
        else:
            self.grid_since[instance] = trio.current_time()
            self.last.pop(instance, None)
            self.used.pop(instance, None)

    def _check_slot(self, line: Document) -> None:
        if line["trigger"] == "manual":
            return  # beside the slots
        instance = line["instance_id"]
        due_at, now = _instant(line["due_at"]), self.world.clock.now()
        began_s = trio.current_time() - (now - _instant(self._began(line))).total_seconds()
        grid_since = max(self.grid_since.get(instance, 0.0), self.new_grids_at)
        due_s = trio.current_time() - (now - due_at).total_seconds()
        if min(began_s, due_s) <= grid_since or began_s > trio.current_time() or due_at > _instant(self._began(line)):
            return  # begun on an earlier grid, or under a clock that was ahead
        used = self.used.setdefault(instance, set())
        if line["outcome"] != "skipped":
            if due_at in used:
                self._fail(3, "a slot was used twice", f"{instance} due {due_at}")
            used.add(due_at)
        before, self.last[instance] = self.last.get(instance), due_at
        if len(self.wished.get(instance, [])) > 1:
            return  # whoever asked for another interval got no answer yet: either may hold
        interval = timedelta(seconds=self.world.interval_of(instance))
        # A file that is broken by hand, or read late, comes with a grid of its own, or with that of an edit before.
        was_broken = instance in self.world.expected_aside or self.world.life.reads_late
        if before is not None and not was_broken and (due_at - before) % interval:
            self._fail(3, "the grid was left", f"{instance} {before} {due_at} every {interval}")

    def _began(self, line: Document) -> str:
        return str(self.started.get(line["run_id"], line)["started_at"])

    # Promise 5

    def acknowledged(self, line: Line) -> None:
        """The engine was told that *line* is in the log."""
        key = ("started" if isinstance(line, RunStarted) else "finished", line.run_id)
        self.acked.append(key)
        if key not in self.world.platter.lines:
            self._fail(5, "a line of the run log was acknowledged that is not durable", f"{key}")

    def wish(self, schedule: Schedule | None, instance: str, *, acknowledged: bool) -> None:
        """Somebody put *schedule* over the API (None: deleted it); not acknowledged, it may or may not hold."""
        wished = self.wished.setdefault(instance, [None])
        if acknowledged:
            wished.clear()
        wished.append(schedule)

    def forget_wish(self, instance: str) -> None:
        self.wished.pop(instance, None)

    def check_log(self, content: LogContent) -> None:
        """A process has read the run log."""
        damaged = [place for place in content.damaged if not self._is_torn_end(place)]
        if damaged:
            self._fail(5, "a line that was written is damaged", "; ".join(damaged))
        there = {("started" if isinstance(line, RunStarted) else "finished", line.run_id) for line in content.lines}
        for key in self.acked:
            if key not in there:
                self._fail(5, "a line of the run log is lost", f"{key}")

    def _is_torn_end(self, place: str) -> bool:
        """Whether that is the end of an older segment: a rotation was undone, and a power cut undid that."""
        name, number, *_ = place.split(":")
        data = (self.world.platter.root / name).read_bytes()
        return not data.endswith(b"\n") and int(number) == len(data.splitlines())

    def check_schedules(self, schedules: Mapping[InstanceId, Schedule], unreadable: frozenset[str]) -> None:
        """A process has loaded its schedules."""
        for instance, wished in self.wished.items():
            if instance in unreadable:
                continue
            there = schedules.get(InstanceId(instance))
            if there is None and self.world.events.editors.may_have_ended(instance):
                continue
            allowed = [_essence(one) for one in wished]
            if _essence(there) not in allowed:
                self._fail(5, "a schedule that was acknowledged is lost", f"{instance}: {there}")

    # At the end

    def look_at_the_end(self) -> None:
        for run_id in self.started.keys() - self.finished.keys():
            self._fail(3, "a run has no finished line", f"{run_id} of {self.started[run_id]['instance_id']}")
        now = self.world.clock.now()
        latest: dict[str, datetime] = {}
        for line in self.finished.values():
            refused = "can't be interrupted" in (line["error"] or "")
            if line["outcome"] == "succeeded" or (line["outcome"] == "failed" and refused):
                at = _instant(line["started_at"])
                if at <= now:
                    latest[line["instance_id"]] = max(at, latest.get(line["instance_id"], at))
        for instance in self.world.should_run():
            within_s = self.world.interval_of(instance) * 1.1 + 60
            at = latest.get(instance, datetime.fromtimestamp(0, now.tzinfo))
            if (now - at).total_seconds() > within_s:
                self._fail(3, "a schedule does not run again within one interval", f"{instance}: last at {at}, {now}")


def _essence(schedule: Schedule | None) -> object:
    """What a user wanted of a schedule."""
    if schedule is None:
        return None
    return (schedule.interval, schedule.retention, dict(schedule.metadata), dict(schedule.extra), schedule.settings)


def _instant(text: str) -> datetime:
    return datetime.fromisoformat(text)
