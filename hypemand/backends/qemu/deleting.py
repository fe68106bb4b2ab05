"""Deleting a snapshot: from the disks that have it, then from the catalog. What was cut short in between is finished.

A file beside the manifest tells that a deletion has begun: without it, a
snapshot that is gone from its disk was deleted by somebody else, and what the
catalog has of it is left alone.
"""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

import structlog
from attrs import frozen

from hypemand.backends.base import BackendError
from hypemand.backends.catalog import Catalog, Manifest, sync_tree
from hypemand.backends.qemu import images
from hypemand.backends.qemu.disks import Disk, read_disks
from hypemand.backends.qemu.jobs import delete, dismiss, finished
from hypemand.backends.qemu.manifest import files_of, is_listed, shares
from hypemand.backends.qemu.monitors import Monitors
from hypemand.backends.qemu.threads import in_thread
from hypemand.backends.qmp import MonitorAbsent
from hypemand.core.model import InstanceId

MARK = "deleting"
_log = structlog.get_logger()


@frozen(eq=False)
class Deleting:
    """Deletes the snapshots of one backend.

    Attributes:
        stopped_disks: The disks of a guest at whose monitor nobody listens, and those that manifests name.
    """

    catalog: Catalog
    monitors: Monitors
    stopped_disks: Callable[[InstanceId, MonitorAbsent, Sequence[Manifest]], Awaitable[Sequence[Disk]]]

    async def delete(self, manifest: Manifest) -> None:
        """Delete it from the disks that have it, then from the catalog. Another one by its name is left alone."""
        await in_thread(self._mark, manifest)
        try:
            disks, ours = await self._delete_from_disks(manifest)
        except BackendError:
            await in_thread(self._unmark, manifest)
            raise
        if away := sorted(set(files_of(manifest)) - {disk.file for disk in disks}):
            _log.warning("a deleted snapshot may be left in disks that are not attached", tag=manifest.name, disks=away)
        if others := [disk.device for disk in disks if disk.find(manifest.name) and disk not in ours]:
            _log.warning("another snapshot has the name of a deleted one; left alone", tag=manifest.name, disks=others)
        await in_thread(self.catalog.delete, manifest.instance_id, manifest.id)

    async def _delete_from_disks(self, manifest: Manifest) -> tuple[Sequence[Disk], Sequence[Disk]]:
        """Returns the disks, and those of them that had it."""
        try:
            async with self.monitors.use(manifest.instance_id) as monitor:
                disks: Sequence[Disk] = await read_disks(monitor)
                if ours := shares(disks, manifest):
                    # The first disk, by which it is listed, comes last: what is half deleted is tried again.
                    await delete(monitor, _job(manifest), manifest.name, ours[::-1])
        except MonitorAbsent as absent:
            disks = await self.stopped_disks(manifest.instance_id, absent, [manifest])
            ours = shares(disks, manifest)
            for disk in ours[::-1]:
                await images.delete(disk, manifest.name)
        return disks, ours

    async def finish(self, instance: InstanceId) -> None:
        """Finish deletions that were cut short. One that is still listed stays: retention decides on it anew."""
        for manifest in await in_thread(self.catalog.manifests, instance):
            if await in_thread(self.is_marked, manifest):
                try:
                    await self._finish(manifest)
                except BackendError as error:
                    _log.warning(
                        "a deletion that was cut short is not finished yet",
                        instance_id=instance,
                        snapshot_name=manifest.name,
                        error=str(error),
                    )

    async def _finish(self, manifest: Manifest) -> None:
        try:
            async with self.monitors.use(manifest.instance_id) as monitor:
                await finished(monitor, _job(manifest))
                await dismiss(monitor, _job(manifest))
                disks: Sequence[Disk] = await read_disks(monitor)
        except MonitorAbsent as absent:
            disks = await self.stopped_disks(manifest.instance_id, absent, [manifest])
        seen = files_of(manifest)[0] in {disk.file for disk in disks}
        if seen and not is_listed(disks, manifest):
            await in_thread(self.catalog.delete, manifest.instance_id, manifest.id)
        else:
            await in_thread(self._unmark, manifest)

    def is_marked(self, manifest: Manifest) -> bool:
        """Whether its deletion has begun. Blocking."""
        return (self.catalog.home(manifest.instance_id, manifest.id) / MARK).exists()

    def _mark(self, manifest: Manifest) -> None:
        home = self.catalog.home(manifest.instance_id, manifest.id)
        with suppress(OSError):  # a full disk keeps nobody from deleting
            (home / MARK).touch(mode=0o600)
            sync_tree(home, deep=False)

    def _unmark(self, manifest: Manifest) -> None:
        (self.catalog.home(manifest.instance_id, manifest.id) / MARK).unlink(missing_ok=True)


def _job(manifest: Manifest) -> str:
    return f"hypemand-delete-{manifest.id}"
