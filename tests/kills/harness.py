"""One kill, from the slot that comes due to the look at what is left."""

import random
import signal
from datetime import UTC, datetime, timedelta
from time import monotonic

import trio
from attrs import define, field, frozen

from tests.kills import checks
from tests.kills.checks import Finding
from tests.kills.grounds import GUESTS, KEPT, Ground
from tests.kills.places import GUEST, OPERATORS, By, How, Kill, Note, Relapse, Trigger
from tests.kills.processes import Victim, all_gone, slow_machine_s, victim
from tests.processes import instant, run_cli, running_daemon

MAX_FREEZE = {How.KILLED: 30.0, How.STOPPED: 2.0, How.BLOCKED: 2.0}
"""Freeze budgets, seconds: for a daemon that hangs the guard waits until then."""
THAWED_WITHIN_S = 3.0
"""After the death, or the end of the budget; a second on an idle machine."""
SETTLED_WITHIN_S = 40.0
HANG_S = 0.5
"""How long a daemon hangs that holds nobody frozen."""


@frozen
class Outcome:
    """What came of a kill.

    Attributes:
        late: The step was over before the instant inside it that was meant.
        thawed_s: From the death, or where the guard had to kill it from its hanging, until the guest ran; None if it
            ran all the time.
        freeze_s: What the history says.
    """

    kill: Kill
    ground: str
    findings: tuple[Finding, ...]
    late: bool = False
    thawed_s: float | None = None
    freeze_s: float | None = None

    @property
    def budget_s(self) -> float:
        return MAX_FREEZE[self.kill.how]


@define
class Harness:
    """Kills daemons on one ground, one after the other. A place that is not reached in *patience_s* is a finding."""

    ground: Ground
    rng: random.Random
    patience_s: float = 60.0
    count: int = 0
    _last_due: datetime = field(init=False)

    async def set_up(self) -> None:
        """Have as many snapshots as are kept, so that each further run deletes one; then no daemon runs."""
        lab = self.ground.lab
        self._last_due = datetime.now(UTC).replace(microsecond=0) - timedelta(days=60)
        self.ground.write_config(guard=False, max_freeze="30s")
        async with running_daemon(lab.config) as daemon:
            for instance in GUESTS:
                await daemon.wait_for("schedule made", instance_id=instance)
        for times in range(1, KEPT + 1):
            self._make_due()
            async with running_daemon(lab.config) as daemon:
                await daemon.wait_for("snapshot taken", instance_id=GUEST)
                await lab.recorded(times)
                await daemon.stop()

    def _make_due(self) -> datetime:
        """Have runs due when the next daemon starts, by a hand edit. A slot that nobody has used yet stays as it is."""
        lab, now = self.ground.lab, datetime.now(UTC)
        due_at = checks.effective_next_run_at(self.ground)
        if due_at > now:
            due_at = self._another_slot(now)
            lab.edit(GUEST, next_run_at=instant(due_at))
        if checks.effective_next_run_at(self.ground, OPERATORS) > now:
            lab.edit(OPERATORS, next_run_at=instant(self._another_slot(now)))
        return due_at

    def _another_slot(self, now: datetime) -> datetime:
        """One that no run has used, on a grid that nothing comes due on while we look."""
        self._last_due += timedelta(seconds=self.rng.randrange(1, 1500))
        while not timedelta(minutes=5) < (now - self._last_due) % timedelta(hours=1) < timedelta(minutes=50):
            self._last_due += timedelta(minutes=5)
        return self._last_due

    async def kill(self, kill: Kill) -> Outcome:
        """Have a daemon come to harm, settle it as *kill* says, and look."""
        self.count += 1
        directory = self.ground.lab.directory
        max_freeze_s = MAX_FREEZE[kill.how]
        self.ground.write_config(guard=kill.by.has_guard, max_freeze=f"{max_freeze_s:g}s")
        due_at = self._make_due()
        blocks_s = max_freeze_s + 20 if self._holds_lease(kill) else HANG_S
        how = How.STOPPED if kill.operator else kill.how
        trigger = Trigger(kill.step, kill.phase, how, kill.after_s, blocks_s, directory / f"victim-{self.count}.log")
        async with victim(self.ground.lab.config, trigger) as harmed:
            told = await harmed.harmed(self.patience_s)
            if told is None:
                return self._outcome(kill, [Finding(checks.FAILED, f"{kill.step} was never reached: {harmed.log}")])
            after = _Aftermath(self.ground, kill, due_at, harmed, told)
            await after.come_to_its_end()
        found = [*after.found, *await checks.findings(self.ground, due_at, paused=kill.operator)]
        run = checks.run_due_at(self.ground, due_at)
        told_how_long = kill.relapse is not None or bool(run and run["freeze_s"])
        if after.thawed_s is not None and self.ground.engine_freezes and not told_how_long:
            found.append(Finding(checks.LOST, f"the guest was found frozen, and the history does not say so: {run}"))
        if kill.operator:
            await self.ground.resume_as_operator()
        return self._outcome(kill, found, told.late, after.thawed_s, run["freeze_s"] if run else None)

    def _holds_lease(self, kill: Kill) -> bool:
        return kill.holds_lease and self.ground.engine_freezes

    def _outcome(
        self,
        kill: Kill,
        found: list[Finding],
        late: bool = False,  # noqa: FBT002 - of a victim's note
        thawed_s: float | None = None,
        freeze_s: float | None = None,
    ) -> Outcome:
        return Outcome(kill, self.ground.name, tuple(found), late, thawed_s, freeze_s)

    async def next_slot_works(self) -> list[Finding]:
        """Run an unharmed daemon: each run that was due is done once, one more succeeds, and retention holds again."""
        self.ground.write_config(guard=False, max_freeze="30s")
        due_at = self._make_due()
        try:
            await self._one_run()
        except AssertionError as error:
            return [Finding(checks.FAILED, str(error))]
        found = await checks.findings(self.ground, due_at)
        if (left := len(self.ground.listed())) != KEPT:
            found.append(Finding(checks.FAILED, f"{left} snapshots are left, not {KEPT}"))
        if checks.run_due_at(self.ground, due_at) is None:
            found.append(Finding(checks.LOST, f"the run due at {due_at} is not in the history"))
        return found

    async def _one_run(self) -> None:
        lab = self.ground.lab
        before = len(lab.history(GUEST))  # counted now: the daemon's log is ahead of its run log
        async with running_daemon(lab.config) as daemon:
            with trio.move_on_after(self.patience_s) as patience:
                await daemon.wait_for("snapshot taken", instance_id=GUEST)
                await daemon.wait_for("run failed", instance_id=OPERATORS)
                await lab.recorded(before + 1)
                await daemon.stop()
            assert not patience.cancelled_caught, f"no snapshot within {self.patience_s} s"


