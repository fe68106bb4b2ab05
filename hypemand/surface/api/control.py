"""What the commands ask the daemon, over the unix socket alone: documents from its own connections and memory."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import trio
from attrs import define, field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hypemand.core.model import Freezer, InstanceId, InstanceState, RunStarted, Snapshot
from hypemand.engine.engine import Engine
from hypemand.engine.events import Event, RunEnded, RunStepped, Step
from hypemand.state.codec import to_json
from hypemand.state.files import Disk
from hypemand.state.history import read_history
from hypemand.state.lock import LockOwner
from hypemand.state.scan import quarantine_notes
from hypemand.surface.client import FORMAT, FORMAT_HEADER
from hypemand.surface.documents import Document, forecast_document, snapshots_document, status_document
from hypemand.surface.known import OpenRun, State
from hypemand.surface.report import Overview, look
from hypemand.surface.views import AtWork, InstanceView

SETTLE_S = 5.0
"""How long `recover` waits for what is being settled."""


@define(eq=False)
class _Look:
    """A look that is about to be taken, for all who wait for it."""

    wanted: set[str] = field(factory=set)
    everything: bool = False
    overview: Overview | None = None

    def want(self, instance: str | None) -> None:
        if instance is None:
            self.everything = True
        else:
            self.wanted.add(instance)


@define(eq=False)
class Control:
    """Answers of a daemon that serves *engine*. Have it `hear` the engine's events, before runs begin.

    Instances that hypemand is at work on are not asked about: it knows their
    state itself, and a hypervisor serves one client at a time. One look is
    taken at a time; who asks meanwhile shares the next.

    Attributes:
        listed: The snapshots of an instance as they were listed last, for those.
        disk: Not the engine's: questions keep no write waiting.
        troubles: What stands in the way of clients of the API.
    """

    engine: Engine
    listed: Callable[[InstanceId], tuple[Snapshot, ...] | None] = lambda _: None
    disk: Disk = field(factory=Disk)
    troubles: Callable[[], Iterable[str]] = tuple
    _next: _Look = field(init=False, factory=_Look)
    _looking: trio.Lock = field(init=False, factory=trio.Lock)
    _paused_s: dict[str, float] = field(init=False, factory=dict)
    _touched: set[InstanceId] = field(init=False, factory=set)
    _ended: trio.Event = field(init=False, factory=trio.Event)

    def hear(self, event: Event) -> None:
        """Take in what happens in the engine."""
        if isinstance(event, RunStepped):
            self._touched.add(event.instance_id)
        match event:
            case RunStepped(step=Step.PAUSED):
                self._paused_s[event.run_id] = trio.current_time()
            case RunStepped(step=Step.BEGUN) if self._freezes_by_itself(event.run_id):
                self._paused_s[event.run_id] = trio.current_time()
            case RunStepped(step=Step.CAPTURED) if self._freezes_by_itself(event.run_id):
                self._paused_s.pop(event.run_id, None)
            case RunStepped(step=Step.RESUMED):
                self._paused_s.pop(event.run_id, None)
            case RunEnded():
                self._touched.add(event.run.instance_id)
                self._paused_s.pop(event.run.run_id, None)
                self._ended.set()
                self._ended = trio.Event()

    def _freezes_by_itself(self, run_id: str) -> bool:
        """Whether the guest stands still for as long as its hypervisor captures it."""
        run = self.engine.runlog.open_run(run_id)
        return run is not None and run.freezes is Freezer.HYPERVISOR

    async def overview(self, instance: str | None = None) -> Overview:
        """Everything about *instance*, or about all: what is known, and what the backends say now."""
        mine = self._next
        mine.want(instance)
        async with self._looking:
            if mine.overview is None:
                self._next = _Look()
                mine.overview = await self._look(None if mine.everything else mine.wanted)
            seen = mine.overview
        if instance is None:
            return seen
        return Overview(
            seen.state,
            seen.at,
            [view for view in seen.instances if view.instance_id == instance],
            seen.problems,
            seen.clock_doubts,
            seen.warnings,
        )

    async def _look(self, only: set[str] | None) -> Overview:
        engine = self.engine
        self._touched.clear()
        quarantine = await self.disk.call(_quarantine, engine.store.state_dir)
        overview = await look(
            self._state(quarantine),
            engine.config,
            fleet=engine.fleet,
            clock=engine.clock,
            watch=engine.watch,
            only=only,
            at_work=AtWork(self._is_at_work_on, self.listed),
        )
        for view in overview.instances:
            self._bring_up_to_date(view)
        return overview

    def _bring_up_to_date(self, view: InstanceView) -> None:
        """A guest whose run began or ended during the look may have been seen standing still for it."""
        if view.instance_id not in self._touched:
            return
        run = self.engine.runlog.open_run_of(view.instance_id)
        view.open_run = None if run is None else self._open_run(run)
        if view.open_run is not None and view.open_run.guest is not None:
            view.state = view.open_run.guest
        elif view.state == InstanceState.PAUSED:
            view.state = None

    def _is_at_work_on(self, instance: InstanceId) -> bool:
        engine = self.engine
        run = engine.runlog.open_run_of(instance)
        return instance in engine.scheduler.running or (run is not None and run.run_id in engine.recovery.settling)

    def _state(self, quarantine: tuple[str, ...]) -> State:
        engine = self.engine
        store, recorder = engine.store, engine.recorder
        return State(
            state_dir=store.state_dir,
            answered_by="daemon",
            owner=LockOwner("daemon", os.getpid()),
            schedules=dict(store.schedules),
            latest=recorder.latest,
            open_runs={run.instance_id: self._open_run(run) for run in engine.runlog.open_runs},
            freezes=recorder.freezes,
            order=recorder.order,
            used_backends=engine.used_backends,
            trouble=tuple(f"{bad.path}: {bad.problem}" for bad in store.unreadable),
            quarantine=quarantine,
            damaged=engine.runlog.damaged,
        )

    def _open_run(self, run: RunStarted) -> OpenRun:
        paused_s = self._paused_s.get(run.run_id)
        under_way = run in self._under_way()
        guest = None
        if under_way and run.freezes is not None:
            guest = InstanceState.RUNNING if paused_s is None else InstanceState.PAUSED
        return OpenRun(
            run=run,
            under_way=under_way,
            guest=guest,
            frozen_s=None if paused_s is None else trio.current_time() - paused_s,
            error=None if under_way else self.engine.recovery.why_open(run.run_id),
        )

    def _under_way(self) -> list[RunStarted]:
        """Open runs that their runner is at; the others are the recovery's."""
        ids = {progress.run_id for progress in self.engine.runner.active.values()}
        return [run for run in self.engine.runlog.open_runs if run.run_id in ids]

    async def history(self, instance: str | None) -> bytes:
        """A document of the finished lines as they stand in the run log; to read them as runs is left to who asked."""
        state_dir, schedules = self.engine.store.state_dir, self.engine.store.schedules
        known = instance is None or instance in schedules

        def read() -> bytes:
            history = read_history(state_dir, self.disk, None if instance is None else InstanceId(instance))
            rest = to_json({"damaged": history.damaged, "known": known})
            return b'{"runs":[' + b",".join(history.lines) + b"]," + rest[1:]

        return await self.disk.call(read)

    async def recover(self) -> Document:
        """Have open runs settled now, and wait a few seconds for them and for those under way."""
        engine = self.engine
        engine.recovery.handed_over.set()
        with trio.move_on_after(SETTLE_S):
            while self.engine.runlog.open_runs:
                await self._ended.wait()
        return {
            "pid": os.getpid(),
            "under_way": [_named(run) for run in self._under_way()],
            "left": [f"{_named(run)}: {engine.recovery.why_open(run.run_id) or 'no answer'}" for run in self._left()],
        }

    def _left(self) -> list[RunStarted]:
        under_way = self._under_way()
        return [run for run in self.engine.runlog.open_runs if run not in under_way]


