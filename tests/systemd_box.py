"""A real systemd, booted for a test, on a throw-away copy of this machine's root. A helper for tests, not a test."""

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen

BOX = Path(__file__).parent / "systemd_box" / "box.sh"
PATIENCE_S = 60.0
"""Longer than anything takes on a busy machine; nothing waits for it that goes well."""
SYSTEM_PYTHON = "/usr/bin/python3"
_PROGRAMS = ("systemd-analyze", "systemctl", "dbus-daemon", "unshare", "nsenter", "setsid")


def require_systemd() -> None:
    """Skip where a systemd can't be booted; fail where it must be."""
    missing = _missing()
    if missing:
        text = f"no systemd can be booted here: {missing}"
        if os.environ.get("HYPEMAND_REQUIRE_SYSTEMD") == "1":
            pytest.fail(text)
        pytest.skip(text)


def _missing() -> str | None:
    if absent := [program for program in _PROGRAMS if shutil.which(program) is None]:
        return f"{' and '.join(absent)} not found; on Debian: apt-get install systemd dbus util-linux"
    if os.geteuid() != 0:
        return "it takes root"
    if not any(line.split()[2] == "cgroup2" for line in Path("/proc/mounts").read_text().splitlines()):
        return "it takes cgroup2"
    venv = subprocess.run([SYSTEM_PYTHON, "-c", "import ensurepip"], check=False, capture_output=True)
    if venv.returncode != 0:
        return f"{SYSTEM_PYTHON} makes no virtual environment; on Debian: apt-get install python3-venv"
    return None


@frozen
class Box:
    """A booted systemd. Its files are at *root*, as long as it runs; *out* is ``/out`` inside."""

    home: Path
    root: Path

    @property
    def out(self) -> Path:
        """The directory that is ``/out`` inside."""
        return self.home / "out"

    def begin(self, *command: str) -> subprocess.Popen[str]:
        """Begin *command* inside; stdout and stderr come together."""
        return subprocess.Popen(
            [BOX, "in", self.home, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def ask(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run *command* inside to its end, however that is."""
        with self.begin(*command) as process:
            try:
                told, _ = process.communicate(timeout=4 * PATIENCE_S)
            finally:
                process.kill()
        return subprocess.CompletedProcess(command, process.returncode, told)

    def run(self, *command: str) -> str:
        """Run *command* inside, which must succeed; what it has printed."""
        done = self.ask(*command)
        assert done.returncode == 0, f"{' '.join(command)}: exit status {done.returncode}\n{done.stdout}"
        return done.stdout

    def sh(self, script: str) -> str:
        """Have the shell run *script*, up to the first command that fails; none may."""
        return self.run("sh", "-euc", script)

    def path(self, inside: str) -> Path:
        """Where a file of the box is out here. Symbolic links in it may not be absolute."""
        return self.root / inside.lstrip("/")

    def write(self, inside: str, text: str) -> None:
        """Write a file at once, as an editor does."""
        path = self.path(inside)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.new")
        new.write_text(text)
        new.replace(path)

    def show(self, unit: str, name: str) -> str:
        """A property of *unit*."""
        return self.run("systemctl", "show", unit, "-P", name).strip()

    def journal(self, unit: str) -> list[dict[str, Any]]:
        """The journal of *unit*, with systemd's own lines on it, oldest first."""
        told = self.run("journalctl", "-u", unit, "-o", "json", "--no-pager", "-q", "--all")
        return [json.loads(line) for line in told.splitlines()]

    def wait_until(self, holds: Callable[[], object], what: str, within_s: float = PATIENCE_S) -> None:
        """Wait until *holds* does; the journal of hypemand is told when it never does."""
        until = time.monotonic() + within_s
        while not holds():
            if time.monotonic() > until:
                told = self.ask("journalctl", "-u", "hypemand", "--no-pager", "-q", "-o", "short-precise").stdout
                raise AssertionError(f"not within {within_s:g} s: {what}\n{told}")
            time.sleep(0.1)


@contextmanager
def booted(base: Path | None = None, more: Path | None = None) -> Iterator[Box]:
    """A systemd that is up, until the end of the block.

    Args:
        base, more: Directories whose files are laid over the machine's before it boots.
    """
    home = Path(tempfile.mkdtemp(prefix="hypemand-box-"))
    for name, directory in (("base", base), ("more", more)):
        if directory is not None:
            home.joinpath(name).symlink_to(directory)
    try:
        up = subprocess.run([BOX, "up", home], check=False, capture_output=True, text=True)
        assert up.returncode == 0, up.stdout + up.stderr
        leader = home.joinpath("pids").read_text().split()[1]
        yield Box(home, Path(f"/proc/{leader}/root"))
    finally:
        subprocess.run([BOX, "down", home], check=False, capture_output=True)
        shutil.rmtree(home, ignore_errors=True)
