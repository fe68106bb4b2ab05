"""A guest of libvirt, to be captured by the bare call of its binding and by a daemon."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import trio
from attrs import define

from benchmarks.engine_subjects import StagedSubject, Subject
from benchmarks.libvirt_guest import ruled_guest

if TYPE_CHECKING:
    from tests.libvirt_site import Libvirtd

_SNAPSHOT = "<domainsnapshot><name>{}</name><memory snapshot='internal'/></domainsnapshot>"


@define(eq=False)
class LibvirtSubject(StagedSubject):
    """By QEMU's own events, of which libvirt's are a part: it stops the guest before QEMU does."""

    name = "libvirt"
    instance = "libvirt-1"
    _libvirtd: "Libvirtd"

    @classmethod
    @asynccontextmanager
    async def running(cls, directory: Path) -> AsyncIterator[Subject]:
        """A guest, until the end of the block."""
        async with ruled_guest(directory, name=cls.instance, memory_mb=64) as (libvirtd, stage):
            yield cls(f'type = "libvirt"\nuri = "{libvirtd.uri}"\n', stage, libvirtd)

    async def bare(self, tag: str) -> None:
        """One call of the binding, and one to delete it again."""
        await trio.to_thread.run_sync(self._take, tag)

    def _take(self, tag: str) -> None:
        import libvirt  # noqa: PLC0415 - it may not be there

        connection = libvirt.open(self._libvirtd.uri)
        try:
            connection.lookupByName(self.instance).snapshotCreateXML(_SNAPSHOT.format(tag)).delete()
        finally:
            connection.close()
