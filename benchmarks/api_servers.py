"""The servers that are measured: a real daemon with a token and a port, and the bare app, each a process."""

import secrets
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from benchmarks.api_load import Target
from tests.processes import ROOT, DaemonProcess, Lab, environment, running_daemon


def free_port() -> int:
    """A TCP port on 127.0.0.1 that nobody uses just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def write_config(directory: Path, instances: tuple[str, ...], at_once: int = 4) -> tuple[Lab, Target]:
    """A config on the embedded backend that listens on a port, and how to reach it. *at_once*: runs, at most."""
    directory.mkdir(parents=True, exist_ok=True)
    target = Target(free_port(), secrets.token_hex(16))
    tokens = directory / "tokens"
    tokens.write_text(f"bench:{target.token}\n")
    tokens.chmod(0o600)
    concurrency = f"concurrency = {at_once}"  # the backend's own would be half of the overall one
    lab = Lab(directory).write("", instances=instances, runs=concurrency, backend=concurrency)
    api = f'[api]\nlisten = "127.0.0.1:{target.port}"\ntokens_file = "tokens"\n'
    lab.replace(lab.config.read_text() + api)
    return lab, target


@asynccontextmanager
async def serving_daemon(lab: Lab, target: Target) -> AsyncIterator[DaemonProcess]:
    """The daemon, once it answers."""
    async with running_daemon(lab.config) as daemon:
        await until_it_listens(target)
        yield daemon
        await daemon.stop()


@asynccontextmanager
async def serving_bare(body: bytes) -> AsyncIterator[Target]:
    """The bare app, once it answers, with *body* for every answer."""
    target = Target(free_port())
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "benchmarks.api_bare", str(target.port), body.decode()],
        stdin=subprocess.DEVNULL,
        cwd=ROOT,
        env=environment(),
    )
    try:
        await until_it_listens(target)
        yield target
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


async def until_it_listens(target: Target) -> None:
    """Wait until somebody accepts connections there."""
    with trio.fail_after(60):
        while True:
            try:
                stream = await trio.open_tcp_stream("127.0.0.1", target.port)
            except OSError:
                await trio.sleep(0.05)
            else:
                await stream.aclose()
                return
