"""The promises as code: what may never happen to guests and snapshots. What may never happen to runs is in `ledger`."""

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import trio
from attrs import define, field, frozen

from hypemand.core.model import Retention, Snapshot
from tests.simulation.hypervisor import OPERATOR, Hypervisor

if TYPE_CHECKING:
    from tests.simulation.world import World

SLACK_S = 1.0
"""What a freeze may take beyond its budget (promise 1)."""
RETRY_S = 1.5
"""What the engine waits between two tries to resume or to settle, and the answers take."""
SELDOM_S = 30.0
"""How seldom, at most, it is tried to settle a run of an earlier boot, which may not be ours to thaw any more."""
UNDER_WAY_S = 5.0
"""How long before it takes hold a deletion may have been asked for."""
GIVEN_UP_S = 700.0
"""After so long a deletion that hangs is given up, and the run goes on to its record."""
AHEAD = timedelta(minutes=5)
NOTICED = timedelta(seconds=35)
PROMISES = {
    1: "No guest stays frozen",
    2: "Nothing is deleted that a user might miss",
    3: "No run is lost silently",
    4: "One bad thing stays one bad thing",
    5: "State survives",
}
Guest = tuple[str, str]
"""A hypervisor and an instance."""


@frozen
class Violation:
    """A broken promise: its number, the rule, and the case."""

    promise: int
    rule: str
    detail: str

    def __str__(self) -> str:
        return f"promise {self.promise} ({PROMISES[self.promise]}): {self.rule}: {self.detail}"


@define
class Frozen:
    """A guest that stands still because of us."""

    run_id: str
    at: float
    budget_s: float
    boot: int


@define
class Deletion:
    """A snapshot that was deleted, by which life, and when. *cut_short*: that died before it could record it."""

    snapshot: Snapshot
    life: int
    at: float
    cut_short: bool = False


