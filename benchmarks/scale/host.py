"""The real daemon on a state of so many schedules, over the backend that answers at once."""

import json
import os
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trio
from attrs import field, frozen

from benchmarks.scale.noop import instance_name
from benchmarks.scale.setting import NotMeasuredError
from tests.processes import ROOT, DaemonProcess, instant, running_daemon

PREFIX = "vm"
_LOOK_S = 0.1
_SECONDS_A_RUN = 0.5
_PATIENCE_S = 60.0
_ENTRY_POINT = "[hypemand.backends]\nnoop = benchmarks.scale.noop:TYPE\n"
_METADATA = "Metadata-Version: 2.1\nName: hypemand-benchmark-noop\nVersion: 0\n"


@frozen
class Table:
    """A backend's table in the config. Its instances are called after its *prefix*, or after its name."""

    name: str = "noop"
    prefix: str = PREFIX
    count: int = 0
    freezes: str = "hypervisor"
    hang: bool = False

    def text(self, concurrency: int, record: Path) -> str:
        """As TOML."""
        return (
            f'[backends.{self.name}]\ntype = "noop"\nprefix = "{self.prefix}"\ncount = {self.count}\n'
            f'freezes = "{self.freezes}"\nhang = {str(self.hang).lower()}\n'
            f'record = "{record}"\nconcurrency = {concurrency}\n'
        )


@frozen
class Host:
    """A directory with a config, a state, and the entry point by which hypemand finds the backend."""

    directory: Path
    state: Path = field(init=False)
    config: Path = field(init=False)

    @state.default
    def _state(self) -> Path:
        return self.directory / "state"

    @config.default
    def _config(self) -> Path:
        return self.directory / "config.toml"

    @property
    def environment(self) -> dict[str, str]:
        """For the hypemand that is started here."""
        return {"PYTHONPATH": os.pathsep.join([str(self.directory / "site"), str(ROOT)])}

    def record_of(self, table: Table) -> Path:
        """Where the backend writes at the end when it was called."""
        return self.directory / f"called-{table.name}.json"

    def write(self, tables: Sequence[Table], *, concurrency: int) -> None:
        """Write the config. Schedules are those of the state."""
        site = self.directory / "site" / "hypemand_benchmark_noop-0.dist-info"
        site.mkdir(parents=True, exist_ok=True)
        (site / "entry_points.txt").write_text(_ENTRY_POINT)
        (site / "METADATA").write_text(_METADATA)
        head = (
            f'state_dir = "{self.state}"\n[runs]\nconcurrency = {concurrency}\nmin_free = "1MiB"\n'
            f'[api]\nsocket = "{self.directory / "api.sock"}"\n'
        )
        self.config.write_text("\n".join([head, *(table.text(concurrency, self.record_of(table)) for table in tables)]))

    def schedules(self, due: Iterable[tuple[int, datetime]], table: Table, *, interval: str = "24h") -> None:
        """Write files of schedules, by the numbers of their instances, as they look after some runs."""
        write_schedules(self.state / "schedules", due, table, interval=interval)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[DaemonProcess]:
        """The daemon, once it serves."""
        async with running_daemon(self.config, env=self.environment) as daemon:
            await self.wait_logged(daemon, b'"API serves"')
            yield daemon

    async def wait_logged(self, daemon: DaemonProcess, text: bytes) -> None:
        """Wait until the daemon has logged *text*."""
        while text not in daemon.log.read_bytes():
            if not daemon.alive:
                raise NotMeasuredError(f"the daemon ended: {daemon.log.read_text()[-2000:]}")
            await trio.sleep(_LOOK_S)

    async def wait_finished(self, daemon: DaemonProcess, runs: int) -> None:
        """Wait until so many runs are over. Looks seldom: it must not take the processor from them."""
        with trio.move_on_after(_PATIENCE_S + _SECONDS_A_RUN * runs):
            while self._finished() < runs:
                if not daemon.alive:
                    break
                await trio.sleep(2 * _LOOK_S)
            else:
                return
        raise NotMeasuredError(f"{self._finished()} of {runs} runs ended: {daemon.log.read_text()[-2000:]}")

    def _finished(self) -> int:
        return sum(path.read_bytes().count(b'"event":"finished"') for path in self.state.glob("runs.jsonl*"))

    def late_s(self, prefix: str = PREFIX) -> list[float]:
        """How late each run of instances of *prefix* was claimed, by the run log; every one must have gone well."""
        lines = [json.loads(line) for path in self.state.glob("runs.jsonl*") for line in path.open()]
        ours = [line for line in lines if line["instance_id"].startswith(f"{prefix}-")]
        finished = [line for line in ours if line["event"] == "finished"]
        bad = [line for line in finished if line["outcome"] != "succeeded"]
        if bad:
            raise NotMeasuredError(f"{len(bad)} of {len(finished)} runs went wrong, as this one: {bad[0]}")
        return [line["late_s"] for line in finished]

    def called_s(self, table: Table) -> dict[str, float]:
        """When the hypervisor was called for each instance; once the daemon has ended."""
        return dict(json.loads(self.record_of(table).read_text()))

    def written_s(self) -> float:
        """When the last schedule file was put in its place."""
        with os.scandir(self.state / "schedules") as files:
            return max(file.stat().st_ctime for file in files if file.name.endswith(".json"))


def write_schedules(
    directory: Path, due: Iterable[tuple[int, datetime]], table: Table, *, interval: str = "24h"
) -> None:
    """Write files of schedules into *directory*; see `Host.schedules`."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    now = datetime.now(UTC)
    made, last = instant(now - timedelta(days=30)), instant(now - timedelta(hours=1))
    for number, at in due:
        instance = instance_name(table.prefix, number)
        document = {
            "instance_id": instance,
            "interval": interval,
            "retention": {"max_age": "168h", "max_count": 7},
            "created_at": made,
            "updated_at": made,
            "next_run_at": instant(at),
            "last_run_at": last,
            "last_snapshot_id": f"r{number:023x}",
            "metadata": {"team": "backend", "env": "staging"},
            "name_prefix": "nightly",
            "backend": table.name,
            "managed_by": "api",
            "settings": {},
            "format": 1,
        }
        (directory / f"{instance}.json").write_text(json.dumps(document, indent=2) + "\n")
