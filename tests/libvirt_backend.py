"""The libvirt backend, driven as the engine drives it. A helper for tests, not a test."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

from hypemand.backends import registry
from hypemand.backends.base import Backend, CaptureRequest, Settled, Surroundings
from hypemand.core.model import Freezer, InstanceId, Snapshot, SnapshotKind
from tests.runs import run_of

WEB = InstanceId("web-1")
NAME = "nightly-20260309-020000"
_numbers = count()


def backend_at(uri: str) -> Backend:
    """A backend of its own, as another process would have it."""
    return registry.connect("vms", {"type": "libvirt", "uri": uri}, Surroundings(Path("/nowhere")))


@asynccontextmanager
async def backend_of(uri: str) -> AsyncIterator[Backend]:
    """A backend until the end of the block."""
    backend = backend_at(uri)
    try:
        yield backend
    finally:
        await backend.aclose()


def new_request(name: str = NAME, *, kind: SnapshotKind = SnapshotKind.STANDBY) -> CaptureRequest:
    return CaptureRequest(
        run_id=f"run-{next(_numbers)}",
        name=name,
        kind=kind,
        tags={"team": "back end"},
        created_at=datetime.now(UTC),
        freezes=Freezer.HYPERVISOR if kind is SnapshotKind.STANDBY else None,
    )


async def settle(backend: Backend, request: CaptureRequest) -> Settled:
    return await backend.settle(run_of(request, backend, WEB), ours=False)


async def take(backend: Backend, name: str = NAME, *, kind: SnapshotKind = SnapshotKind.STANDBY) -> Snapshot:
    """A snapshot from capture to publish."""
    request = new_request(name, kind=kind)
    captured = await backend.complete(await backend.capture(WEB, request))
    await backend.publish(captured.snapshot)
    return captured.snapshot
