"""The real daemon and the real commands, as processes, and a config to run them on. A helper for tests, not a test."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import trio
from attrs import frozen

ROOT = Path(__file__).parent.parent
TOLD = "told"
"""What a test records by ``record_property`` under this name is printed when all have ended."""
PATIENCE_S = 60.0
"""Longer than anything takes on a busy machine; nothing waits for it that goes well."""
_LOOK_S = 0.02
_OURS = frozenset(
    {"HYPEMAND_CONFIG", "STATE_DIRECTORY", "FORCE_COLOR", "NO_COLOR", "COLUMNS", "PYTHONWARNINGS", "PYTHONUNBUFFERED"}
)


def command(*args: str | Path) -> list[str]:
    """`hypemand` with *args*, by the interpreter that runs the tests; what it forgets to close is told on stderr."""
    return [sys.executable, "-W", "error::ResourceWarning", "-m", "hypemand", *map(str, args)]


def environment(**more: str) -> dict[str, str]:
    """The environment without what steers hypemand, and with *more*."""
    return {key: value for key, value in os.environ.items() if key not in _OURS} | more


@frozen
class Ran:
    """A command that has ended."""

    status: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """Its stdout, which must be one JSON document."""
        return json.loads(self.stdout)


async def run_cli(*args: str | Path, env: Mapping[str, str] | None = None) -> Ran:
    """Run one command to its end."""
    with trio.fail_after(PATIENCE_S):
        done = await trio.run_process(
            command(*args),
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            cwd=ROOT,
            env=environment(**(env or {})),
        )
    return Ran(done.returncode, done.stdout.decode(), done.stderr.decode())


async def wait_until(holds: Callable[[], object], what: str, within_s: float = PATIENCE_S) -> None:
    """Wait until *holds* does; *what* is told when it never does."""
    with trio.move_on_after(within_s):
        while not holds():
            await trio.sleep(_LOOK_S)
        return
    raise AssertionError(f"not within {within_s} s: {what}")


@frozen
class DaemonProcess:
    """A daemon in a process of its own; its log is in *log*, one JSON object a line."""

    process: trio.Process
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def lines(self) -> list[dict[str, Any]]:
        """What it has logged so far; a line that is no JSON object is an error."""
        whole = self.log.read_text().rpartition("\n")[0]
        lines = [json.loads(line) for line in whole.splitlines()]
        assert all(isinstance(line, dict) for line in lines), whole
        return lines

    def logged(self, event: str, *, since: int = 0, **facts: Any) -> list[dict[str, Any]]:
        """Lines of *event* with *facts*, from line number *since* on."""
        return [
            line
            for line in self.lines()[since:]
            if line["event"] == event and all(line.get(key) == value for key, value in facts.items())
        ]

    def mark(self) -> int:
        """How many lines it has logged: a *since* for what comes next."""
        return len(self.lines())

    async def wait_for(self, event: str, *, since: int = 0, times: int = 1, **facts: Any) -> dict[str, Any]:
        """Wait until it has logged *event* with *facts* so many *times*, and return the last of them."""

        def there() -> bool:
            assert self.alive or len(self.logged(event, since=since, **facts)) >= times, self._told(event)
            return len(self.logged(event, since=since, **facts)) >= times

        try:
            await wait_until(there, event)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log.read_text()}") from None
        return self.logged(event, since=since, **facts)[times - 1]

    def _told(self, event: str) -> str:
        return f"ended with {self.process.returncode} before it logged {event!r}"

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    async def ended(self, within_s: float = PATIENCE_S) -> int:
        """Its exit status, once it has ended by itself."""
        with trio.move_on_after(within_s):
            return await self.process.wait()
        raise AssertionError(f"still running after {within_s} s\n{self.log.read_text()}")

    async def stop(self) -> None:
        """SIGTERM; it must end well."""
        self.send(signal.SIGTERM)
        assert await self.ended() == 0, self.log.read_text()

    async def kill(self) -> None:
        """SIGKILL, and return once it is gone."""
        self.process.kill()
        with trio.CancelScope(shield=True):
            await self.process.wait()


@asynccontextmanager
async def running_daemon(
    config: Path,
    *,
    stderr: int | None = None,
    env: Mapping[str, str] | None = None,
    listening: socket.socket | None = None,
) -> AsyncIterator[DaemonProcess]:
    """``hypemand run`` on *config*, until the end of the block; killed then, if it still runs.

    Args:
        stderr: A descriptor for its log instead of a file.
        listening: A socket that is handed over to it, as a service manager does.
    """
    number = len(list(config.parent.glob("daemon-*.log")))
    log = config.parent / f"daemon-{number}.log"
    with log.open("wb") as file:
        process = await trio.lowlevel.open_process(
            [*([] if listening is None else handing_over(listening)), *command("run", "--config", config)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=file if stderr is None else stderr,
            cwd=ROOT,
            env=environment(**(env or {})),
            pass_fds=() if listening is None else (listening.fileno(),),
        )
    daemon = DaemonProcess(process, log)
    try:
        yield daemon
    finally:
        await daemon.kill()
        with trio.CancelScope(shield=True):
            await no_guard_of(daemon.pid)
    daemon.lines()


def handing_over(listening: socket.socket) -> list[str]:
    """What to put before a command, so that it finds *listening* as sd_listen_fds(3) says."""
    program = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3);"
        "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1', LISTEN_FDNAMES='hypemand.socket');"
        "os.execv(sys.argv[2], sys.argv[2:])"
    )
    return [sys.executable, "-c", program, str(listening.fileno())]


def guards_of(pid: int) -> list[int]:
    """Process ids of the guards of the daemon *pid*, which may have ended."""
    return [int(home.name) for home in Path("/proc").glob("[0-9]*") if _guarded_by(home) == str(pid)]


def _guarded_by(home: Path) -> str | None:
    with suppress(OSError):
        arguments = (home / "cmdline").read_text().split("\0")
        if len(arguments) > 6 and arguments[3].endswith("/guard.py"):
            return arguments[6]
    return None


def children_of(pid: int) -> list[int]:
    """Process ids of the children of *pid*."""
    found = []
    for home in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if int((home / "stat").read_text().rpartition(") ")[2].split()[1]) == pid:
                found.append(int(home.name))
    return found


async def no_guard_of(pid: int, within_s: float = 5.0) -> None:
    """Wait until the guards of the dead daemon *pid* have ended; one that tries on is killed with what it started."""
    with trio.move_on_after(within_s):
        while guards_of(pid):
            await trio.sleep(_LOOK_S)
    for guard in guards_of(pid):
        for process in (guard, *children_of(guard)):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


RUN_NOW = """
[[schedules]]
instance = "web-1"
interval = "1h"
first_run = "now"
retention = { max_count = 3 }
"""
"""A schedule whose first run is at once, and whose second never comes by itself."""

ALONE = "guard = false"
"""For ``[runs]``: when the daemon is killed, nobody comes to settle its runs."""

HOURLY_MANY = RUN_NOW.replace("web-1", "web-*")
"""The same for every guest whose name begins so."""

SLOW = 'copy_rate = "8KiB"'
"""For a backend: a capture of the lab's instance then takes 40 s, unless it is cut short."""


