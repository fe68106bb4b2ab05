"""Bugs seeded on purpose: each breaks the product in one place, and the simulation has to find it."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import trio
from attrs import evolve, frozen

from hypemand.backends.base import Backend, BackendUnavailable
from hypemand.core import retention, runstate
from hypemand.core.model import Freezer, InstanceState, RunFinished, RunStarted
from hypemand.core.runstate import Steps
from hypemand.engine import capture, pruning
from hypemand.engine.capture import Attempt
from hypemand.engine.clock import ClockWatch
from hypemand.engine.freeze import Freeze
from hypemand.state.files import Disk
from hypemand.state.runlog import RunLog
from hypemand.state.segments import LogContent, read_log
from tests.simulation.world import World

Bug = AbstractContextManager[None]


@frozen
class Seeded:
    """A bug, the promises that it breaks, what the invariants that find it say, and the first seed to search it in."""

    make: Callable[[], Bug]
    promises: tuple[int, ...]
    rules: tuple[str, ...]
    seed: int = 1


@contextmanager
def _patched(where: Any, name: str, new: Any) -> Iterator[None]:
    with patch.object(where, name, new):
        yield


def resume_without_shield() -> Bug:
    """A cancellation or a failure in the capture leaves the guest frozen."""

    async def frozen_capture(self: Freeze, request: Any, slot: Any) -> Any:
        if not self.steps.pauses:
            return await self._timed_capture(request, self.budget.capture_timeout_s)
        async with self._leased(request.run_id):
            await self._check_running()
            began = trio.current_time()
            await self._pause(request)
            captured = await self._timed_capture(request, self._time_left(began))
            await self._thaw(slot, began)
            return captured

    return _patched(Freeze, "_frozen_capture", frozen_capture)


def resume_once() -> Bug:
    """A resume that fails is not tried again."""

    async def thaw(self: Freeze, slot: Any, began: float) -> None:
        failure = await self._try_resume()
        if failure is not None:
            self.record.thaw_failures.append(failure)

    return _patched(Freeze, "_thaw", thaw)


def freeze_before_the_claim() -> Bug:
    """The started line is written while the guest stands still already."""
    original = Attempt._claim

    async def claim(self: Attempt, found: Any, ready: Any) -> RunStarted:
        runlog = self.means.runlog
        append = runlog.append

        async def later(line: Any) -> None:
            async def write() -> None:
                await trio.sleep(0.5)
                await append(line)

            self.means.beside._background.start_soon(write)

        with patch.object(runlog, "append", later):
            return await original(self, found, ready)

    return _patched(Attempt, "_claim", claim)


def no_sync_of_the_run_log() -> Bug:
    """Lines of the run log are written, and not made durable."""

    def write(self: RunLog, data: bytes) -> None:
        if not self._in_place():
            self._reopen()
            data = self._carried() + data
        elif os.fstat(self._descriptor).st_size != self._size:
            self._cut_back()
        self._disk.write(self._descriptor, data)
        self._size += len(data)

    return _patched(RunLog, "_write", write)


def no_sync_of_replaced_files() -> Bug:
    """A schedule's file is renamed into place before its content is durable."""
    replace_all = Disk.replace_all

    def unsynced(self: Disk, files: Any) -> Any:
        with patch.object(type(self), "sync", lambda *_: None):
            return replace_all(self, files)

    return _patched(Disk, "replace_all", unsynced)


def future_snapshots_count() -> Bug:
    """A snapshot dated in the future counts as the newest."""
    return _patched(retention, "CLOCK_SLACK", retention.CLOCK_SLACK * 10**6)


def nothing_is_protected() -> Bug:
    """Pruning goes by the retention alone, and not from the newest on."""
    select = retention.select_expired

    def unprotected(snapshots: Any, kept: Any, *, now: Any, protected: Any, made: Any = ()) -> Any:
        del protected
        if kept.max_count:
            kept = evolve(kept, max_count=max(1, kept.max_count - 1))
        return select(snapshots, kept, now=now, protected=(), made=made)

    return _patched(pruning, "select_expired", unprotected)