def _quarantine(state_dir: Path) -> tuple[str, ...]:
    return tuple(quarantine_notes(state_dir))


def _named(run: RunStarted) -> str:
    return f"{run.instance_id}: run {run.run_id}"


def control_routes(control: Control) -> list[Route]:
    """The documents that the commands ask for; for those who may open the unix socket alone."""

    async def status(request: Request) -> Response:
        document = status_document(await control.overview(_instance(request)))
        document["problems"] = [*document["problems"], *control.troubles()]
        return _respond(to_json(document))

    async def forecast(request: Request) -> Response:
        return _respond(to_json(forecast_document(await control.overview(_instance(request)))))

    async def snapshots(request: Request) -> Response:
        return _respond(to_json(snapshots_document(await control.overview(_instance(request)))))

    async def history(request: Request) -> Response:
        return _respond(await control.history(_instance(request)))

    async def recover(_: Request) -> Response:
        return _respond(to_json(await control.recover()))

    return [
        Route("/control/status", status),
        Route("/control/forecast", forecast),
        Route("/control/snapshots", snapshots),
        Route("/control/history", history),
        Route("/control/recover", recover, methods=["POST"]),
    ]


def _respond(document: bytes) -> Response:
    return Response(document, media_type="application/json", headers={FORMAT_HEADER: FORMAT})


def _instance(request: Request) -> str | None:
    return request.query_params.get("instance")
