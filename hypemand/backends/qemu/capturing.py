"""A capture from the pause to the last byte: internal, in the background, or of a guest that is stopped.

What goes wrong on the way is left for `settle`, which comes after every
capture that failed.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog
import trio
from attrs import Factory, frozen

from hypemand.backends.base import (
    BackendError,
    BackendUnavailable,
    Captured,
    CaptureFailed,
    CaptureRequest,
    InvalidState,
)
from hypemand.backends.catalog import Catalog, Manifest, sync_tree
from hypemand.backends.qemu import background, images, memory_file, settling, stuck
from hypemand.backends.qemu.disks import Disk, check_capturable, check_free, read_disks
from hypemand.backends.qemu.jobs import check_alone, frozen_s, save, snapshot_disks
from hypemand.backends.qemu.manifest import MEMORY, STOPPED, completed, files_of, mode_of, new_draft, shares
from hypemand.backends.qemu.monitors import Monitors
from hypemand.backends.qemu.preparing import memory_estimate
from hypemand.backends.qemu.settings import BACKGROUND
from hypemand.backends.qemu.threads import in_thread
from hypemand.backends.qmp import Monitor, MonitorAbsent
from hypemand.core.model import Freezer, InstanceId

STALL_S = 30.0
"""A memory save that writes nothing for so long is given up."""
_FIRST_LOOK_S, _LONGEST_LOOK_S = 0.02, 1.0
_log = structlog.get_logger()
_CANCEL_PATIENCE_S = 2.0


@frozen
class _Ready:
    """What was made ready for a capture in the background, so that nothing has to be read while the guest stands still.

    Attributes:
        uri: By which QEMU knows the memory file that it was handed.
    """

    draft: Manifest
    disks: Sequence[Disk]
    uri: str


@frozen(eq=False)
class Capturing:
    """Captures the guests of one backend.

    Attributes:
        _freezes: How long guests stood still, by QEMU's events.
        _paused: The disks of guests that stand still for us.
    """

    catalog: Catalog
    monitors: Monitors
    _paused: dict[InstanceId, Sequence[str]] = Factory(dict)
    _ready: dict[InstanceId, _Ready] = Factory(dict)
    _freezes: dict[InstanceId, float | None] = Factory(dict)

    async def pause(self, instance: InstanceId, request: CaptureRequest) -> None:
        """Make all ready, leave a mark in QEMU, and stop the guest; the connection is held until the resume."""
        mark = background.paused_mark(request.run_id)
        async with self.monitors.use(instance, hold=True) as monitor:
            if mark in await background.marks(monitor):
                return
            await _check_running(monitor)
            if request.freezes is Freezer.ENGINE:
                await self._make_ready(monitor, instance, request)
                await _check_running(monitor)
            await background.mark(monitor, mark)
            await monitor.execute("stop")

    async def _make_ready(self, monitor: Monitor, instance: InstanceId, request: CaptureRequest) -> None:
        await check_alone(monitor, CaptureFailed)
        disks = await self._capturable(monitor, request)
        draft = await self._draft(monitor, instance, request, disks, await background.parameters(monitor))
        await self._write_draft(draft)
        await background.set_up(monitor)
        path = self.catalog.partial(instance, request.run_id) / MEMORY
        descriptor = await in_thread(memory_file.open_reserved, path, await memory_estimate(monitor))
        try:
            uri = await background.pass_file(monitor, descriptor, background.file_name(request.run_id))
        finally:
            os.close(descriptor)
        await background.mark(monitor, background.saving_mark(request.run_id))
        self._ready[instance] = _Ready(draft, disks, uri)
        self._paused[instance] = files_of(draft)

    async def resume(self, instance: InstanceId) -> None:
        """Let the guest go on where a mark says that it stands still for us, and take the mark away."""
        if self.monitors.holds(instance):
            with suppress(BackendUnavailable):  # by the connection of the pause, which may have been cut
                return await self._resume(instance)
        try:
            await self._resume(instance)
        except MonitorAbsent:
            await self._check_ended(instance)

    async def _check_ended(self, instance: InstanceId) -> None:
        """Nobody listens: make sure that the QEMU has ended. One that lives holds its disks."""
        files = await in_thread(images.present, self._paused.get(instance, ()))
        if not files:
            raise BackendUnavailable("nobody listens at its monitor, and its disks are not seen from here")
        await images.read_images(files)
        _log.warning("QEMU has ended while its guest stood still for us", instance_id=instance)
        self._paused.pop(instance, None)

    async def _resume(self, instance: InstanceId) -> None:
        async with self.monitors.use(instance) as monitor:
            word = (await monitor.execute("query-status"))["status"]
            ours = [mark for mark in await background.marks(monitor) if mark.startswith(background.paused_mark(""))]
            if word not in ("running", "paused"):
                raise InvalidState(f"QEMU is in state {word}: only a paused guest can be resumed")
            if word == "paused" and ours:
                await background.go_on(monitor)
            elif word == "paused":
                _log.warning("the guest was paused by somebody else; it is left so", instance_id=instance)
            for mark in ours:
                await background.unmark(monitor, mark)
            seen = any(event.name == "STOP" for event in monitor.events)
            self._freezes[instance] = frozen_s(monitor.events) if seen else None
        self._paused.pop(instance, None)
        self.monitors.let_go(instance)

    async def capture(self, instance: InstanceId, request: CaptureRequest, files: Sequence[Path]) -> Captured:
        """What the guest has to stand still for. *files*: the disks of a guest that is stopped."""
        if mode_of(request) == STOPPED:
            return await self._capture_stopped(instance, request, files)
        async with self.monitors.use(instance) as monitor:
            if mode_of(request) == BACKGROUND:
                return await self._begin_in_background(monitor, instance, request)
            return await self._capture_internal(monitor, instance, request)

    async def _capture_internal(self, monitor: Monitor, instance: InstanceId, request: CaptureRequest) -> Captured:
        await check_alone(monitor, CaptureFailed)
        disks = await self._capturable(monitor, request)
        draft = await self._draft(monitor, instance, request, disks)
        await self._write_draft(draft)
        first = len(monitor.events)
        try:
            await save(monitor, settling.save_job(request.run_id), request.name, disks)
        except CaptureFailed as error:
            raise CaptureFailed(f"{error}{await self._clear_failed(monitor, draft)}") from error
        freeze_s = frozen_s(monitor.events[first:])
        whole = completed(draft, await read_disks(monitor))
        await self._write(whole)
        await settling.tidy(monitor, whole)
        return Captured(whole.snapshot(), freeze_s)

    async def _clear_failed(self, monitor: Monitor, draft: Manifest) -> str:
        """Clear up a save that failed at once: it may have filled the disk, and the guest may stand still for that."""
        try:
            await settling.clear(monitor, draft, [d for d in await read_disks(monitor) if d.find(draft.name)])
            trouble = await stuck.watch(monitor, stuck.LOOK_S)
            if trouble is not None and trouble.full:
                return f"; it left no room for the guest's writes; {await stuck.continue_once(monitor)}"
        except BackendError as error:
            return f"; what is left of it is removed when the run is settled ({error})"
        return ""

    async def _begin_in_background(self, monitor: Monitor, instance: InstanceId, request: CaptureRequest) -> Captured:
        ready = self._ready.pop(instance)
        try:
            await snapshot_disks(monitor, request.name, ready.disks)
            await background.begin(monitor, ready.uri)
        except BaseException:
            with trio.move_on_after(_CANCEL_PATIENCE_S, shield=True), suppress(BackendError):
                await background.end(monitor)
            raise
        return Captured(ready.draft.snapshot())

    async def _capture_stopped(self, instance: InstanceId, request: CaptureRequest, files: Sequence[Path]) -> Captured:
        try:
            disks = await images.read_images(files)
            check_capturable(disks)
            check_free(disks, request.name)
            draft = new_draft(
                instance,
                request,
                disks,
                {"name": "qemu"},
                home=self.catalog.home(instance, request.run_id),
            )
            await self._write_draft(draft)
            for disk in disks:
                await images.create(disk, request.name)
            whole = completed(draft, await images.read_images(files))
        except images.ImageInUse as error:
            raise CaptureFailed(f"the guest was started during its capture: {error}") from error
        await self._write(whole)
        return Captured(whole.snapshot())

    async def complete(self, captured: Captured) -> Captured:
        """Wait for memory that is still being saved, and look whether the guest goes on well."""
        instance, run_id = captured.snapshot.instance_id, captured.snapshot.id
        manifest = await self._find_draft(instance, run_id)
        if manifest.details["mode"] == STOPPED:
            return captured
        freeze_s = captured.freeze_s
        if manifest.details["mode"] == BACKGROUND:
            freeze_s = self._freezes.pop(instance, None)
            manifest = await self._finish_in_background(manifest)
        return Captured(manifest.snapshot(), freeze_s, await self._look_after(manifest))

    async def _finish_in_background(self, draft: Manifest) -> Manifest:
        try:
            await self._wait_saved(draft)
            size = await in_thread(memory_file.trim, self.catalog.partial(draft.instance_id, draft.id) / MEMORY)
            async with self.monitors.use(draft.instance_id) as monitor:
                whole = completed(draft, await read_disks(monitor), size)
                await self._write(whole)
                await settling.tidy(monitor, whole)
        except BaseException:
            with trio.move_on_after(_CANCEL_PATIENCE_S, shield=True), suppress(BackendError):
                async with self.monitors.use(draft.instance_id) as monitor:
                    await background.end(monitor)
            raise
        return whole

    async def _wait_saved(self, draft: Manifest) -> None:
        """Wait by short looks: others may want the monitor in between."""
        written, since, pause_s = -1, trio.current_time(), _FIRST_LOOK_S
        while True:
            with suppress(BackendUnavailable):
                progress = await self._look_at_save(draft)
                if not progress.under_way:
                    return
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

    async def _capturable(self, monitor: Monitor, request: CaptureRequest) -> Sequence[Disk]:
        disks = await read_disks(monitor)
        check_capturable(disks)
        check_free(disks, request.name)
        return disks

    async def _draft(
        self,
        monitor: Monitor,
        instance: InstanceId,
        request: CaptureRequest,
        disks: Sequence[Disk],
        parameters: Any = None,
    ) -> Manifest:
        uuid = (await monitor.execute("query-uuid"))["UUID"]
        hypervisor = {"name": "qemu", "version": monitor.version, "uuid": uuid}
        home = self.catalog.home(instance, request.run_id)
        return new_draft(instance, request, disks, hypervisor, home=home, parameters=parameters)

    async def _find_draft(self, instance: InstanceId, run_id: str) -> Manifest:
        draft = await in_thread(self.catalog.draft, instance, run_id)
        if draft is None:
            raise CaptureFailed(f"the catalog has lost what was begun of run {run_id}")
        return draft

    async def _write_draft(self, draft: Manifest) -> None:
        """The draft comes before all else, so that a tag found later is known for ours."""
        await in_thread(self._begin, draft)

    def _begin(self, draft: Manifest) -> None:
        directory = self.catalog.begin(draft.instance_id, draft.id)
        self.catalog.write_manifest(draft)
        # After a power failure a tag on the disks must not be without it.
        sync_tree(directory)
        sync_tree(directory.parent, deep=False)
        sync_tree(self.catalog.root, deep=False)

    async def _write(self, manifest: Manifest) -> None:
        try:
            await in_thread(self.catalog.write_manifest, manifest)
        except BackendUnavailable as error:
            raise CaptureFailed(str(error)) from error


async def _check_running(monitor: Monitor) -> None:
    match (await monitor.execute("query-status"))["status"]:
        case "running":
            pass
        case "paused":
            raise InvalidState("somebody else has paused the guest")
        case word:
            raise InvalidState(f"QEMU is in state {word}: only a running guest can be paused")
