"""Which snapshots instances have, for whoever must not wait for a hypervisor: told by runs, asked for now and then."""

import math
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from contextlib import suppress
from datetime import datetime, timedelta

import structlog
import trio
from attrs import define, field, frozen

from hypemand.core.errors import HypemandError
from hypemand.core.model import InstanceId, Snapshot
from hypemand.core.retention import scheduled_only
from hypemand.engine.engine import Engine
from hypemand.engine.fleet import UnknownBackendError
from hypemand.engine.limits import answer

ROUND_S = 60.0
"""From the end of one round of questions to the next."""
OLD_AFTER = timedelta(hours=1)
"""An answer is asked for again: somebody may have deleted snapshots by hand."""
ANSWER_S = 10.0
AT_A_TIME = 500
"""So many instances are looked through before runs that are due get their turn."""
_log = structlog.get_logger()


async def _in_pieces(instances: Iterable[InstanceId]) -> AsyncIterator[Sequence[InstanceId]]:
    """*instances* as they are now, some at a time: a hundred thousand at once would hold up runs."""
    of_now = [*instances]
    for start in range(0, len(of_now), AT_A_TIME):
        yield of_now[start : start + AT_A_TIME]
        await trio.lowlevel.checkpoint()


@frozen
class _Answer:
    """What is known of an instance's snapshots (None: nothing), since when, and when to ask again; boot-time clock."""

    snapshots: tuple[Snapshot, ...] | None
    at_s: float
    again_s: float


@define(eq=False)
class KeptSnapshots:
    """The scheduled snapshots of each instance with a schedule, as they were told last."""

    _engine: Engine
    _answers: dict[InstanceId, _Answer] = field(factory=dict)

    def heard(self, instance: InstanceId, snapshots: tuple[Snapshot, ...] | None) -> None:
        """Take in what a backend told; None: it could not tell, and what it told before counts no longer."""
        at_s = self._engine.clock.boot_s()
        lasts_s = 0.0 if snapshots is None else OLD_AFTER.total_seconds()
        self._answers[instance] = _Answer(snapshots, at_s, at_s + lasts_s)

    def of(self, instance: InstanceId) -> tuple[Snapshot, ...] | None:
        """The snapshots of *instance*; None where they are not known."""
        known = self._answers.get(instance)
        return None if known is None else known.snapshots

    def made_at(self, instance: InstanceId, snapshot_id: str) -> datetime | None:
        """When that snapshot was made; None where it is not known, or not there."""
        return next((s.created_at for s in self.of(instance) or () if s.id == snapshot_id), None)

    async def keep_asking(self) -> None:
        """Ask for what is not known, or known for long. Each backend by itself: one that hangs holds up no other."""
        await self._engine.scheduler.serving.wait()
        busy: set[str] = set()
        async with trio.open_nursery() as nursery:
            while True:
                for backend, instances in (await self._to_ask()).items():
                    if backend not in busy:
                        busy.add(backend)
                        nursery.start_soon(self._ask_each, backend, instances, busy)
                await trio.sleep(ROUND_S)

    async def _to_ask(self) -> dict[str, list[InstanceId]]:
        """Instances by backend, those first that were not asked about for longest."""
        schedules, boot_s = self._engine.store.schedules, self._engine.clock.boot_s()
        if len(self._answers) > len(schedules):
            await self._forget_gone()
        answers, to_ask = self._answers, list[InstanceId]()
        async for some in _in_pieces(schedules):
            to_ask += [i for i in some if (known := answers.get(i)) is None or known.again_s <= boot_s]
        return await self._by_backend(sorted(to_ask, key=self._asked_at_s))

    def _asked_at_s(self, instance: InstanceId) -> float:
        known = self._answers.get(instance)
        return -math.inf if known is None else known.at_s

    async def _forget_gone(self) -> None:
        async for some in _in_pieces(self._answers):
            for instance in some:
                if instance not in self._engine.store.schedules:
                    self._answers.pop(instance, None)

    async def _by_backend(self, instances: Iterable[InstanceId]) -> dict[str, list[InstanceId]]:
        schedules, to_ask = self._engine.store.schedules, dict[str, list[InstanceId]]()
        async for some in _in_pieces(instances):
            for instance in some:
                schedule = schedules.get(instance)
                if schedule is not None:
                    with suppress(UnknownBackendError):
                        to_ask.setdefault(self._engine.fleet.resolve(schedule.backend), []).append(instance)
        return to_ask

    async def _ask_each(self, backend: str, instances: Collection[InstanceId], busy: set[str]) -> None:
        for instance in instances:
            began = trio.current_time()
            # A run tells by itself what came of it, and is not to be held up by questions.
            if instance in self._engine.store.schedules and instance not in self._engine.runner.active:
                await self._ask(backend, instance)
            if trio.current_time() - began >= ANSWER_S:
                break  # where a filesystem hangs each question may cost a thread; next time the others come first
        busy.discard(backend)

    async def _ask(self, name: str, instance: InstanceId) -> None:
        before, told = self._answers.get(instance), None
        try:
            async with self._engine.fleet.lease(name) as backend:
                listed = await answer("list", ANSWER_S, lambda: backend.list_snapshots(instance))
                told = tuple(scheduled_only(instance, listed))
        except HypemandError as error:
            _log.debug("snapshots not counted", instance_id=instance, error=str(error))
        except Exception as error:  # noqa: BLE001 - a bug in one backend stops no other
            _log.exception("internal error of a backend", backend=name, error=str(error))
        if self._answers.get(instance) is before:  # else a run has told meanwhile, and knows better
            self.heard(instance, told)
