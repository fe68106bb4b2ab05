"""Promises on what a backend knows of its instances, and on what it says when it gets no answer."""

import json

import pytest

from hypemand.backends import registry
from hypemand.backends.base import BackendUnavailable, InstanceNotFound
from hypemand.backends.catalog import MARKER
from hypemand.conformance.acts import captured, listed, published, request_of, run_of, slow_backend_of
from hypemand.conformance.promises import Promises
from hypemand.conformance.subject import Subject, Traits
from hypemand.core.model import InstanceId, InstanceState, SnapshotKind

promise = Promises()


def with_catalog(traits: Traits) -> bool:
    """Whether there is a catalog to be taken away."""
    return traits.catalog


@promise
async def a_guest_that_runs_is_running(subject: Subject) -> None:
    assert (await subject.backend.state(subject.instance)).state is InstanceState.RUNNING
    assert await subject.guest_runs()


@promise
async def the_state_is_asked_anew_each_time(subject: Subject) -> None:
    await subject.operator_pauses()
    assert (await subject.backend.state(subject.instance)).state is InstanceState.PAUSED
    await subject.operator_resumes()
    assert (await subject.backend.state(subject.instance)).state is InstanceState.RUNNING


@promise
async def the_instance_is_among_the_instances(subject: Subject) -> None:
    assert subject.instance in await subject.backend.instances()


@promise
async def an_instance_that_never_was_has_no_state(subject: Subject) -> None:
    with pytest.raises((InstanceNotFound, BackendUnavailable)):
        await subject.backend.state(InstanceId("never-was"))


@promise
async def an_id_that_is_no_file_name_leads_nowhere(subject: Subject) -> None:
    for bad in ("", "..", "../web-1", ".hidden", "a/b", "x" * 129, "nul\0"):
        with pytest.raises((InstanceNotFound, BackendUnavailable)):
            await subject.backend.state(InstanceId(bad))


@promise
async def opening_again_changes_nothing(subject: Subject) -> None:
    snapshot = await published(subject)
    for first_use in (True, False):
        await subject.backend.open(first_use=first_use)
    assert await listed(subject) == (snapshot,)
    assert await subject.guest_runs()


@promise
async def the_connection_leads_to_the_same_hypervisor_from_another_process(subject: Subject) -> None:
    snapshot = await published(subject)
    for backend in (subject.backend, slow_backend_of(subject)):
        connection = json.loads(json.dumps(dict(backend.connection)))
        other = registry.connect(backend.name, connection, subject.surroundings)
        await other.open(first_use=False)
        assert other.connection == connection
        assert other.capabilities == backend.capabilities
        assert await other.list_snapshots(subject.instance) == (snapshot,)
        assert (await other.state(subject.instance)).state is InstanceState.RUNNING
        await other.aclose()


@promise
async def an_unreachable_hypervisor_is_unavailable_and_never_an_empty_answer(subject: Subject) -> None:
    await published(subject)
    await subject.go_away()
    backend, instance = subject.backend, subject.instance
    with pytest.raises(BackendUnavailable):
        await backend.instances()
    with pytest.raises(BackendUnavailable):
        await backend.state(instance)
    with pytest.raises(BackendUnavailable):
        await backend.prepare(instance, SnapshotKind.STANDBY)
    with pytest.raises(BackendUnavailable):
        await backend.pause(instance, request_of(subject))
    with pytest.raises(BackendUnavailable):
        await backend.resume(instance)
    with pytest.raises(BackendUnavailable):
        await backend.list_snapshots(instance)


@promise
async def an_unreachable_hypervisor_that_comes_back_has_its_snapshots_and_its_guest(subject: Subject) -> None:
    snapshot = await published(subject)
    await subject.go_away()
    with pytest.raises(BackendUnavailable):
        await subject.backend.state(subject.instance)
    await subject.come_back()
    assert (await subject.backend.state(subject.instance)).state is InstanceState.RUNNING
    assert await listed(subject) == (snapshot,)


@promise
async def a_run_is_not_settled_while_the_hypervisor_is_unreachable(subject: Subject) -> None:
    await captured(subject)
    await subject.go_away()
    with pytest.raises(BackendUnavailable):
        await subject.backend.settle(run_of(subject), ours=False)
    await subject.come_back()
    await subject.backend.settle(run_of(subject), ours=False)
    assert await subject.leftovers() == []


@promise.where(with_catalog)
async def a_catalog_whose_marker_vanished_is_not_an_empty_catalog(subject: Subject) -> None:
    assert subject.catalog is not None
    snapshot = await published(subject)
    (subject.catalog / MARKER).unlink()
    with pytest.raises(BackendUnavailable):
        await listed(subject)
    with pytest.raises(BackendUnavailable):
        await subject.backend.delete_snapshot(snapshot)
    with pytest.raises(BackendUnavailable):
        await subject.backend.settle(run_of(subject), ours=False)
    with pytest.raises(BackendUnavailable):
        await subject.backend.open(first_use=False)
    assert (subject.catalog / subject.instance / snapshot.id).is_dir()


@promise.where(with_catalog)
async def a_missing_catalog_is_found_before_the_freeze(subject: Subject) -> None:
    assert subject.catalog is not None
    (subject.catalog / MARKER).unlink()
    with pytest.raises(BackendUnavailable):
        await subject.backend.prepare(subject.instance, SnapshotKind.STANDBY)
