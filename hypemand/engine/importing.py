"""Schedules that another scheduler kept so far: taken in with their cadence and history, or refused with a reason."""

from enum import StrEnum

import structlog
from attrs import evolve, frozen

from hypemand.backends.base import BackendError
from hypemand.core.model import ManagedBy, Schedule, Settings
from hypemand.engine.limits import answer
from hypemand.engine.refusals import ConflictError, RequestRefusedError, UnavailableError
from hypemand.engine.requests import Requests

OPEN_S = 5.0
_COMPARED = ("interval", "retention", "metadata", "name_prefix")
_log = structlog.get_logger()


class Outcome(StrEnum):
    """What became of a schedule that was to be imported."""

    IMPORTED = "imported"
    REPLACED = "replaced"
    UNCHANGED = "unchanged"
    DIFFERS = "differs"
    REFUSED = "refused"


DONE = frozenset({Outcome.IMPORTED, Outcome.REPLACED, Outcome.UNCHANGED})
"""Outcomes after which hypemand has the schedule."""


@frozen
class Imported:
    """What became of one, and why it is not as wanted."""

    outcome: Outcome
    reason: str = ""


@frozen(kw_only=True)
class Wish:
    """A schedule to be taken in.

    Attributes:
        schedule: As it stands with the other scheduler, with the name of the backend here that has its instance.
        replace: In place of one that is there and differs.
        dry_run: Change nothing; tell what would become of it.
    """

    schedule: Schedule
    replace: bool = False
    dry_run: bool = False


async def bring_in(requests: Requests, wish: Wish) -> Imported:
    """Do what *wish* says; durable when this returns. Done again, it changes nothing."""
    wanted = as_ours(wish.schedule)
    try:
        async with requests.turn(wanted.instance_id):
            return await _brought_in(requests, wanted, wish)
    except RequestRefusedError as error:
        return Imported(Outcome.REFUSED, str(error))


def as_ours(schedule: Schedule) -> Schedule:
    """*schedule* without what no other scheduler can know of ours; an empty prefix is none."""
    return evolve(
        schedule,
        managed_by=ManagedBy.API,
        settings=Settings(),
        gone_since_at=None,
        name_prefix=schedule.name_prefix or None,
    )


async def _brought_in(requests: Requests, wanted: Schedule, wish: Wish) -> Imported:
    instance, store = wanted.instance_id, requests.engine.store
    requests.refuse_if_not_ours(instance)
    home = await requests.home(instance)
    if home.name != wanted.backend:
        raise ConflictError(f"instance {instance!r} is that of backend {home.name!r}, not of {wanted.backend!r}")
    requests.refuse_if_closed()
    requests.refuse_if_not_ours(instance)  # once more: much may have changed while backends were asked
    requests.refuse_if_a_pattern_has(instance, home.name)
    present = store.schedules.get(instance)
    differing = [] if present is None else differences(present, wanted)
    if present is not None and not differing:
        if not wish.dry_run and not store.is_written(instance):
            await _put(requests, present)  # whoever deletes theirs relies on it to be durable
        return Imported(Outcome.UNCHANGED)
    if present is not None and not wish.replace:
        return Imported(Outcome.DIFFERS, f"the schedule that is there has another {', '.join(differing)}")
    if not wish.dry_run:
        # An old date would look as if the clock had leapt since.
        after = evolve(wanted if present is None else replaced(present, wanted), updated_at=requests.engine.clock.now())
        await _put(requests, after)
    return Imported(Outcome.IMPORTED if present is None else Outcome.REPLACED)


async def _put(requests: Requests, schedule: Schedule) -> None:
    """Put *schedule* in force. Its last snapshot makes the backend one that was used: it has to be open before."""
    engine, name = requests.engine, schedule.backend
    first_use = name not in engine.used_backends
    async with engine.fleet.lease(name or "") as backend:
        try:
            await answer("open", OPEN_S, lambda: backend.open(first_use=first_use))
        except BackendError as error:
            raise UnavailableError(f"backend {name!r} is not ready: {error}") from error
    try:
        await requests.write(schedule)
    finally:  # also when it is not written yet: it is in force
        engine.scheduler.refresh(schedule.instance_id)
    await requests.forget_retired(schedule.instance_id)
    _log.info("schedule imported", instance_id=schedule.instance_id, backend=name)


def differences(present: Schedule, wanted: Schedule) -> list[str]:
    """What a client would have to set so that *present* does what *wanted* does; a limit of zero is none."""
    ours, theirs = _comparable(present), _comparable(wanted)
    return [key for key in _COMPARED if ours[key] != theirs[key]]


def _comparable(schedule: Schedule) -> dict[str, object]:
    return {
        "interval": schedule.interval,
        "retention": (schedule.retention.max_age or None, schedule.retention.max_count or None),
        "metadata": dict(schedule.metadata),
        "name_prefix": schedule.name_prefix or None,
    }


def replaced(present: Schedule, wanted: Schedule) -> Schedule:
    """*present*, to do what *wanted* does: the cadence is that of *wanted* only where its interval is another."""
    return evolve(
        present,
        interval=wanted.interval,
        retention=wanted.retention,
        metadata=wanted.metadata,
        name_prefix=wanted.name_prefix,
        next_run_at=present.next_run_at if present.interval == wanted.interval else wanted.next_run_at,
    )
