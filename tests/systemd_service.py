"""hypemand as the service that docs/install.md makes of it, in a booted systemd. A helper for tests, not a test."""

import fcntl
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attrs import frozen

from tests.systemd_box import SYSTEM_PYTHON, Box, booted

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "install.md"
CONFIG = "/etc/hypemand/config.toml"
STATE = "/var/lib/hypemand"
_INSTALLED = (
    "opt/hypemand",
    "usr/local/bin/hypemand",
    "usr/local/lib/systemd/system",
    "usr/local/lib/sysusers.d",
    "usr/local/lib/tmpfiles.d",
    *(f"etc/{name}" for name in ("passwd", "group", "shadow", "gshadow", "hypemand")),
)
NO_NETWORK = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/out/wheels", "PIP_NO_CACHE_DIR": "1"}
"""All in which an installation in a box differs from the page: pip takes what it needs from a directory."""


def page_commands(heading: str) -> list[str]:
    """The shell commands below *heading* of docs/install.md, word for word, a text for each block."""
    sections = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
    (section,) = [part for part in sections if part.startswith(f"{heading}\n")]
    return re.findall(r"^```sh\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)


def make_wheels(directory: Path) -> None:
    """This checkout's wheel, and those that it needs, for the system's Python."""
    pip = [sys.executable, "-m", "pip", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", directory, ROOT], check=True)
    (wheel,) = directory.glob("hypemand-*.whl")
    tell = "import sys; print('%d.%d' % sys.version_info[:2])"
    version = subprocess.run([SYSTEM_PYTHON, "-c", tell], check=True, capture_output=True, text=True).stdout.strip()
    only = ["--only-binary=:all:", "--python-version", version]
    subprocess.run([*pip, "download", *only, "-d", directory, wheel], check=True)


def do_as_the_page_says(box: Box, commands: str) -> str:
    """Run *commands* of the page where the wheels are."""
    settings = " ".join(f"{name}={value}" for name, value in NO_NETWORK.items())
    return box.sh(f"export {settings}; cd /out/wheels\n{commands}")


def installed_once(shared: Path) -> Path:
    """A directory with the files of an installed hypemand, and the wheels that it was installed from.

    Args:
        shared: A directory of all processes that run tests: the first one installs.
    """
    home = shared / "hypemand-installed"
    with (shared / "hypemand-installed.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not home.exists():
            with booted() as box:
                make_wheels(box.out / "wheels")
                do_as_the_page_says(box, page_commands("Install")[0])
                box.sh(f"mkdir /out/base; cd /; tar -cf - {' '.join(_INSTALLED)} | tar -xf - -C /out/base")
                subprocess.run(["cp", "-a", "--", box.out, home], check=True)
    return home


@frozen
class Service:
    """hypemand in *box*. Its guests are directories in its state directory, unless *lab* says otherwise."""

    box: Box

    def configure(
        self,
        *,
        guests: str = "web-1",
        schedule: str = 'first_run = "now"',
        runs: str = "",
        backend: str = "",
        lab: str = f"{STATE}/lab",
        more: str = "",
        interval: str = "1h",
    ) -> None:
        """Write the config, whole. There is 1 MiB to copy of each guest; *backend* may say how fast."""
        size = 'memory = "256KiB", disk = "768KiB"'
        instances = ", ".join(f'{name} = {{ state = "Running", {size} }}' for name in guests.split())
        self.box.write(
            CONFIG,
            f"""
[runs]
min_free = "64KiB"
{runs}
[backends.lab]
type = "embedded"
root = "{lab}"
instances = {{ {instances} }}
{backend}
[[schedules]]
instance = "*"
backend = "lab"
interval = "{interval}"
retention = {{ max_count = 3 }}
{schedule}
{more}
""",
        )

    def drop_in(self, text: str, name: str = "test") -> None:
        """Put a drop-in beside the unit."""
        self.box.write(f"/etc/systemd/system/hypemand.service.d/{name}.conf", text)
        self.box.run("systemctl", "daemon-reload")

    def start(self) -> None:
        """Start it; that must succeed."""
        self.box.run("systemctl", "start", "hypemand")

    def hypemand(self, *args: str) -> str:
        """Run a command of hypemand's as root, which must succeed; stdout and stderr come together."""
        return self.box.run("/usr/local/bin/hypemand", *args)

    def history(self) -> list[dict[str, Any]]:
        """The runs recorded, as the files have them."""
        lines = self.box.path(f"{STATE}/runs.jsonl")
        found = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
        return [line for line in found if line["event"] == "finished"]

    def guest_state(self, guest: str = "web-1", lab: str = f"{STATE}/lab") -> str:
        """What its directory says; empty where there is none yet."""
        path = self.box.path(f"{lab}/instances/{guest}/instance.json")
        return str(json.loads(path.read_text())["state"]) if path.exists() else ""

    def in_mid_capture(self) -> None:
        """Wait until web-1 stands still."""
        self.box.wait_until(lambda: self.guest_state() == "Paused", "web-1 is paused")

    def recorded(self, count: int) -> None:
        """Wait until so many runs are in the history."""
        self.box.wait_until(lambda: len(self.history()) >= count, f"{count} runs are recorded")

    def main_pid(self) -> int:
        """The daemon's process id inside; 0 while there is none."""
        return int(self.box.show("hypemand", "MainPID"))

    def is_active(self) -> bool:
        """Whether systemd calls it active."""
        return self.box.show("hypemand", "ActiveState") == "active"

    def logged(self, event: str) -> list[dict[str, Any]]:
        """Its entries of *event* in the journal, oldest first."""
        return [entry for entry in self.box.journal("hypemand") if entry.get("HYPEMAND_EVENT") == event]

    def order(self, *needles: str) -> list[str]:
        """Those of *needles* that the journal's messages begin with, in its order; systemd's own included."""
        messages = [str(entry["MESSAGE"]) for entry in self.box.journal("hypemand")]
        return [needle for text in messages for needle in needles if text.startswith(needle)]


@contextmanager
def booted_with_hypemand(installed: Path, more: Path | None = None) -> Iterator[Service]:
    """A booted systemd with hypemand installed, and not started."""
    with booted(installed / "base", more) as box:
        yield Service(box)