@define
class _Aftermath:
    """From the harm to the end of all that settles it."""

    ground: Ground
    kill: Kill
    due_at: datetime
    victim: Victim
    note: Note
    found: list[Finding] = field(factory=list)
    thawed_s: float | None = None

    async def come_to_its_end(self) -> None:
        if self.kill.operator:
            await self.victim.until("T", "Z")
            await self.ground.pause_as_operator()
            self.victim.send(signal.SIGKILL)
        elif self.kill.how is How.KILLED:
            pass
        elif self.kill.by.has_guard:
            return await self._outlast_the_hang()
        else:
            await trio.sleep(HANG_S)
            self.victim.send(signal.SIGKILL)
        if not await self.victim.gone(THAWED_WITHIN_S):
            self.found.append(Finding(checks.HELD, "the victim outlived its SIGKILL"))
        if self.kill.by is By.RECOVER:
            return await self._recover()
        async with trio.open_nursery() as nursery:
            if self.kill.by is By.BOTH:
                nursery.start_soon(self._recover_beside)
                nursery.start_soon(self._recover_beside)
            elif self.kill.by is By.RESTART:
                nursery.start_soon(self._restart)
            if self.kill.by.has_guard:
                await self._guarded(self.note.at, THAWED_WITHIN_S)
        return None

    async def _recover_beside(self) -> None:
        ran = await run_cli("recover", "-c", self.ground.lab.config)
        if ran.status != 0:
            self.found.append(Finding(checks.OPEN, f"recover beside the guard exits {ran.status}: {ran.stderr}"))

    async def _restart(self) -> None:
        """What systemd does: another daemon at once, which does the run that is due, if the first did not begin it."""
        async with running_daemon(self.ground.lab.config) as daemon:
            with trio.move_on_after(SETTLED_WITHIN_S) as patience:
                while checks.run_due_at(self.ground, self.due_at) is None:
                    await trio.sleep(0.02)
                await daemon.wait_for("next run")
                daemon.send(signal.SIGTERM)
                if (status := await daemon.process.wait()) != 0:
                    self.found.append(Finding(checks.FAILED, f"the next daemon exits {status}: {daemon.log}"))
            if patience.cancelled_caught:
                self.found.append(Finding(checks.LOST, f"the next daemon does not see to the run: {daemon.log}"))

    async def _recover(self) -> None:
        began = monotonic()
        was_running = await self._runs()
        if self.kill.relapse is not None:
            await self._relapse(self.kill.relapse)
        ran = await run_cli("recover", "-c", self.ground.lab.config)
        if ran.status != 0:
            self.found.append(Finding(checks.OPEN, f"recover exits {ran.status}: {ran.stdout}{ran.stderr}"))
        if not was_running and await self._runs():
            self.thawed_s = monotonic() - began
        await self._nobody_left(within_s=THAWED_WITHIN_S)

    async def _relapse(self, place: Relapse) -> None:
        log = self.victim.log.with_name(f"{self.victim.log.stem}-recover.log")
        trigger = Trigger(place.step, place.phase, How.KILLED, place.after_s, 0.0, log)
        async with victim(self.ground.lab.config, trigger, "recover") as first:
            if await first.harmed(SETTLED_WITHIN_S) is None and first.process.poll() is None:
                self.found.append(Finding(checks.HELD, f"recover does not end: {log}"))

    async def _outlast_the_hang(self) -> None:
        """The guard ends what hangs while it holds a guest frozen; what hangs elsewhere goes on when it can."""
        budget_s = MAX_FREEZE[self.kill.how]
        if self.kill.holds_lease and self.ground.engine_freezes:
            within_s = max(budget_s + THAWED_WITHIN_S, await slow_machine_s())
            if not await self.victim.gone(within_s):
                self.found.append(Finding(checks.FROZEN, "the guard did not kill a daemon that hangs over a freeze"))
            return await self._guarded(self.note.at, budget_s + THAWED_WITHIN_S)
        await trio.sleep(HANG_S)
        await self._thawed(self.note.at, budget_s + THAWED_WITHIN_S)
        if self.victim.process.poll() is not None:  # it held a lease after all, and too long
            return await self._guarded(self.note.at, budget_s + THAWED_WITHIN_S)
        self.victim.send(signal.SIGCONT)
        await self._goes_on()
        return None

    async def _goes_on(self) -> None:
        """The run that hung ends as if it had not."""
        with trio.move_on_after(SETTLED_WITHIN_S) as patience:
            while not self._all_recorded():
                await trio.sleep(0.02)
        if patience.cancelled_caught:
            self.found.append(Finding(checks.LOST, f"the run that hung does not end: {self.victim.log}"))
        elif (run := checks.run_due_at(self.ground, self.due_at)) is None or run["outcome"] != "succeeded":
            self.found.append(Finding(checks.FAILED, f"the run that hung ends as {run}"))
        self.victim.send(signal.SIGTERM)
        if not await self.victim.gone(SETTLED_WITHIN_S) or self.victim.process.returncode != 0:
            self.found.append(Finding(checks.HELD, f"exit status {self.victim.process.returncode} after a hang"))
        await self._nobody_left(within_s=THAWED_WITHIN_S)

    def _all_recorded(self) -> bool:
        run = checks.run_due_at(self.ground, self.due_at)
        return run is not None and self.ground.lab.schedule(GUEST).get("last_run_at") == run["started_at"]

    async def _guarded(self, since: float, within_s: float) -> None:
        await self._thawed(since, within_s)
        await self._nobody_left(within_s=SETTLED_WITHIN_S)

    async def _thawed(self, since: float, within_s: float) -> None:
        """Look until the guest runs; one that runs at the first look was not frozen."""
        frozen = False
        while not await self._runs():
            frozen = True
            if monotonic() - since > SETTLED_WITHIN_S:
                return  # it is found frozen by the checks
            await trio.sleep(0.01)
        if frozen:
            self.thawed_s = monotonic() - since
            if self.ground.engine_freezes and self.thawed_s > max(within_s, await slow_machine_s()):
                text = f"{self.thawed_s:.2f} s after the harm, {within_s} s are allowed"
                self.found.append(Finding(checks.LATE, text))

    async def _runs(self) -> bool:
        return self.kill.operator or await self.ground.state() == "running"

    async def _nobody_left(self, *, within_s: float) -> None:
        left = await all_gone(self.victim.log, self.note.children, within_s)
        if left:
            self.found.append(Finding(checks.HELD, f"processes {left} are left"))
