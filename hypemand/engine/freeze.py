"""From pause to resume. Whatever happens in between, the guest runs again.

No disk write of hypemand's own may stand between the two.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
import trio
from attrs import define, evolve, field, frozen

from hypemand.backends.base import Backend, Captured, CaptureFailed, CaptureRequest, InstanceNotFound, InvalidState
from hypemand.core.errors import HypemandError
from hypemand.core.model import Freezer, InstanceId, InstanceState
from hypemand.core.runstate import Steps
from hypemand.engine.beside import Beside
from hypemand.engine.events import Step, TellStep, tell_nobody
from hypemand.engine.leases import Leases
from hypemand.engine.limits import Patience, answer
from hypemand.engine.slots import Slot

_log = structlog.get_logger()


TELL_EVERY = 20
"""Of so many failed tries to resume a guest, one is logged."""
THAW_WITHIN_S = 600.0
"""How long past its budget a guest is tried to be resumed by its own run, before the recovery takes over."""
_NOT_FROZEN = frozenset(
    {
        InstanceState.RUNNING,
        InstanceState.STOPPED,
        InstanceState.SHUTDOWN,
        InstanceState.STANDBY,
        InstanceState.CREATED,
    }
)


class StillFrozenError(HypemandError):
    """The guest could not be resumed in time. The run stays open, to be settled."""


@define
class FreezeRecord:
    """What a freeze came to: how long, and what went wrong with the resume.

    Attributes:
        pause_unclear: The pause got no answer; it may still take hold after the resume.
        pause_refused: The guest was not touched; a pause that it may be in is somebody else's, and not undone.
        capture_began: On trio's clock.
        capture_s: From then until the snapshot was whole, or was given up.
    """

    freeze_s: float | None = None
    pause_unclear: bool = False
    pause_refused: bool = False
    capture_began: float | None = None
    capture_s: float | None = None
    thaw_failures: list[str] = field(factory=list)

    def measured(self, freeze_s: float | None) -> None:
        """Take *freeze_s* where the hypervisor measured it: that is nearer to the guest than our own measure."""
        if freeze_s is not None:
            self.freeze_s = freeze_s

    def thaw_note(self) -> str | None:
        """What the failed tries to resume were, or None."""
        if not self.thaw_failures:
            return None
        tries = len(self.thaw_failures)
        return f"resume failed {tries} time{'s' * (tries > 1)} before it held: {self.thaw_failures[-1]}"


@frozen
class Budget:
    """Longest freeze and longest capture, in seconds."""

    max_freeze_s: float
    capture_timeout_s: float


@frozen
class Freeze:
    """One capture of one instance, frozen and thawed."""

    backend: Backend
    instance: InstanceId
    steps: Steps
    budget: Budget
    patience: Patience
    leases: Leases
    give_up: trio.Event
    record: FreezeRecord = field(factory=FreezeRecord)
    tell: TellStep = tell_nobody

    async def capture(self, request: CaptureRequest, slot: Slot, beside: Beside) -> Captured:
        """Freeze where the steps say so, capture, thaw.

        The slot is given back at the end of the budget, or once a thaw has to
        be tried again, so that a hung guest stops nobody else.

        Raises:
            BackendError: The pause or the capture failed; the guest runs, unless somebody else paused it.
            NoGuardError: Nothing was frozen, as nobody would thaw the guest if this process can't.
            StillFrozenError: The guest could not be resumed.
        """
        with beside.look_after(slot, self.budget.max_freeze_s, request.meter, self.tell):
            captured = await self._frozen_capture(request, slot)
        self.record.measured(captured.freeze_s)
        return captured

    async def _frozen_capture(self, request: CaptureRequest, slot: Slot) -> Captured:
        if not self.steps.pauses:
            return await self._timed_capture(request, self.budget.capture_timeout_s)
        await self._make_ready(request)
        async with self._leased(request.run_id):
            await self._check_running()
            began = trio.current_time()
            try:
                await self._pause(request)
                self.tell(Step.PAUSED)
                limited = evolve(request, freeze_deadline=began + self.budget.max_freeze_s)
                return await self._timed_capture(limited, self._time_left(began))
            finally:
                if not self.record.pause_refused:
                    with trio.CancelScope(shield=True):
                        await self._thaw(slot, began)
                    self.record.freeze_s = trio.current_time() - began
                    self.tell(Step.RESUMED, freeze_s=round(self.record.freeze_s, 6))

    @asynccontextmanager
    async def _leased(self, run_id: str) -> AsyncIterator[None]:
        """Hold the lease until the guest is known to run; else it is held until the run is settled."""
        await self.leases.open(run_id, self.budget.max_freeze_s)
        try:
            yield
        except StillFrozenError:
            raise
        except BaseException:
            self._end_lease(run_id)
            raise
        self._end_lease(run_id)

    def _end_lease(self, run_id: str) -> None:
        if not self.record.pause_unclear:
            self.leases.close(run_id)

    async def _make_ready(self, request: CaptureRequest) -> None:
        """Before the budget begins: while things are made ready, the guest runs."""
        within_s = self.budget.capture_timeout_s
        with trio.move_on_after(within_s):
            return await self.backend.make_ready(self.instance, request)
        raise CaptureFailed(f"the capture could not be made ready within runs.capture_timeout ({within_s:g} s)")

    async def _check_running(self) -> None:
        """Look once more, right before the pause: a pause by an operator would be undone as if it were ours."""
        status = await answer("state", self.patience.answer_s, lambda: self.backend.state(self.instance))
        if status.state is not InstanceState.RUNNING:
            raise CaptureFailed(f"instance is {status.state} now, it was Running when its run began")

    async def _pause(self, request: CaptureRequest) -> None:
        within_s = min(self.patience.answer_s, self.budget.max_freeze_s)
        self.record.pause_unclear = True
        try:
            await answer("pause", within_s, lambda: self.backend.pause(self.instance, request))
        except (CaptureFailed, InvalidState):
            self.record.pause_unclear, self.record.pause_refused = False, True
            raise
        self.record.pause_unclear = False

    def _time_left(self, began: float) -> float:
        if not self.backend.capabilities.abortable:
            return self.budget.capture_timeout_s
        left = self.budget.max_freeze_s - (trio.current_time() - began)
        return max(0.0, min(left, self.budget.capture_timeout_s))

    async def _timed_capture(self, request: CaptureRequest, within_s: float) -> Captured:
        self.record.capture_began = began = trio.current_time()
        try:
            with trio.move_on_after(within_s):
                captured = await self.backend.capture(self.instance, request)
                self.tell(Step.CAPTURED, size_bytes=captured.snapshot.size_bytes)
                return captured
        finally:
            self.record.capture_s = trio.current_time() - began
        if self.steps.freezes is Freezer.HYPERVISOR and not await self._runs_again():
            self.record.freeze_s = self.record.capture_s  # at least: nobody else will tell
        limit = "freeze budget" if within_s < self.budget.capture_timeout_s else "runs.capture_timeout"
        raise CaptureFailed(f"capture took longer than its {limit} allows and was stopped after {within_s:.1f} s")

    async def _runs_again(self) -> bool:
        """Whether the guest of a capture that was given up runs. No answer is never a yes."""
        try:
            status = await answer("state", self.patience.answer_s, lambda: self.backend.state(self.instance))
        except Exception:  # noqa: BLE001 - the capture's own failure is what counts
            return False
        return status.state is InstanceState.RUNNING

    async def _thaw(self, slot: Slot, began: float) -> None:
        pause_s = self.patience.thaw_first_s
        until = began + self.budget.max_freeze_s + THAW_WITHIN_S
        while (failure := await self._try_resume()) is not None:
            slot.release()
            if len(self.record.thaw_failures) % TELL_EVERY == 0:
                _log.error("guest not resumed; trying again", instance_id=self.instance, error=failure)
            self.record.thaw_failures.append(failure)
            if self.give_up.is_set() or trio.current_time() > until:
                raise StillFrozenError(f"the guest may still be frozen, resume failed: {failure}")
            with trio.move_on_after(pause_s):
                await self.give_up.wait()
            pause_s = min(2 * pause_s, self.patience.thaw_most_s)

    async def _try_resume(self) -> str | None:
        """Resume once. None when the guest runs or there is nothing to resume; raises nothing but cancellation."""
        try:
            await answer("resume", self.patience.answer_s, lambda: self.backend.resume(self.instance))
        except InstanceNotFound:
            return None
        except InvalidState as error:
            return await self._why_not_resumed(str(error))
        except Exception as error:  # noqa: BLE001 - a bug in a backend is no reason to leave a guest frozen
            return str(error) or type(error).__name__
        return None

    async def _why_not_resumed(self, error: str) -> str | None:
        try:
            status = await answer("state", self.patience.answer_s, lambda: self.backend.state(self.instance))
        except InstanceNotFound:
            return None
        except Exception as unknown:  # noqa: BLE001 - the same
            return f"{error}; {unknown}"
        return None if status.state in _NOT_FROZEN else f"{error}; instance is {status.state}"
