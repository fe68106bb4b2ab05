"""Guest memory saved while the guest runs: QEMU's migration to a file, with the capability ``background-snapshot``.

Begun while the guest stands still, it stops for nothing but the devices; the
memory of that instant is saved by write protection while the guest goes on.
Marks inside QEMU tell another process whose stop and whose migration it is.
"""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import trio
from attrs import frozen

from hypemand.backends.base import BackendUnavailable, CaptureFailed
from hypemand.backends.qemu.jobs import OURS, is_migrating
from hypemand.backends.qmp import Monitor, QmpError

CAPABILITY = "background-snapshot"
_BANDWIDTH = "max-bandwidth"
_UNLIMITED = 1 << 50
_BY_FILE_SET = (9, 1)
"""From this version on, ``fd:`` is for sockets alone, and a file goes by ``file:`` and a set of descriptors."""
_ENDS_WELL = (8, 1)
"""An older QEMU leaves the guest's memory protected after a save that was cancelled or failed: the guest, and QEMU
with it, then hangs at its next write (seen with 7.2, mended upstream by "stop tracking ram writes when cancelling
background migration"). There a save is never cancelled; it is left to come to its end, and then deleted."""
_LOOK_S = 0.001
_BEGIN_PATIENCE_S = 0.5
_SHIELDED_S = 2.0
_SLACK_BYTES = 1 << 20
_DEVICE_BYTES = 64 << 20


@frozen(kw_only=True)
class Progress:
    """How far a migration is.

    Attributes:
        status: QEMU's word; None where there was no migration.
        pages: Of memory, written so far.
        written, total: In bytes.
        error: QEMU's reason of a failure.
    """

    status: str | None
    pages: int
    written: int
    total: int
    error: str

    @property
    def under_way(self) -> bool:
        """Whether it goes on."""
        return is_migrating(self.status)

    @property
    def has_begun(self) -> bool:
        """Whether devices are saved and the memory is protected, so that the guest may run.

        Pages are written only after that. To let the guest run before would
        save its memory at another instant than its disks.
        """
        return self.status == "completed" or (self.status == "active" and self.pages > 0)


def paused_mark(run_id: str) -> str:
    """The object that says: this stop of the guest is that run's."""
    return f"{OURS}paused-{run_id}"


def saving_mark(run_id: str) -> str:
    """The object that says: this migration is that run's."""
    return f"{OURS}saving-{run_id}"


async def marks(monitor: Monitor) -> frozenset[str]:
    """Every mark of hypemand in this QEMU."""
    objects = await monitor.execute("qom-list", path="/objects")
    return frozenset(found["name"] for found in objects if found["name"].startswith(OURS))


async def mark(monitor: Monitor, name: str) -> None:
    """Make a mark: an object that limits nothing."""
    await monitor.execute("object-add", qom_type="throttle-group", id=name)


async def unmark(monitor: Monitor, name: str) -> None:
    """Take a mark away. Not there: no error."""
    with suppress(QmpError):
        await monitor.execute("object-del", id=name)


async def why_impossible(monitor: Monitor) -> str | None:
    """Why this guest's memory can't be saved in the background, in QEMU's words, or None.

    QEMU tries with the kernel when the capability is set; it is set back at once.
    """
    if CAPABILITY not in await _capabilities(monitor):
        return "this QEMU is older than 6.0"
    if (await monitor.execute("query-migrate-parameters")).get("tls-creds"):
        return "migrations of this QEMU are set to use TLS"
    # Left on, it would make the operator's next migration one in the background.
    with trio.CancelScope(shield=True, deadline=trio.current_time() + _SHIELDED_S):
        try:
            await _set_capability(monitor, on=True)
        except QmpError as error:
            return error.desc
        await _set_capability(monitor, on=False)
        return None
    raise BackendUnavailable(f"QEMU did not answer within {_SHIELDED_S:g} s")


async def parameters(monitor: Monitor) -> Mapping[str, Any]:
    """What `set_up` is going to change. If the capability is on, a capture that was killed has left it so."""
    values = await monitor.execute("query-migrate-parameters")
    return {CAPABILITY: False, _BANDWIDTH: values[_BANDWIDTH]}


async def set_up(monitor: Monitor) -> None:
    """Have the next migration be a background one, at full speed."""
    await _set_capability(monitor, on=True)
    await monitor.execute("migrate-set-parameters", max_bandwidth=_UNLIMITED)


async def set_back(monitor: Monitor, parameters: Mapping[str, Any]) -> None:
    """Set *parameters* as they were. What QEMU refuses is passed over: another migration goes by them already."""
    if CAPABILITY in parameters:
        with suppress(QmpError):
            await _set_capability(monitor, on=parameters[CAPABILITY])
    if _BANDWIDTH in parameters:
        with suppress(QmpError):
            await monitor.execute("migrate-set-parameters", max_bandwidth=parameters[_BANDWIDTH])


