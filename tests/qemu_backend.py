"""A qemu backend over a real guest, driven as the engine drives it, and an operator's hand. A helper for tests."""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import trio

from hypemand.backends import qmp, registry
from hypemand.backends.base import Backend, Captured, CaptureRequest, Settled, Status, Surroundings
from hypemand.backends.qemu.jobs import dismiss, finished
from hypemand.core.model import Freezer, InstanceId, InstanceState, Snapshot, SnapshotKind
from tests.qemu_guest import Guest
from tests.runs import run_of

WEB = InstanceId("web-1")
TAG = "nightly-20261122-010000"
_numbers = count(1)


def make_backend(template: Path, tmp_path: Path, **settings: Any) -> Backend:
    """A backend for guests whose sockets fit *template*, with its catalog in *tmp_path*."""
    connection = {"type": "qemu", "socket": str(template), "snapshot_dir": str(tmp_path / "catalog"), **settings}
    return registry.connect("vms", connection, Surroundings(tmp_path / "state"))


def backend_of(guest: Guest, tmp_path: Path, **settings: Any) -> Backend:
    return make_backend(guest.socket_template, tmp_path, **settings)


async def opened(guest: Guest, tmp_path: Path, **settings: Any) -> Backend:
    backend = backend_of(guest, tmp_path, **settings)
    await backend.open(first_use=True)
    return backend


def new_request(
    name: str = TAG, *, kind: SnapshotKind = SnapshotKind.STANDBY, freezes: Freezer | None = Freezer.HYPERVISOR
) -> CaptureRequest:
    return CaptureRequest(
        run_id=f"run-{next(_numbers)}",
        name=name,
        kind=kind,
        tags={"team": "backend"},
        created_at=datetime.now(UTC),
        freezes=freezes,
    )


async def begun(backend: Backend, request: CaptureRequest) -> Captured:
    """The capture up to the moment from which the guest runs again."""
    if request.freezes is not Freezer.ENGINE:
        return await backend.capture(WEB, request)
    try:
        await backend.pause(WEB, request)
        return await backend.capture(WEB, request)
    finally:
        with trio.CancelScope(shield=True):
            await backend.resume(WEB)


async def captured(backend: Backend, request: CaptureRequest) -> Captured:
    """The whole capture, not yet published."""
    return await backend.complete(await begun(backend, request))


async def take(backend: Backend, name: str = TAG, **request: Any) -> Snapshot:
    """A published snapshot."""
    made = await captured(backend, new_request(name, **request))
    await backend.publish(made.snapshot)
    return made.snapshot


async def settle(backend: Backend, request: CaptureRequest) -> Settled:
    with trio.fail_after(30):
        return await backend.settle(run_of(request, backend, WEB), ours=True)


def drafts_in(tmp_path: Path) -> list[Path]:
    return list(tmp_path.glob("catalog/*/.*"))


async def tags_on(guest: Guest) -> dict[str, list[str]]:
    """Tags by node, as QEMU itself lists them."""
    nodes = await guest.qmp("query-named-block-nodes", flat=True)
    return {n["node-name"]: [s["name"] for s in n["image"].get("snapshots", ())] for n in nodes if n["drv"] == "qcow2"}


async def marks_in(guest: Guest) -> list[str]:
    """What hypemand has left in QEMU."""
    objects = await guest.qmp("qom-list", path="/objects")
    return [o["name"] for o in objects if o["name"].startswith("hypemand")]


async def operator_job(guest: Guest, command: str, tag: str, *nodes: str, job_id: str = "") -> None:
    """Save or delete on the test's monitor; a job with a *job_id* is left in QEMU as it is after a cancellation."""
    arguments: dict[str, Any] = {"vmstate": nodes[0]} if command == "snapshot-save" else {}
    async with qmp.connect(guest.test_socket) as monitor:
        await monitor.execute(command, job_id=job_id or "operator", tag=tag, devices=list(nodes), **arguments)
        with trio.fail_after(30):
            job = await finished(monitor, job_id or "operator")
        assert job is not None
        assert "error" not in job
        if not job_id:
            await dismiss(monitor, "operator")


async def capture_until_stop(
    backend: Backend, guest: Guest, request: CaptureRequest, end: Callable[[trio.CancelScope], Awaitable[None]]
) -> None:
    """Begin a capture, and call *end* once the guest stands still in it."""
    async with qmp.connect(guest.test_socket) as monitor, trio.open_nursery() as nursery:
        nursery.start_soon(captured, backend, request)
        with trio.fail_after(30):
            await monitor.wait_event("STOP")
        await end(nursery.cancel_scope)


async def cancel(scope: trio.CancelScope) -> None:
    scope.cancel()


async def assert_runs(backend: Backend, guest: Guest) -> None:
    assert await backend.state(guest.instance_id) == Status(InstanceState.RUNNING)
    await guest.next_ticks()
