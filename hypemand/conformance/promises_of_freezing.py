"""Promises on pause and resume."""

import contextlib

import pytest

from hypemand.backends.base import InvalidState
from hypemand.conformance.acts import paused, run_of
from hypemand.conformance.promises import Promises
from hypemand.conformance.subject import Subject, Traits
from hypemand.core.model import InstanceState

promise = Promises()


def that_pauses(traits: Traits) -> bool:
    """Whether there is a pause outside of a capture."""
    return traits.pauses


def that_marks(traits: Traits) -> bool:
    """Whether it knows its own pauses."""
    return traits.marks


@promise.where(that_pauses)
async def pause_freezes_the_guest_and_resume_lets_it_run(subject: Subject) -> None:
    await paused(subject)
    assert not await subject.guest_runs()
    assert (await subject.backend.state(subject.instance)).state is InstanceState.PAUSED
    await subject.backend.resume(subject.instance)
    assert await subject.guest_runs()


@promise.where(that_pauses)
async def pausing_a_paused_guest_and_resuming_a_running_one_is_no_error(subject: Subject) -> None:
    await subject.backend.resume(subject.instance)
    assert await subject.guest_runs()
    for _ in range(2):
        await paused(subject)
        assert not await subject.guest_runs()
    for _ in range(2):
        await subject.backend.resume(subject.instance)
        assert await subject.guest_runs()


@promise
async def an_operators_pause_is_not_taken_for_ours_where_that_can_be_told(subject: Subject) -> None:
    await subject.operator_pauses()
    with contextlib.suppress(InvalidState):
        await paused(subject)
    assert not await subject.guest_runs()
    assert not (await subject.backend.settle(run_of(subject), ours=False)).resumed
    assert not await subject.guest_runs()


@promise.where(that_marks)
async def a_pause_that_an_operator_made_is_refused_and_left_alone(subject: Subject) -> None:
    await subject.operator_pauses()
    with pytest.raises(InvalidState):
        await paused(subject)
    await subject.backend.resume(subject.instance)
    assert not await subject.guest_runs()
    assert not (await subject.backend.settle(run_of(subject), ours=True)).resumed
    assert not await subject.guest_runs()
