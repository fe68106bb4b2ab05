"""What is told of each instance, and what backends say of it."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import datetime, timedelta
from typing import ClassVar

import structlog
import trio
from attrs import define, field, frozen

from hypemand.backends.base import Backend, BackendError
from hypemand.core.model import InstanceId, RunFinished, Schedule, Snapshot
from hypemand.core.retention import future_dated, scheduled_only
from hypemand.engine.fleet import Fleet, UnknownBackendError
from hypemand.engine.limits import no_answer
from hypemand.engine.records import LongestFreeze
from hypemand.surface.known import OpenRun

ANSWER_S = 5.0
"""How long a backend is waited for, for its instances, and for each of them."""
ALL_ANSWERS_S = 10.0
"""How long for all of them."""
AT_ONCE = 32
"""Questions of a kind to one backend; one that hangs hides no other."""
NOT_IN_TIME = "no answer in time, or not asked because others gave none"
_log = structlog.get_logger()


@define
class InstanceView:
    """An instance: its schedule if it has one, and what its backend says of it.

    Attributes:
        snapshots: Scheduled ones, oldest first; None where they can't be listed.
        in_order: Ids of its snapshots in the order in which they were made, as far as the run log tells.
        made: False for a schedule that the config wants, but that no daemon has made yet.
        future: Scheduled snapshots dated in the future: a clock was wrong once; they count for nothing.
        max_freeze: Its freeze budget; None where only an invalid config could tell.
        longest: Its longest freeze in a capture, *found_frozen*: until a recovery resumed it. Both of the kind that
            it had last.
        over_budget: Why its next run is going to fail, in view of that.
        last_run: Skipped ones included; *last_attempt*: without them.
        last_good_at: When the run began that left its last snapshot, as far as the run log tells.
        trouble: Why the backend's part is missing.
        warnings: What is odd about it.
    """

    instance_id: InstanceId
    backend: str | None
    schedule: Schedule | None = None
    made: bool = True
    state: str | None = None
    snapshots: tuple[Snapshot, ...] | None = None
    trouble: str | None = None
    last_run: RunFinished | None = None
    last_attempt: RunFinished | None = None
    last_good_at: datetime | None = None
    open_run: OpenRun | None = None
    future: tuple[Snapshot, ...] = ()
    in_order: tuple[str, ...] = ()
    max_freeze: timedelta | None = None
    longest: LongestFreeze | None = None
    found_frozen: LongestFreeze | None = None
    over_budget: str | None = None
    warnings: list[str] = field(factory=list)


@frozen
class AtWork:
    """The instances that hypemand is at work on. It knows their state itself; a hypervisor serves one client at a time.

    Attributes:
        on: Whether an instance is one of them, at this moment.
        listed: Its snapshots as they were listed last; None where that is not known.
    """

    on: Callable[[InstanceId], bool]
    listed: Callable[[InstanceId], tuple[Snapshot, ...] | None]


NOT_AT_WORK = AtWork(lambda _: False, lambda _: None)


async def ask_all(views: Sequence[InstanceView], fleet: Fleet, at_work: AtWork, now: datetime) -> None:
    """Have backends tell what only they can, into *views*. The first trouble with an instance is its trouble."""
    by_backend: defaultdict[str | None, list[InstanceView]] = defaultdict(list)
    for view in views:
        by_backend[view.backend].append(view)
    questions = (_States(at_work), _Snapshots(at_work, now))
    with trio.move_on_after(ALL_ANSWERS_S):
        async with trio.open_nursery() as nursery:
            for name, its in by_backend.items():
                for question in questions:
                    waiting = iter(its)  # shared by those who ask
                    for _ in range(min(AT_ONCE, len(its))):
                        nursery.start_soon(_ask_each, fleet, name, waiting, question)
    for view in views:
        if view.trouble is None and not all(view.instance_id in question.answered for question in questions):
            view.trouble = NOT_IN_TIME


@frozen
class _Question(ABC):
    """One that is asked of each instance.

    Attributes:
        what: In a word, for messages.
        answered: Of which it is.
    """

    what: ClassVar[str]
    at_work: AtWork
    answered: set[InstanceId] = field(init=False, factory=set)

    def is_known(self, view: InstanceView) -> bool:
        """Whether hypemand knows by itself, being at work on it; then it is in *view*."""
        if not self.at_work.on(view.instance_id):
            return False
        self.know(view)
        self.answered.add(view.instance_id)
        return True

    @abstractmethod
    def know(self, view: InstanceView) -> None:
        """Put into *view* what hypemand knows by itself."""

    @abstractmethod
    async def ask(self, backend: Backend, view: InstanceView) -> None:
        """Put into *view* what *backend* tells."""


@frozen
class _States(_Question):
    what = "state"

    def know(self, view: InstanceView) -> None:
        view.state = view.open_run.guest if view.open_run else None

    async def ask(self, backend: Backend, view: InstanceView) -> None:
        view.state = (await backend.state(view.instance_id)).state


@frozen
class _Snapshots(_Question):
    now: datetime
    what = "list"

    def know(self, view: InstanceView) -> None:
        listed = self.at_work.listed(view.instance_id)
        if listed is not None:
            self._take(view, listed)

    async def ask(self, backend: Backend, view: InstanceView) -> None:
        listed = await backend.list_snapshots(view.instance_id)
        self._take(view, scheduled_only(view.instance_id, listed))

    def _take(self, view: InstanceView, found: Collection[Snapshot]) -> None:
        in_order = sorted(found, key=lambda s: (s.created_at, s.id))
        view.future = future_dated(in_order, self.now)
        view.snapshots = tuple(snapshot for snapshot in in_order if snapshot not in view.future)


async def _ask_each(fleet: Fleet, name: str | None, waiting: Iterator[InstanceView], question: _Question) -> None:
    """Ask the backend called *name* of one instance after the other, of those that hypemand does not know itself."""
    unknown = (view for view in waiting if not question.is_known(view))
    try:
        lease = fleet.lease(fleet.resolve(name))
    except UnknownBackendError as error:
        for view in unknown:
            view.trouble = str(error)
        return
    async with lease as backend:
        while await _ask_until_late(backend, unknown, question):
            pass


async def _ask_until_late(backend: Backend, unknown: Iterator[InstanceView], question: _Question) -> bool:
    """Whether one gave no answer in time, and there may be more. Time limits are one that is moved: there are many."""
    view = None
    with trio.CancelScope() as limit:
        for view in unknown:
            limit.deadline = trio.current_time() + ANSWER_S
            try:
                await question.ask(backend, view)
            except BackendError as error:
                view.trouble = view.trouble or str(error)
            except Exception as error:  # noqa: BLE001 - a bug in one backend hides nothing of the others
                _log.exception("internal error of a backend")
                view.trouble = view.trouble or f"internal error: {error!r}"
            else:
                question.answered.add(view.instance_id)
            if limit.cancel_called:  # it was late, and answered in that very moment: the next one has its own time
                return True
    if view is not None and limit.cancelled_caught:
        view.trouble = view.trouble or str(no_answer(question.what, ANSWER_S))
    return limit.cancelled_caught
