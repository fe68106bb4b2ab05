"""Promises on what a run that was cut short leaves behind, and on putting it in order."""

from collections.abc import Awaitable, Callable

import trio

from hypemand.conformance.acts import (
    HOUR,
    THEN,
    captured,
    completed,
    engine_freezes,
    frozen,
    listed,
    published,
    request_of,
    run_of,
    slow_backend_of,
)
from hypemand.conformance.promises import Promises
from hypemand.conformance.subject import Subject

promise = Promises()


@promise
async def a_cancelled_capture_is_cleared_up_and_the_guest_runs(subject: Subject) -> None:
    kept = await published(subject, "kept", THEN - HOUR)
    await frozen(subject)
    with trio.move_on_after(0.2) as scope:
        await slow_backend_of(subject).capture(subject.instance, request_of(subject))
    if subject.slow_backend is not None:
        assert scope.cancelled_caught
    settled = await subject.backend.settle(run_of(subject), ours=engine_freezes(subject))
    assert await subject.guest_runs()
    assert await subject.leftovers() == []
    found = (kept,) if settled.snapshot is None else (kept, settled.snapshot)
    assert await listed(subject) == found
    assert (await subject.backend.settle(run_of(subject), ours=False)).snapshot == settled.snapshot


@promise
async def the_next_run_succeeds_after_a_cancelled_one_was_settled(subject: Subject) -> None:
    await frozen(subject)
    with trio.move_on_after(0.2):
        await slow_backend_of(subject).capture(subject.instance, request_of(subject))
    if engine_freezes(subject):
        await subject.backend.resume(subject.instance)
    settled = await subject.backend.settle(run_of(subject), ours=False)
    later = await published(subject, "run-2", THEN + HOUR)
    found = (later,) if settled.snapshot is None else (settled.snapshot, later)
    assert await listed(subject) == found


@promise
async def a_capture_whose_completion_was_cancelled_is_cleared_up(subject: Subject) -> None:
    kept = await published(subject, "kept", THEN - HOUR)
    made = await captured(subject)
    with trio.CancelScope() as scope:
        scope.cancel()
        await subject.backend.complete(made)
    settled = await subject.backend.settle(run_of(subject), ours=False)
    assert not settled.resumed
    assert await subject.guest_runs()
    assert await subject.leftovers() == []
    found = (kept,) if settled.snapshot is None else (kept, settled.snapshot)
    assert await listed(subject) == found
    later = await published(subject, "run-2", THEN + HOUR)
    assert await listed(subject) == (*found, later)


@promise
async def settling_adopts_the_published_snapshot_of_the_run(subject: Subject) -> None:
    snapshot = await published(subject)
    for _ in range(2):
        settled = await subject.backend.settle(run_of(subject), ours=False)
        assert settled.snapshot == snapshot
        assert not settled.resumed
    assert await listed(subject) == (snapshot,)


async def _settle_unpublished(subject: Subject, make: Callable[[Subject], Awaitable[object]]) -> None:
    await make(subject)
    settled = await subject.backend.settle(run_of(subject), ours=False)
    found = () if settled.snapshot is None else (settled.snapshot,)
    assert await listed(subject) == found
    assert await subject.leftovers() == []
    assert (await subject.backend.settle(run_of(subject), ours=False)).snapshot == settled.snapshot


@promise
async def settling_lists_a_captured_snapshot_or_removes_it(subject: Subject) -> None:
    await _settle_unpublished(subject, captured)


@promise
async def settling_lists_a_completed_snapshot_or_removes_it(subject: Subject) -> None:
    await _settle_unpublished(subject, completed)


@promise
async def settling_a_run_that_left_nothing_finds_nothing(subject: Subject) -> None:
    other = await published(subject, "other")
    settled = await subject.backend.settle(run_of(subject, "run-1", THEN + HOUR), ours=False)
    assert (settled.snapshot, settled.resumed) == (None, False)
    assert await listed(subject) == (other,)
    assert await subject.guest_runs()


@promise
async def settling_resumes_a_guest_that_the_run_froze(subject: Subject) -> None:
    await frozen(subject)
    settled = await subject.backend.settle(run_of(subject), ours=True)
    assert settled.resumed == engine_freezes(subject)
    assert settled.freeze_s is None or settled.freeze_s >= 0
    assert await subject.guest_runs()
    assert not (await subject.backend.settle(run_of(subject), ours=True)).resumed


@promise
async def settling_leaves_an_operators_pause_alone(subject: Subject) -> None:
    await captured(subject)
    await subject.operator_pauses()
    settled = await subject.backend.settle(run_of(subject), ours=False)
    assert not settled.resumed
    assert not await subject.guest_runs()
