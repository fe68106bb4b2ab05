"""A daemon that serves its API over TCP and the socket, for many tests. A helper for tests, not a test."""

import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
from attrs import frozen

from tests.processes import ALONE, PATIENCE_S, ROOT, Lab, command, environment

TOKEN = "laptop-0123456789abcdef"
OTHER_TOKEN = "My API Key"  # what the documented example in Go shows, word for word


@frozen
class ServingLab(Lab):
    """A lab whose daemon also listens on TCP."""

    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def socket(self) -> Path:
        return self.directory / "api.sock"

    @property
    def log(self) -> str:
        return (self.directory / "daemon.log").read_text()


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


@contextmanager
def serving_lab(directory: Path, schedules: str, instances: tuple[str, ...]) -> Iterator[ServingLab]:
    """The lab, its daemon answering, until the end of the block; stopped then, which must end well."""
    lab = ServingLab(directory, free_port())
    tokens = directory / "tokens"
    tokens.write_text(f"laptop:{TOKEN}\nrobot:{OTHER_TOKEN}\n")
    tokens.chmod(0o600)
    lab.write(schedules, instances=instances, runs=ALONE)
    api = f'[api]\nsocket = "api.sock"\nlisten = "127.0.0.1:{lab.port}"\ntokens_file = "tokens"\n'
    lab.replace(lab.config.read_text().replace("[runs]", f"{api}[runs]"))
    with (directory / "daemon.log").open("wb") as log:
        daemon = subprocess.Popen(
            command("run", "--config", lab.config), stderr=log, stdin=subprocess.DEVNULL, cwd=ROOT, env=environment()
        )
    try:
        _wait_for_answer(lab, daemon)
        yield lab
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(PATIENCE_S) == 0, lab.log
    finally:
        daemon.kill()
        daemon.wait()


def _wait_for_answer(lab: ServingLab, daemon: "subprocess.Popen[bytes]") -> None:
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until and daemon.poll() is None:
        with suppress(httpx.TransportError):
            if httpx.get(f"{lab.url}/health").status_code == 200 and lab.socket.exists():
                return
        time.sleep(0.05)
    raise AssertionError(f"it does not answer\n{lab.log}")