@frozen
class Lab:
    """A config on the embedded backend in a directory of its own, and what becomes of it. Sizes are small."""

    directory: Path

    @property
    def config(self) -> Path:
        return self.directory / "config.toml"

    @property
    def state(self) -> Path:
        return self.directory / "state"

    @property
    def root(self) -> Path:
        return self.directory / "lab"

    def write(
        self,
        schedules: str = RUN_NOW,
        *,
        instances: Mapping[str, str] | tuple[str, ...] = ("web-1",),
        backend: str = "",
        runs: str = "",
        min_free: str = "1MiB",
    ) -> "Lab":
        """Write the config, whole.

        Args:
            instances: To be made; as a mapping, with their states.
            backend: More lines for the backend's table.
            runs: More lines for ``[runs]``; `ALONE` for a daemon that may be killed for good.
        """
        states = instances if isinstance(instances, Mapping) else dict.fromkeys(instances, "Running")
        tables = ", ".join(
            f'{name} = {{ state = "{state}", memory = "64KiB", disk = "256KiB" }}' for name, state in states.items()
        )
        self.replace(f"""
state_dir = "state"
[runs]
min_free = "{min_free}"
{runs}
[backends.lab]
type = "embedded"
root = "lab"
instances = {{ {tables} }}
{backend}
{schedules}
""")
        return self

    def replace(self, text: str) -> None:
        """Replace the config at once, as an editor does."""
        new = self.config.with_suffix(".new")
        new.write_text(text)
        new.replace(self.config)

    # The state directory.

    def schedule_file(self, instance: str = "web-1") -> Path:
        return self.state / "schedules" / f"{instance}.json"

    def schedule(self, instance: str = "web-1") -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.schedule_file(instance).read_text())
        return document

    def edit(self, instance: str = "web-1", **keys: Any) -> None:
        """Edit a schedule's file by hand."""
        path = self.schedule_file(instance)
        new = path.with_name(f".{path.name}.hand")
        new.write_text(json.dumps(self.schedule(instance) | keys))
        new.replace(path)

    def make_due(self, daemon: DaemonProcess, *instances: str) -> None:
        """Have the next runs begin now: the way that is there for operators, a hand edit and SIGHUP."""
        for instance in instances or ("web-1",):
            self.edit(instance, next_run_at=instant(datetime.now(UTC)))
        daemon.send(signal.SIGHUP)

    def prepare(self, instance: str = "web-1", **keys: Any) -> None:
        """Write a schedule's file before there is a daemon; as its entry in the config makes it, but for *keys*."""
        now = datetime.now(UTC)
        document = {
            "instance_id": instance,
            "interval": "1h",
            "retention": {"max_count": 3},
            "created_at": instant(now - timedelta(days=2)),
            "updated_at": instant(now - timedelta(days=2)),
            "next_run_at": instant(now + timedelta(minutes=30)),
            "backend": "lab",
            "managed_by": "config",
            "settings": {},
            "format": 1,
        }
        path = self.schedule_file(instance)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.write_text(json.dumps(document | keys))

    def log_lines(self, event: str) -> list[dict[str, Any]]:
        """The run log's lines of *event*."""
        path = self.state / "runs.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if line["event"] == event]

    def history(self, instance: str = "web-1") -> list[dict[str, Any]]:
        """Finished lines of *instance*, oldest first."""
        return [line for line in self.log_lines("finished") if line["instance_id"] == instance]

    async def recorded(self, times: int = 1, instance: str = "web-1") -> None:
        """Wait until so many runs are in the history and the last is in the schedule file, which can be edited then."""

        def written() -> bool:
            runs = self.history(instance)
            return len(runs) == times and self.schedule(instance).get("last_run_at") == runs[-1]["started_at"]

        await wait_until(written, f"{times} runs of {instance} recorded")

    def started(self) -> list[dict[str, Any]]:
        return self.log_lines("started")

    # The backend.

    def instance_file(self, instance: str = "web-1") -> Path:
        return self.root / "instances" / instance / "instance.json"

    def guest(self, instance: str = "web-1") -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.instance_file(instance).read_text())
        return document

    def guest_state(self, instance: str = "web-1") -> str:
        return str(self.guest(instance)["state"])

    def set_guest_state(self, state: str, instance: str = "web-1") -> None:
        """What an operator does by hand."""
        self.instance_file(instance).write_text(json.dumps({"state": state}))

    def snapshots(self, instance: str = "web-1") -> list[str]:
        """Names of the directories of complete snapshots."""
        return sorted(path.name for path in (self.root / "snapshots" / instance).glob("[!.]*"))

    def leftovers(self) -> list[str]:
        """Whatever is hidden among the snapshots: partial ones, and those half deleted."""
        return sorted(path.name for path in (self.root / "snapshots").glob("*/.*"))

    async def in_mid_capture(self, instance: str = "web-1") -> None:
        """Wait until the guest stands still and bytes are being copied."""
        home = self.root / "snapshots" / instance
        await wait_until(lambda: list(home.glob(".*.partial/memory")), f"capture of {instance} begins")
        assert self.guest_state(instance) == "Paused"

    def copy_to(self, directory: Path) -> "Lab":
        """All of it, at another place."""
        shutil.copytree(self.directory, directory, ignore=shutil.ignore_patterns("*.sock"))
        return Lab(directory)


def instant(at: datetime) -> str:
    """*at* as state files have it."""
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
