"""A guest of a Hypeman server, to be captured by the bare request and by a daemon. The server is that of the tests."""

import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import httpx2
import trio
from attrs import define

from benchmarks.engine_subjects import Freeze, Subject
from benchmarks.ruler import RefusedError
from tests.hypeman_site import WEB, Site, running_server

COPY_S = 0.05


@define(eq=False)
class HypemanSubject(Subject):
    """A thread looks at the server's file of the guest all the time."""

    name = "hypeman"
    who = "hypervisor"
    instance = WEB
    settings: str
    _site: Site

    @classmethod
    @asynccontextmanager
    async def running(cls, directory: Path) -> AsyncIterator[Subject]:
        """A server and a guest, until the end of the block."""
        home = directory / "hypeman-site"
        home.mkdir()
        async with running_server(home) as site:
            site.fault(f"POST /instances/{WEB}/snapshots", takes_s=COPY_S, times=-1)
            settings = f'type = "hypeman"\nurl = "{site.url}"\ntoken_file = "{site.token_file}"\n'
            yield cls(settings, site)

    async def bare(self, tag: str) -> None:
        """One request."""
        headers = {"authorization": f"Bearer {self._site.token_file.read_text().strip()}"}
        async with httpx2.AsyncClient(base_url=self._site.url, headers=headers) as client:
            body = {"kind": "Standby", "name": tag}
            answer = await client.post(f"/instances/{WEB}/snapshots", json=body)
        if answer.status_code != 201:
            raise RefusedError(answer.text)

    async def tidy(self) -> None:
        """Remove what the bare request has made; the daemon's is the daemon's."""
        for kept in self._site.snapshots():
            if "tags" not in kept:
                (self._site.directory / "snapshots" / f"{kept['id']}.json").unlink()
        await trio.lowlevel.checkpoint()

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[Freeze]:
        """Look all the time."""
        seen: list[tuple[str, float]] = []
        over = threading.Event()

        def look() -> None:
            while not over.wait(0.0001):
                state = self._site.state()
                if not seen or seen[-1][0] != state:
                    seen.append((state, time.perf_counter()))

        watcher = threading.Thread(target=look)
        watcher.start()

        async def freeze() -> float:
            await trio.sleep(0.01)
            stood = [at for (before, _), (state, at) in pairwise(seen) if "Running" in (before, state)]
            if len(stood) != 2:
                raise RefusedError(f"the guest was seen {seen}, and not down and up once")
            return stood[1] - stood[0]

        try:
            yield freeze
        finally:
            over.set()
            watcher.join()