def every_clock_is_trusted() -> Bug:
    """Pruning by age goes on after a jump of the clock."""
    return _patched(ClockWatch, "why_age_waits", lambda self, interval: None)


def torn_end_is_kept() -> Bug:
    """What a crash left of a line stays at the end of the run log."""

    def open_blocking(self: RunLog) -> LogContent:
        content = read_log(self._state_dir, self._disk)
        self._reopen(0)
        return content

    return _patched(RunLog, "_open_blocking", open_blocking)


def finished_twice() -> Bug:
    """A run that was interrupted gets its finished line each time that it is settled."""
    append = RunLog.append

    async def twice(self: RunLog, line: Any) -> None:
        await append(self, line)
        if isinstance(line, RunFinished) and line.outcome == "interrupted":
            await append(self, line)

    return _patched(RunLog, "append", twice)


@contextmanager
def every_pause_is_ours() -> Iterator[None]:
    """A guest that is found paused is taken for one that runs, and its pause, in the end, for our own."""
    decide = runstate.decide_steps

    def lenient(state: InstanceState, freezer: Freezer, detail: str = "") -> Steps:
        return decide(InstanceState.RUNNING if state is InstanceState.PAUSED else state, freezer, detail)

    async def check_running(_: Freeze) -> None:
        await trio.lowlevel.checkpoint()

    with patch.object(capture, "decide_steps", lenient), patch.object(Freeze, "_check_running", check_running):
        yield


def guard_beside_a_living_owner() -> Bug:
    """The guard takes a slow daemon for a dead one, and settles its runs while it still works."""

    async def live(self: World, role: str) -> None:
        if role == "daemon":
            self.nursery.start_soon(_second_owner, self)
        await original(self, role)

    original = World._live
    return _patched(World, "_live", live)


async def _second_owner(world: World) -> None:
    await trio.sleep(0.01)
    life = world.life
    while not life.dead and not world.chaos.calm:
        await trio.sleep(0.5)
        if life.engine is None or not life.serves or life.hung is not None:
            continue
        for run in life.engine.runlog.open_runs:
            backend: Backend = life._fleet()._connect(run.backend, run.connection)
            try:
                await backend.settle(run, ours=True)
            except BackendUnavailable:
                continue
            except BaseException:  # noqa: BLE001 - the process died in it
                return


FROZEN = "stays frozen"
NOT_DURABLE = "acknowledged that is not durable"
RETENTION_KEEPS = "its retention keeps"
BUGS: dict[str, Seeded] = {
    "resume without a shield": Seeded(resume_without_shield, (1,), (FROZEN, "is frozen at the end")),
    "resume once": Seeded(resume_once, (1,), (FROZEN, "is frozen at the end")),
    "freeze before the claim": Seeded(freeze_before_the_claim, (1,), ("before the started line is durable",)),
    "no sync of the run log": Seeded(no_sync_of_the_run_log, (5,), (NOT_DURABLE,)),
    "no sync of replaced files": Seeded(
        no_sync_of_replaced_files, (5,), ("in quarantine", "schedule that was acknowledged is lost")
    ),
    "future snapshots count": Seeded(future_snapshots_count, (2,), (RETENTION_KEEPS,)),
    "nothing is protected": Seeded(nothing_is_protected, (2,), (RETENTION_KEEPS, "newest", "file names")),
    "every clock is trusted": Seeded(every_clock_is_trusted, (2,), (RETENTION_KEEPS, "newest")),
    "torn end is kept": Seeded(torn_end_is_kept, (5,), (NOT_DURABLE, "is damaged", "is lost")),
    "finished twice": Seeded(finished_twice, (3,), ("two finished lines",)),
    "every pause is ours": Seeded(every_pause_is_ours, (1,), ("an operator's pause was undone",), seed=13),
    "guard beside a living owner": Seeded(
        guard_beside_a_living_owner, (1,), ("was let run during the capture", "operator's pause")
    ),
}
