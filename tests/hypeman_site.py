"""A Hypeman server in a process of its own, its guests, and what goes wrong with it. A helper for tests."""

import json
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import trio
from attrs import define, field

from hypemand.backends import registry
from hypemand.backends.base import Backend, CaptureRequest, Settled, Surroundings
from hypemand.core.model import Freezer, InstanceId, Snapshot, SnapshotKind
from hypemand.core.naming import scheduled_tags
from tests.hypeman_server.answers import TOKEN
from tests.processes import PATIENCE_S, ROOT
from tests.runs import run_of

PROGRAM = ("-E", "-s", "-S", "-m", "tests.hypeman_server")
TLS = Path(__file__).parent / "tls"
WEB = InstanceId("qilviffnqzck2jrim1x6s2b1")
SNAPSHOTS = f"POST /instances/{WEB}/snapshots"
RESTORE = f"POST /instances/{WEB}/restore"


@define(eq=False)
class Site:
    """A server in *directory*, which may go away and come back under the same address."""

    directory: Path
    scheme: str = "http"
    _kept: socket.socket = field(init=False)
    _process: trio.Process | None = field(init=False, default=None)

    @_kept.default
    def _keep_port(self) -> socket.socket:
        """Bound and not listening: nobody else gets the port while the server is away."""
        kept = socket.socket()
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        kept.bind(("127.0.0.1", 0))
        return kept

    @property
    def port(self) -> int:
        return int(self._kept.getsockname()[1])

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    @property
    def token_file(self) -> Path:
        return self.directory.with_name("token")

    async def start(self) -> None:
        tls = [TLS / "cert.pem", TLS / "key.pem"] if self.scheme == "https" else []
        self._process = await trio.lowlevel.open_process(
            [sys.executable, *PROGRAM, self.directory, str(self.port), *tls], stdout=subprocess.PIPE, cwd=ROOT
        )
        assert self._process.stdout is not None
        with trio.fail_after(PATIENCE_S):
            assert await self._process.stdout.receive_some() == b"ready\n"

    async def kill(self) -> None:
        """As a host that loses power does it, but for the guests' state."""
        assert self._process is not None
        self._process.kill()
        with trio.CancelScope(shield=True):
            await self._process.wait()
            assert self._process.stdout is not None
            await self._process.stdout.aclose()

    def close(self) -> None:
        self._kept.close()

    # Its guests.

    def add_guest(self, instance: str = WEB, **keys: Any) -> None:
        guest = {
            "id": instance,
            "name": f"name-of-{instance}",
            "image": "docker.io/library/alpine:latest",
            "created_at": "2026-03-09T01:00:00.123456789+01:00",
            "state": "Running",
            "hypervisor": "cloud-hypervisor",
        }
        self._write(guest | keys, "guests", f"{instance}.json")

    def guest(self, instance: str = WEB) -> dict[str, Any]:
        return dict(self._read("guests", f"{instance}.json"))

    def state(self, instance: str = WEB) -> str:
        return str(self.guest(instance)["state"])

    def set_state(self, state: str, instance: str = WEB) -> None:
        self._write(self.guest(instance) | {"state": state}, "guests", f"{instance}.json")

    def remove_guest(self, instance: str = WEB) -> None:
        (self.directory / "guests" / f"{instance}.json").unlink()

    # What it keeps.

    def snapshots(self) -> list[dict[str, Any]]:
        return [json.loads(file.read_text()) for file in sorted(self.directory.glob("snapshots/*.json"))]

    def add_snapshot(self, name: str, *, at: str, instance: str = WEB, tags: Mapping[str, str] | None = None) -> str:
        """As the server's own schedule makes one, or, with other *tags*, somebody by hand."""
        own = {"hypeman.scheduled": "true", "hypeman.schedule_instance_id": instance}
        made = {
            "id": f"made{name.replace('-', '')}"[:24],
            "name": name,
            "kind": "Standby",
            "source_instance_id": instance,
            "source_instance_name": f"name-of-{instance}",
            "source_hypervisor": "qemu",
            "created_at": at,
            "size_bytes": 8192,
            "tags": own if tags is None else dict(tags),
        }
        self._write(made, "snapshots", f"{made['id']}.json")
        return str(made["id"])

    def add_schedule(self, instance: str = WEB, **keys: Any) -> dict[str, Any]:
        """A file as Hypeman writes it, with a run in twenty minutes."""
        due = datetime.now(UTC) + timedelta(minutes=20)
        schedule = {
            "instance_id": instance,
            "interval": "24h0m0s",
            "name_prefix": "nightly",
            "metadata": {"team": "backend"},
            "retention": {"max_count": 7, "max_age": "168h0m0s"},
            "next_run_at": f"{due:%Y-%m-%dT%H:%M:%S}.123456789Z",
            "last_run_at": "2026-03-09T02:00:00Z",
            "last_snapshot_id": "q7z1w7l2af4l8y7q1h7g2m3s",
            "last_error": "invalid state transition: stopped snapshot requires source in Stopped, got Running",
            "created_at": "2026-03-09T01:00:00Z",
            "updated_at": "2026-03-09T01:30:00Z",
        }
        document = {key: value for key, value in (schedule | keys).items() if value is not None}
        self._write(document, "snapshot-schedules", f"{instance}.json")
        return document

    def has_schedule(self, instance: str = WEB) -> bool:
        return (self.directory / "snapshot-schedules" / f"{instance}.json").exists()

    # What goes wrong, and what was asked.

    def fault(self, at: str, **what: Any) -> None:
        """From now on: the next request that fits *at*, ``METHOD /path`` as a regular expression, goes wrong."""
        path = self.directory / "faults.json"
        before = json.loads(path.read_text()) if path.exists() else []
        self._write([*before, {"at": at, **what}], "faults.json")

    def be_hasty(self) -> None:
        """From now on it tells of a guest while it is at work on it."""
        self._write({}, "hasty.json")

    def requests(self, beginning: str = "") -> list[str]:
        path = self.directory / "requests.log"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if line.startswith(beginning)]

    def change_token(self, token: str) -> None:
        """The server takes this one alone."""
        self._write({"token": token}, "token.json")

    def write_token(self, token: str = TOKEN) -> None:
        """What hypemand shows."""
        new = self.token_file.with_suffix(".new")
        new.touch(mode=0o600)
        new.write_text(f"{token}\n")
        new.replace(self.token_file)

    def _write(self, document: Any, *names: str) -> None:
        path = self.directory.joinpath(*names)
        new = path.with_suffix(".by-hand")
        new.write_text(json.dumps(document))
        new.replace(path)

    def _read(self, *names: str) -> Any:
        return json.loads(self.directory.joinpath(*names).read_text())

    # hypemand's side.

    def connection(self, directory: Path, *, prefix: str = "") -> dict[str, Any]:
        settings = {"type": "hypeman", "url": self.url + prefix, "token_file": str(self.token_file)}
        trust = {"ca_file": str(TLS / "cert.pem")} if self.scheme == "https" else {}
        return {**settings, **trust, "snapshot_dir": str(directory / "catalog")}

    def backend(self, directory: Path, **settings: str) -> Backend:
        return registry.connect("cloud", self.connection(directory) | settings, Surroundings(directory / "state"))