@define(eq=False)
class Oracle:
    """Sees all that really happens, and knows nothing of the engine's own reasons.

    Attributes:
        owner_since: Since when a process lives that has to thaw; infinite while there is none.
        undisturbed_since: Since when disk and wall clock are well and the loop runs.
    """

    world: "World"
    violation: Violation | None = None
    frozen: dict[Guest, Frozen] = field(factory=dict)
    trouble: dict[Guest, float] = field(factory=dict)
    owner_since: float = 0.0
    undisturbed_since: float = 0.0
    excused_pauses: set[str] = field(factory=set)
    true_created: dict[str, datetime] = field(factory=dict)
    misdated: set[str] = field(factory=set)
    published_ids: dict[str, str] = field(factory=dict)
    deletions: list[Deletion] = field(factory=list)
    longest_share: float = 0.0
    longest_over_s: float = 0.0
    freezes: int = 0
    by_wrong_clock: int = 0

    def fail(self, promise: int, rule: str, detail: str) -> None:
        """A promise is broken: the world ends here."""
        if self.violation is None:
            self.violation = Violation(promise, rule, detail)
            self.world.trace(f"VIOLATION {self.violation}")
            self.world.stop()

    # Promise 1

    def in_trouble(self, name: str, instance: str, until: float) -> None:
        """The hypervisor gives no answer, or a wrong one, for *instance*; infinite: it does not end yet."""
        self.trouble[name, instance] = until

    def lied(self, instance: str) -> None:
        self.excused_pauses.add(instance)

    def disturbed(self, why: str) -> None:
        """Disk, clock or loop are not well: lateness is no fault until a while after."""
        del why
        self.undisturbed_since = trio.current_time()

    def operator_paused(self, instance: str) -> None:
        """From here on the pause stays, unless a run was under way that can't tell it from its own."""
        self.excused_pauses.discard(instance)
        if self.world.ledger.has_open_run(instance):
            self.excused_pauses.add(instance)

    def paused(self, hypervisor: Hypervisor, instance: str, run_id: str) -> None:
        line = self.world.platter.lines.get(("started", run_id))
        if line is None:
            self.fail(1, "a pause before the started line is durable", f"{instance} run {run_id}")
            return
        if ("finished", run_id) in self.world.platter.lines:
            self.fail(1, "a pause for a run that is over", f"{instance} run {run_id}")
        if self.world.has_guard and run_id not in self.world.leased:
            self.fail(1, "a pause without a lease", f"{instance} run {run_id}")
        budget_s = float(str(line["max_freeze_s"]))
        self.frozen[hypervisor.name, instance] = Frozen(run_id, trio.current_time(), budget_s, self.world.boot)

    def resumed(self, hypervisor: Hypervisor, instance: str, paused_by: str | None) -> None:
        if paused_by == OPERATOR:
            if instance not in self.excused_pauses:
                self.fail(1, "an operator's pause was undone", instance)
            return
        thawed = self.frozen.pop((hypervisor.name, instance), None)
        if thawed is not None:
            self._measure(hypervisor.name, instance, thawed, "was")

    def _measure(self, name: str, instance: str, frozen: Frozen, was: str) -> None:
        now = trio.current_time()
        excuse = max(self.trouble.get((name, instance), 0.0), self.owner_since, self._busy_until(name, frozen))
        allowed = SLACK_S if excuse < frozen.at else SLACK_S + RETRY_S
        if frozen.boot != self.world.boot:
            allowed += SELDOM_S
        over_s = now - max(frozen.at + frozen.budget_s, excuse)
        if was == "was":
            self.freezes += 1
            if excuse < frozen.at:
                self.longest_share = max(self.longest_share, (now - frozen.at) / frozen.budget_s)
            self.longest_over_s = max(self.longest_over_s, over_s)
        if over_s > allowed:
            detail = f"{instance} {was} frozen for {now - frozen.at:.2f} s by {frozen.run_id}, {over_s:.2f} s too long"
            self.fail(1, "a guest stays frozen", detail)

    def _busy_until(self, name: str, frozen: Frozen) -> float:
        """Until when the hypervisor could not be interrupted."""
        hypervisor = self.world.hypervisors[name]
        capture = hypervisor.captures.get(frozen.run_id)
        if hypervisor.abortable or capture is None:
            return 0.0
        return min(capture.ends_at or capture.broke_off_at, trio.current_time())

    def look(self) -> None:
        """Look at the guests that stand still now."""
        for (name, instance), still in [*self.frozen.items()]:
            if not self.world.is_excused(name, instance):
                self._measure(name, instance, still, "is")

    # Promise 2

    def published(self, hypervisor: Hypervisor, snapshot: Snapshot, torn_by: str | None) -> None:
        if torn_by == "hypemand":
            self.fail(1, "a snapshot is listed whose guest was let run during the capture", snapshot.id)
        self.true_created[snapshot.id] = self.world.clock.true_now()
        self.published_ids[snapshot.id] = snapshot.instance_id
        if abs(snapshot.created_at - self.world.clock.true_now()) > timedelta(seconds=1):
            self.misdated.add(snapshot.id)

    def deleted(self, hypervisor: Hypervisor, snapshot: Snapshot, listed: list[Snapshot]) -> None:
        self.deletions.append(Deletion(snapshot, self.world.life.number, trio.current_time()))
        problem = self._why_not(hypervisor, snapshot, listed)
        if problem is not None:
            kept = [(one.max_count, str(one.max_age)) for one in self.world.retentions(snapshot.instance_id)]
            dated = f"{snapshot.id} of {snapshot.instance_id}, dated {snapshot.created_at}, kept {kept}"
            dated += f" of {[(s.id, str(s.created_at)) for s in listed]}"
            self.fail(2, problem, f"{dated}, now {self.world.clock.now()}, truly {self.world.clock.true_now()}")

    def _why_not(self, hypervisor: Hypervisor, snapshot: Snapshot, listed: list[Snapshot]) -> str | None:
        instance = snapshot.instance_id
        tags = snapshot.tags
        if tags.get("hypeman.scheduled") != "true" or tags.get("hypeman.schedule_instance_id") != instance:
            return "a snapshot was deleted that no schedule made"
        if not self.world.is_surely_gone(hypervisor, instance):
            ours = [s for s in listed if s.id in self.true_created]
            if ours and snapshot.id == max(ours, key=lambda s: self.true_created[s.id]).id:
                return "the newest snapshot was deleted"
            logged = self.world.ledger.last_snapshot.get(instance, snapshot.id)
            is_stale = self.true_created[logged] > self.true_created[snapshot.id]  # a start lays the log over the file
            if self.world.durable_last_snapshot(instance) == snapshot.id and not is_stale:
                return "the snapshot was deleted that the schedule's file names"
        if not any(self._is_expired(snapshot, listed, kept) for kept in self.world.retentions(instance)):
            return "a snapshot was deleted that its retention keeps"
        return None

    def _is_expired(self, snapshot: Snapshot, listed: list[Snapshot], kept: Retention) -> bool:
        clock = self.world.clock
        jumped_at = self.world.events.jumped_at
        by_another_clock = jumped_at is not None and trio.current_time() - jumped_at < UNDER_WAY_S
        dated = [s for s in listed if by_another_clock or s.created_at <= clock.now() + AHEAD]
        dated = [s for s in dated if self._is_scheduled(s)]
        if snapshot not in dated:
            return False
        by_date = {s.id for s in dated if (s.created_at, s.id) > (snapshot.created_at, snapshot.id)}
        by_truth = {s.id for s in dated if self.true_created[s.id] > self.true_created[snapshot.id]}
        # The run log tells in what order they were made, as far back as it goes; before that only dates do.
        if kept.max_count and len(by_date | by_truth) >= kept.max_count:
            return True
        if not kept.max_age:
            return False
        if clock.true_now() - self.true_created[snapshot.id] > kept.max_age - NOTICED:
            return True
        is_right = not clock.is_wrong and snapshot.id not in self.misdated
        if is_right or self.world.clock_is_suspicious(snapshot.instance_id):
            return False
        # The clock was wrong for longer than the design distrusts it, or was before the process began.
        self.by_wrong_clock += 1
        return clock.now() - snapshot.created_at > kept.max_age - NOTICED

    @staticmethod
    def _is_scheduled(snapshot: Snapshot) -> bool:
        return snapshot.tags.get("hypeman.scheduled") == "true"

    # At the end of the world, when all is well again

    def look_at_the_end(self) -> None:
        self.look()
        if self.frozen:
            self.fail(1, "a guest is frozen at the end", str(self.frozen))
        finished = self.world.ledger.finished
        for snapshot_id, instance in self.published_ids.items():
            line = finished.get(snapshot_id)
            if line is None or line.get("snapshot_id") != snapshot_id:
                self.fail(3, "a snapshot is listed that no run of the history names", f"{snapshot_id} of {instance}")
        self._look_at_deletions(finished)

    def died(self, life: int) -> None:
        """The process of *life* is dead; what its runs under way have deleted is in its log alone."""
        open_now = self.world.ledger.open.values()
        for deletion in self.deletions:
            recent = deletion.at > trio.current_time() - GIVEN_UP_S
            if deletion.life == life and (recent or deletion.snapshot.instance_id in open_now):
                deletion.cut_short = True

    def _look_at_deletions(self, finished: dict[str, dict[str, Any]]) -> None:
        reasons = {one["snapshot_id"]: one["reasons"] for line in finished.values() for one in line["pruned"]}
        errors: dict[str, list[str]] = {}
        for line in finished.values():
            if line["error"]:
                errors.setdefault(line["instance_id"], []).append(line["error"])
        for deletion in self.deletions:
            snapshot = deletion.snapshot
            told = any(snapshot.name in error for error in errors.get(snapshot.instance_id, []))
            if not reasons.get(snapshot.id) and not told and not deletion.cut_short:
                self.fail(2, "a deletion is not recorded", f"{snapshot.id} of {snapshot.instance_id}")
