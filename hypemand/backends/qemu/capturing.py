"""A capture from the pause to the resume: internal, in the background, or of a guest that is stopped.

What goes wrong on the way is left for `settle`, which comes after every
capture that failed.
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import structlog
import trio
from attrs import Factory, evolve, frozen

from hypemand.backends.base import (
    BackendError,
    BackendUnavailable,
    Captured,
    CaptureFailed,
    CaptureRequest,
    InvalidState,
)
from hypemand.backends.catalog import Catalog, Manifest
from hypemand.backends.qemu import background, images, settling, stuck
from hypemand.backends.qemu.completing import END_PATIENCE_S, Completion, write_whole
from hypemand.backends.qemu.disks import Disk, check_capturable, check_free, read_disks
from hypemand.backends.qemu.jobs import NameTaken, check_alone, frozen_s, save, snapshot_disks
from hypemand.backends.qemu.manifest import STOPPED, completed, files_of, mode_of, new_draft
from hypemand.backends.qemu.monitors import Monitors
from hypemand.backends.qemu.readying import (
    Ready,
    capturable_disks,
    check_running,
    draft_of,
    make_ready,
    write_draft,
)
from hypemand.backends.qemu.settings import BACKGROUND
from hypemand.backends.qemu.threads import in_thread
from hypemand.backends.qmp import Monitor, MonitorAbsent
from hypemand.core.model import Freezer, InstanceId

_log = structlog.get_logger()


@frozen(eq=False)
class Capturing:
    """Captures the guests of one backend.

    Attributes:
        nothing_made: Runs that failed before there was anything of theirs on a disk: a tag by their name is
            somebody else's.
        _freezes: How long guests stood still, by QEMU's events.
        _paused: The disks of guests that stand still for us.
        _ready: What is ready for the capture of guests that stand still for us.
    """

    catalog: Catalog
    monitors: Monitors
    nothing_made: set[str] = Factory(set)
    _paused: dict[InstanceId, Sequence[str]] = Factory(dict)
    _ready: dict[InstanceId, Ready] = Factory(dict)
    _freezes: dict[InstanceId, float | None] = Factory(dict)

    async def pause(self, instance: InstanceId, request: CaptureRequest) -> None:
        """Leave a mark in QEMU, and stop the guest; the connection is held until the resume."""
        if request.freezes is Freezer.ENGINE:
            await self.make_ready(instance, request)
        mark = background.paused_mark(request.run_id)
        async with self.monitors.use(instance, hold=True) as monitor:
            if mark in await background.marks(monitor):
                return
            await check_running(monitor)
            await background.mark(monitor, mark)
            if instance in self._ready:
                self._ready[instance] = evolve(self._ready[instance], events=len(monitor.events))
            await monitor.execute("stop")

    async def make_ready(self, instance: InstanceId, request: CaptureRequest) -> None:
        """What a save in the background needs; the connection is held from here on, until the resume.

        The file is handed over by that connection: what was made ready by one that is gone is made anew.
        """
        ready = self._ready.get(instance)
        if ready is not None and ready.draft.id == request.run_id and self.monitors.holds(instance):
            return
        async with self.monitors.use(instance, hold=True) as monitor:
            if background.paused_mark(request.run_id) in await background.marks(monitor):
                return
            await check_running(monitor)
            self._ready[instance] = ready = await make_ready(monitor, self.catalog, instance, request)
            self._paused[instance] = files_of(ready.draft)

    def forget(self, instance: InstanceId) -> None:
        """Let go of what was made ready for a capture that is over, or never came."""
        self._ready.pop(instance, None)
        self.monitors.let_go(instance)

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
        await images.read_images(files, unlocked=True)
        _log.warning("QEMU has ended while its guest stood still for us", instance_id=instance)
        self._paused.pop(instance, None)

    async def _resume(self, instance: InstanceId) -> None:
        async with self.monitors.use(instance) as monitor:
            word = (await monitor.execute("query-status"))["status"]
            ours = [mark for mark in await background.marks(monitor) if mark.startswith(background.paused_mark(""))]
            if word not in ("running", "paused") and not ours:
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
        disks = await capturable_disks(monitor, request)
        draft = await draft_of(monitor, self.catalog, instance, request, disks)
        await write_draft(self.catalog, draft)
        first = len(monitor.events)
        try:
            await save(monitor, settling.save_job(request.run_id), request.name, disks)
        except NameTaken:
            self.nothing_made.add(request.run_id)
            raise
        except CaptureFailed as error:
            raise CaptureFailed(f"{error}{await self._clear_failed(monitor, draft)}") from error
        freeze_s = frozen_s(monitor.events[first:])
        whole = completed(draft, await read_disks(monitor))
        await write_whole(self.catalog, whole)
        await settling.tidy(monitor, whole)
        return Captured(whole.snapshot(), freeze_s)

    async def _clear_failed(self, monitor: Monitor, draft: Manifest) -> str:
        """Clear up a save that failed at once: it may have filled the disk, and the guest may stand still for that."""
        try:
            await settling.clear(monitor, draft, [d for d in await read_disks(monitor) if d.find(draft.name)])
            trouble = await stuck.watch(monitor, stuck.LOOK_S)
            if trouble is not None and trouble.full:
                return f"; it left no room for the guest's writes; {await stuck.continue_once(monitor)}"
            if await in_thread(stuck.is_scarce, files_of(draft)):
                return f"; there is next to no free space on the filesystem of {' or '.join(files_of(draft))}"
        except BackendError as error:
            return f"; what is left of it is removed when the run is settled ({error})"
        return ""

    async def _begin_in_background(self, monitor: Monitor, instance: InstanceId, request: CaptureRequest) -> Captured:
        ready = self._ready.pop(instance)
        try:
            await self._snapshot_disks(monitor, request, ready.disks)
            await background.begin(monitor, ready.uri, ready.events)
        except BaseException:
            with trio.move_on_after(END_PATIENCE_S, shield=True), suppress(BackendError):
                await background.end(monitor)
            raise
        return Captured(ready.draft.snapshot())

    async def _snapshot_disks(self, monitor: Monitor, request: CaptureRequest, disks: Sequence[Disk]) -> None:
        try:
            await snapshot_disks(monitor, request.name, disks)
        except CaptureFailed:
            self.nothing_made.add(request.run_id)
            raise

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
            await write_draft(self.catalog, draft)
            await self._create_all(request, disks)
            whole = completed(draft, await images.read_images(files))
        except images.ImageInUse as error:
            socket = self.monitors.socket_of(instance)
            raise CaptureFailed(
                f"{error}: the guest was started during its capture, or runs without hypemand's monitor"
                f" (start it with -qmp unix:{socket},server=on,wait=off)"
            ) from error
        await write_whole(self.catalog, whole)
        return Captured(whole.snapshot())

    async def _create_all(self, request: CaptureRequest, disks: Sequence[Disk]) -> None:
        first, *others = disks
        try:
            await images.create(first, request.name)
        except images.ImageInUse:
            self.nothing_made.add(request.run_id)
            raise
        for disk in others:
            await images.create(disk, request.name)

    async def complete(self, captured: Captured) -> Captured:
        """See `Completion`."""
        freeze_s = captured.freeze_s
        if captured.snapshot.instance_id in self._freezes:
            freeze_s = self._freezes.pop(captured.snapshot.instance_id)
        whole = await Completion(self.catalog, self.monitors).complete(captured)
        return evolve(whole, freeze_s=freeze_s)