async def _capabilities(monitor: Monitor) -> dict[str, bool]:
    states = await monitor.execute("query-migrate-capabilities")
    return {state["capability"]: state["state"] for state in states}


async def _set_capability(monitor: Monitor, *, on: bool) -> None:
    await monitor.execute("migrate-set-capabilities", capabilities=[{"capability": CAPABILITY, "state": on}])


def file_name(run_id: str) -> str:
    """The name that QEMU is given for the run's memory file."""
    return f"{OURS}{run_id}"


async def pass_file(monitor: Monitor, descriptor: int, name: str) -> str:
    """Pass an open file, and return the URI by which QEMU migrates to it. The descriptor may be closed then.

    Passed like this, QEMU needs no right to open it, and no shell.
    """
    if _version(monitor) < _BY_FILE_SET:
        await monitor.hand_over(descriptor, "getfd", fdname=name)
        return f"fd:{name}"
    added = await monitor.hand_over(descriptor, "add-fd", opaque=name)
    return f"file:/dev/fdset/{added['fdset-id']}"


async def forget_file(monitor: Monitor, name: str) -> None:
    """Have QEMU close what `pass_file` passed as *name*. Else a deleted file would keep its space until QEMU ends."""
    with suppress(QmpError):
        await monitor.execute("closefd", fdname=name)  # there, unless a migration has taken it
    for known in await monitor.execute("query-fdsets"):
        if any(descriptor.get("opaque") == name for descriptor in known["fds"]):
            await monitor.execute("remove-fd", fdset_id=known["fdset-id"])


async def begin(monitor: Monitor, uri: str, since: int) -> None:
    """Begin to save the memory of the guest, which stands still by our stop; return once it may go on.

    Some versions of QEMU let it go on by themselves.

    Args:
        since: How many events were there right before our stop.

    Raises:
        CaptureFailed: With QEMU's reason, or because somebody let the guest go on before.
    """
    try:
        await monitor.execute("migrate", uri=uri)
    except QmpError as error:
        raise CaptureFailed(str(error)) from error
    while not (progress := await progress_of(monitor)).has_begun:
        if not progress.under_way:
            raise failure(progress)
        await trio.sleep(_LOOK_S)
    if sum(event.name == "STOP" for event in monitor.events[since:]) > 1:
        # QEMU had to stop it anew: its memory is of another instant than its disks.
        await disown(monitor)
        raise CaptureFailed("somebody let the guest go on while its snapshot was taken")


def failure(progress: Progress) -> CaptureFailed:
    """The error for a migration that ended without success."""
    return CaptureFailed(
        f"QEMU could not save the memory: {progress.error or progress.status or 'it knows of no save'}"
    )


async def go_on(monitor: Monitor) -> None:
    """Let the guest run again, which stands still for us.

    A save that does not come to the memory is disowned first: it would save
    another instant than that of the disks.
    """
    until = trio.current_time() + _BEGIN_PATIENCE_S
    while True:
        progress = await progress_of(monitor)
        if progress.has_begun or not progress.under_way:
            break
        if trio.current_time() > until:
            await disown(monitor)
            await end(monitor)
            break
        await trio.sleep(_LOOK_S)
    await monitor.execute("cont")


async def disown(monitor: Monitor) -> None:
    """Take away the mark by which a save could be adopted."""
    for name in await marks(monitor):
        if name.startswith(saving_mark("")):
            await unmark(monitor, name)


async def progress_of(monitor: Monitor) -> Progress:
    """How far the migration is."""
    told = await monitor.execute("query-migrate")
    ram = told.get("ram", {})
    return Progress(
        status=told.get("status"),
        pages=ram.get("normal", 0) + ram.get("duplicate", 0),
        written=ram.get("transferred", 0),
        total=ram.get("total", 0),
        error=str(told.get("error-desc", "")),
    )


def is_whole(progress: Progress, size: int) -> bool:
    """Whether a file of *size* holds all that the completed save wrote. QEMU tells of its last, whosever it is."""
    written = progress.written
    return progress.status == "completed" and written - _SLACK_BYTES <= size <= written + _DEVICE_BYTES


def is_into(progress: Progress, size_before: int, size_after: int) -> bool:
    """Whether a save under way goes into a file that had these sizes before and after the progress was asked."""
    return size_before - _SLACK_BYTES <= progress.written <= size_after + _SLACK_BYTES


async def end(monitor: Monitor) -> None:
    """Have a save that is under way end as soon as this QEMU can do that without harm to the guest."""
    if ends_well(monitor):
        with suppress(QmpError):
            await monitor.execute("migrate_cancel")


def ends_well(monitor: Monitor) -> bool:
    """Whether this QEMU lets the guest go on when a save is cancelled or fails."""
    return _version(monitor) >= _ENDS_WELL


def _version(monitor: Monitor) -> tuple[int, ...]:
    return tuple(map(int, monitor.version.split(".")[:2]))
