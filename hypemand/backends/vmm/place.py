"""The socket file of a VMM, held open: it is reached whatever becomes of its path, and however long that is."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import trio
from attrs import define, field

from hypemand.backends.vmm.handles import Handle, held_below

if TYPE_CHECKING:
    import httpx2

AT_ONCE = 4
"""Connections to one VMM: both take ten in all, and refuse others."""


def new_http(path: str) -> "httpx2.AsyncClient":
    """What asks whoever listens at *path*."""
    import httpx2  # not for commands that ask no VMM

    transport = httpx2.AsyncHTTPTransport(
        uds=path,
        verify=False,  # there is no TLS on a unix socket, and certificates take time to load
        limits=httpx2.Limits(max_connections=AT_ONCE, max_keepalive_connections=0),
    )
    return httpx2.AsyncClient(
        transport=transport,
        base_url="http://localhost",
        headers={"Accept": "application/json", "Accept-Encoding": "identity"},
        timeout=None,  # that is the caller's
        trust_env=False,
    )


@define(eq=False)
class Place:
    """A socket file. Nobody else ever listens at it: another process would have to make another file.

    Its descriptor is closed when it is over *and* nobody uses it, as its number is another file's then.
    """

    _handle: Handle | None
    _http: "httpx2.AsyncClient" = field(init=False)
    _users: int = field(init=False, default=0)
    _is_over: bool = field(init=False, default=False)

    @_http.default
    def _new_http(self) -> "httpx2.AsyncClient":
        assert self._handle is not None
        return new_http(f"/proc/self/fd/{self._handle.fileno()}")

    @asynccontextmanager
    async def in_use(self) -> AsyncIterator["httpx2.AsyncClient"]:
        """What asks whoever listens there."""
        self._users += 1
        try:
            yield self._http
        finally:
            self._users -= 1
            await self._close_unused()

    async def end(self) -> None:
        """Close it, once nobody uses it any more."""
        self._is_over = True
        await self._close_unused()

    async def _close_unused(self) -> None:
        if self._is_over and not self._users and self._handle is not None:
            with trio.CancelScope(shield=True):  # nothing of it waits for the other side
                await self._http.aclose()
            self._handle = None


def place_of(socket: Path, root: Path | None) -> Place:
    """The file *socket*; below *root*, where that is a VMM's root directory, its links lead nowhere else.

    Raises:
        Unsupported: Too many links.
        OSError: It is not there.
    """
    if root is not None and socket.is_relative_to(root):
        return Place(held_below(root, str(socket.relative_to(root)))[0])
    return Place(Handle(os.open(socket, os.O_PATH | os.O_CLOEXEC)))