@define(eq=False)
class Way:
    """A way to a server: of the connection of the next request that begins with *lost*, no answer comes back."""

    to: int
    lost: bytes = b""
    port: int = field(init=False, default=0)

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listeners[0].socket.getsockname()[1]
        task_status.started()
        await trio.serve_listeners(self._carry, listeners)

    async def _carry(self, client: trio.SocketStream) -> None:
        silent = trio.Event()
        async with client, await trio.open_tcp_stream("127.0.0.1", self.to) as server, trio.open_nursery() as nursery:

            async def back() -> None:
                with suppress(trio.BrokenResourceError):
                    async for data in server:
                        if silent.is_set():
                            continue
                        await client.send_all(data)
                if not silent.is_set():
                    nursery.cancel_scope.cancel()

            nursery.start_soon(back)
            with suppress(trio.BrokenResourceError):
                async for data in client:
                    if self.lost and data.startswith(self.lost):
                        self.lost = b""
                        silent.set()
                    await server.send_all(data)
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def running_server(directory: Path, scheme: str = "http") -> AsyncIterator[Site]:
    """A server with one guest that runs, until the end of the block."""
    home = directory / "hypeman"
    for name in ("guests", "snapshots", "snapshot-schedules"):
        (home / name).mkdir(parents=True)
    site = Site(home, scheme)
    site.write_token()
    site.add_guest()
    try:
        await site.start()
        try:
            yield site
        finally:
            await site.kill()
    finally:
        site.close()


# hypemand's side, driven as the engine drives it.

NAME = "nightly-20261122-010000"
CREATED_AT = datetime(2026, 11, 22, 1, tzinfo=UTC)


def new_request(
    run_id: str = "run-1",
    name: str = NAME,
    *,
    kind: SnapshotKind = SnapshotKind.STANDBY,
    freezes: Freezer | None = Freezer.HYPERVISOR,
    metadata: Mapping[str, str] | None = None,
) -> CaptureRequest:
    return CaptureRequest(
        run_id=run_id,
        name=name,
        kind=kind,
        tags=scheduled_tags(WEB, metadata or {"team": "back end"}),
        created_at=CREATED_AT,
        freezes=freezes,
    )


async def settle(backend: Backend, request: CaptureRequest, *, ours: bool = True) -> Settled:
    """Settle the run of *request*, with the started line that the engine would have written."""
    with trio.fail_after(PATIENCE_S):
        return await backend.settle(run_of(request, backend, WEB), ours=ours)


async def take(backend: Backend, run_id: str = "run-1", name: str = NAME, **request: Any) -> Snapshot:
    """A published snapshot."""
    made = (await backend.complete(await backend.capture(WEB, new_request(run_id, name, **request)))).snapshot
    await backend.publish(made)
    return made


@asynccontextmanager
async def opened(tmp_path: Path, scheme: str = "http", **settings: str) -> AsyncIterator[tuple[Site, Backend]]:
    """A server, and a backend for it."""
    async with running_server(tmp_path, scheme) as site:
        backend = site.backend(tmp_path, **settings)
        await backend.open(first_use=True)
        try:
            yield site, backend
        finally:
            await backend.aclose()
