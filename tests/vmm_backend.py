"""A backend over guests of `tests.vmm_guest`, and a capture in its parts. A helper for tests."""

import shlex
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hypemand.backends import registry
from hypemand.backends.base import Backend, Captured, CaptureRequest, Surroundings
from hypemand.core.model import (
    Freezer,
    InstanceState,
    RestoreAction,
    RestoreStep,
    RunStarted,
    Snapshot,
    SnapshotKind,
    Trigger,
)
from tests.vmm_guest import Guest, running_guest

THEN = datetime(2026, 3, 9, 1, tzinfo=UTC)
RUN = "run-1"


def request(run_id: str = RUN, kind: SnapshotKind = SnapshotKind.STANDBY, **others: Any) -> CaptureRequest:
    """As the engine would make it."""
    given = {
        "name": f"nightly-{run_id}",
        "kind": kind,
        "tags": {},
        "created_at": THEN,
        "freezes": Freezer.ENGINE if kind is SnapshotKind.STANDBY else None,
        **others,
    }
    return CaptureRequest(run_id=run_id, **given)


def run_of(backend: Backend, guest: Guest, run_id: str = RUN) -> RunStarted:
    """The started line of that run."""
    asked = request(run_id)
    return RunStarted(
        run_id=run_id,
        instance_id=guest.instance_id,
        backend=backend.name,
        trigger=Trigger.SCHEDULE,
        kind=asked.kind,
        state_before=InstanceState.RUNNING,
        due_at=THEN,
        next_run_at=THEN,
        started_at=THEN,
        snapshot_name=asked.name,
        tags={},
        max_freeze_s=30,
        freezes=Freezer.ENGINE,
        boot_id="this-boot",
        connection=backend.connection,
    )


def connect(guest: Guest, directory: Path, **settings: Any) -> Backend:
    """A backend over *guest*, not opened; its catalog is ``catalog`` in *directory*."""
    name = guest.instance_id
    connection = {
        "type": guest.kind,
        "socket": str(guest.socket.with_name(guest.socket.name.replace(name, "{instance}"))),
        "snapshot_dir": str(directory / "catalog"),
        **({"chroot": str(guest.root).replace(name, "{instance}")} if guest.root else {}),
        **settings,
    }
    return registry.connect("vms", connection, Surroundings(directory / "state"))


@asynccontextmanager
async def opened(guest: Guest, directory: Path, **settings: Any) -> AsyncIterator[Backend]:
    """The same, open until the end of the block."""
    backend = connect(guest, directory, **settings)
    await backend.open(first_use=True)
    try:
        yield backend
    finally:
        await backend.aclose()


@asynccontextmanager
async def running(kind: str, directory: Path, **options: Any) -> AsyncIterator[tuple[Guest, Backend]]:
    """A guest and a backend over it."""
    async with running_guest(kind, directory, **options) as guest, opened(guest, directory) as backend:
        yield guest, backend


async def frozen(backend: Backend, guest: Guest, asked: CaptureRequest | None = None) -> CaptureRequest:
    """The guest made to stand still."""
    asked = asked or request()
    await backend.make_ready(guest.instance_id, asked)
    await backend.pause(guest.instance_id, asked)
    return asked


async def captured(backend: Backend, guest: Guest, asked: CaptureRequest | None = None) -> Captured:
    """A capture, after which the guest runs."""
    asked = await frozen(backend, guest, asked)
    try:
        return await backend.capture(guest.instance_id, asked)
    finally:
        await backend.resume(guest.instance_id)


async def published(backend: Backend, guest: Guest, asked: CaptureRequest | None = None) -> Snapshot:
    """A snapshot that is listed."""
    whole = await backend.complete(await captured(backend, guest, asked))
    await backend.publish(whole.snapshot)
    return whole.snapshot


def carry_out(steps: tuple[RestoreStep, ...], action: RestoreAction) -> None:
    """Those of *action*, word for word."""
    for step in steps:
        if step.action is action:
            subprocess.run(["sh", "-ec", step.command], check=True, capture_output=True)


def restore_option(steps: tuple[RestoreStep, ...]) -> str | None:
    """What the steps add to the command line, for `running_guest`."""
    words = [word for step in steps if step.action is RestoreAction.START for word in shlex.split(step.command)]
    return words[1] if words[:1] == ["--restore"] else None
