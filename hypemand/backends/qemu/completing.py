"""What is left of a capture once the guest runs again: its memory still being saved, and a look at how it goes on."""

from contextlib import suppress

import trio
from attrs import frozen

from hypemand.backends.base import BackendError, BackendUnavailable, Captured, CaptureFailed
from hypemand.backends.catalog import Catalog, Manifest
from hypemand.backends.qemu import background, memory_file, settling, stuck
from hypemand.backends.qemu.disks import read_disks
from hypemand.backends.qemu.manifest import MEMORY, STOPPED, completed, files_of, shares
from hypemand.backends.qemu.monitors import Monitors
from hypemand.backends.qemu.settings import BACKGROUND
from hypemand.backends.qemu.threads import in_thread
from hypemand.backends.qmp import MonitorAbsent
from hypemand.core.model import InstanceId

STALL_S = 30.0
"""A memory save that writes nothing for so long is given up."""
END_PATIENCE_S = 2.0
_FIRST_LOOK_S, _LONGEST_LOOK_S = 0.02, 1.0


@frozen
class Completion:
    """Completes captures of the guests of one backend."""

    catalog: Catalog
    monitors: Monitors

    async def complete(self, captured: Captured) -> Captured:
        """Wait for memory that is still being saved, and look whether the guest goes on well."""
        instance, run_id = captured.snapshot.instance_id, captured.snapshot.id
        manifest = await self._find_draft(instance, run_id)
        if manifest.details["mode"] == STOPPED:
            return captured
        if manifest.details["mode"] == BACKGROUND:
            manifest = await self._finish_in_background(manifest)
        return Captured(manifest.snapshot(), captured.freeze_s, await self._look_after(manifest))

    async def _finish_in_background(self, draft: Manifest) -> Manifest:
        memory = self.catalog.partial(draft.instance_id, draft.id) / MEMORY
        try:
            await in_thread(memory_file.reserve_again, memory, draft.details["memory_bytes"])
            progress = await self._wait_saved(draft)
            # Durable before the manifest says that it is whole: a power failure must not leave half of it listed.
            size = await in_thread(memory_file.trim, memory)
            _check_whole(progress, size)
            async with self.monitors.use(draft.instance_id) as monitor:
                whole = completed(draft, await read_disks(monitor), size)
                await write_whole(self.catalog, whole)
                await settling.tidy(monitor, whole)
        except BaseException:
            with trio.move_on_after(END_PATIENCE_S, shield=True), suppress(BackendError):
                async with self.monitors.use(draft.instance_id) as monitor:
                    await settling.end_save(monitor, memory)
            raise
        return whole

    async def _wait_saved(self, draft: Manifest) -> background.Progress:
        """Wait by short looks: others may want the monitor in between."""
        written, since, pause_s = -1, trio.current_time(), _FIRST_LOOK_S
        while True:
            with suppress(BackendUnavailable):
                progress = await self._look_at_save(draft)
                if not progress.under_way:
                    return progress
                if progress.written != written:
                    written, since = progress.written, trio.current_time()
            if trio.current_time() - since > STALL_S:
                raise CaptureFailed(f"nothing was saved of the guest's memory for {STALL_S:g} s; given up")
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_LOOK_S)

    async def _look_at_save(self, draft: Manifest) -> background.Progress:
        try:
            async with self.monitors.use(draft.instance_id) as monitor:
                progress = await background.progress_of(monitor)
                trouble = await stuck.find_stuck(monitor)
        except MonitorAbsent as error:
            raise CaptureFailed(f"QEMU has ended while the guest's memory was saved: {error}") from error
        if trouble is not None and trouble.full:
            # Waiting longer would only make the guest stand still for longer.
            raise CaptureFailed(await self._take_back(draft))
        if not progress.under_way and progress.status != "completed":
            raise background.failure(progress)
        return progress

    async def _look_after(self, manifest: Manifest) -> tuple[str, ...]:
        """Look at the guest's next writes. Our snapshot may have taken the room for them."""
        scarce = await in_thread(stuck.is_scarce, files_of(manifest))
        try:
            async with self.monitors.use(manifest.instance_id) as monitor:
                trouble = await stuck.watch(monitor, stuck.SCARCE_LOOK_S if scarce else stuck.LOOK_S)
        except BackendUnavailable:
            return ()  # the snapshot is whole; what has become of the guest is for the next run to find
        if trouble is None:
            return ()
        if trouble.full:
            raise CaptureFailed(await self._take_back(manifest))
        return ("the guest stands still at an I/O error that is none of space (QEMU: io-error); it is left alone",)

    async def _take_back(self, manifest: Manifest) -> str:
        """Delete a snapshot that has filled the guest's disk from there, let the guest go on once, and tell of it."""
        async with self.monitors.use(manifest.instance_id) as monitor:
            disks = await read_disks(monitor)
            ours = shares(disks, manifest) or [disk for disk in disks if disk.find(manifest.name)]
            full = ", ".join(disk.file for disk in disks if disk.out_of_room)
            try:
                await settling.clear(monitor, manifest, ours)
                deleted = "it was deleted"
            except BackendError as error:
                deleted = f"it could not be deleted yet ({error})"
            outcome = await stuck.continue_once(monitor)
        return f"the snapshot left no room for the guest's writes to {full}; {deleted}, and {outcome}"

    async def _find_draft(self, instance: InstanceId, run_id: str) -> Manifest:
        draft = await in_thread(self.catalog.draft, instance, run_id)
        if draft is None:
            raise CaptureFailed(f"the catalog has lost what was begun of run {run_id}")
        return draft


def _check_whole(progress: background.Progress, size: int) -> None:
    if not background.is_whole(progress, size):
        raise CaptureFailed("the guest's memory was not saved to the end: somebody else has migrated it meanwhile")


async def write_whole(catalog: Catalog, manifest: Manifest) -> None:
    """Write a completed manifest.

    Raises:
        CaptureFailed: The catalog's filesystem can't take it.
    """
    try:
        await in_thread(catalog.write_manifest, manifest)
    except BackendUnavailable as error:
        raise CaptureFailed(str(error)) from error
