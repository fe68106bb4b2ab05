"""How long a guest stands still, by QEMU's own word: a small QMP client, and a guest that is listened to by it.

None of it is hypemand's, so that one ruler measures hypemand and everything
it is compared with.
"""

import json
import os
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import trio
from attrs import frozen

_PATIENCE_S = 60.0


class RefusedError(Exception):
    """QEMU, or whoever else was asked, did not do it; the text is its own."""


class NotMeasuredError(Exception):
    """This way can't be measured here, which is no failure; the text says why."""


@frozen
class Event:
    """What QEMU told unasked. *at_s* is by QEMU's clock."""

    name: str
    at_s: float


class Monitor:
    """One end of a QMP connection, out of its negotiation."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.events: list[Event] = []
        self._stream = stream
        self._buffer = bytearray()

    async def ask(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Run *command* and return its answer; every event that happened before is then in `events`.

        Raises:
            RefusedError: QEMU refuses, or is gone.
        """
        request = {"execute": command, "arguments": {**(arguments or {})}}
        try:
            await self._stream.send_all(json.dumps(request).encode() + b"\n")
        except trio.BrokenResourceError as error:
            raise RefusedError("QEMU has ended") from error
        while True:
            match await self.receive():
                case {"return": answer}:
                    return answer
                case {"error": {"desc": str(why)}}:
                    raise RefusedError(f"{command}: {why}")

    async def run_job(self, command: str, job_id: str, arguments: Mapping[str, Any]) -> None:
        """Run *command*, which begins a job, and return once the job is over and forgotten.

        Raises:
            RefusedError: With QEMU's reason.
        """
        await self.ask(command, {"job-id": job_id, **arguments})
        while (job := await self._job(job_id))["status"] != "concluded":
            await self.receive()  # its next change of status, if not something else
        await self.ask("job-dismiss", {"id": job_id})
        if "error" in job:
            raise RefusedError(f"{command}: {job['error']}")

    async def _job(self, job_id: str) -> dict[str, Any]:
        jobs: list[dict[str, Any]] = await self.ask("query-jobs")
        return next(job for job in jobs if job["id"] == job_id)

    async def receive(self) -> dict[str, Any]:
        """The next message, whatever it is; an event is kept as well."""
        while (end := self._buffer.find(b"\n")) < 0:
            try:
                data = await self._stream.receive_some()
            except trio.BrokenResourceError:
                data = b""
            if not data:
                raise RefusedError("QEMU has ended")
            self._buffer += data
        message: dict[str, Any] = json.loads(self._buffer[:end])
        del self._buffer[: end + 1]
        if "event" in message:
            at = message["timestamp"]
            self.events.append(Event(message["event"], at["seconds"] + at["microseconds"] / 1_000_000))
        return message


@asynccontextmanager
async def dial(path: Path) -> AsyncIterator[Monitor]:
    """A connection to the monitor at *path*, which nobody else may hold.

    Raises:
        RefusedError: There is none, or it gives no greeting.
    """
    try:
        stream = await trio.open_unix_socket(os.fspath(path))
    except OSError as error:
        raise RefusedError(f"the monitor {path} can't be opened: {error.strerror}") from error
    async with stream:
        monitor = Monitor(stream)
        try:
            with trio.fail_after(_PATIENCE_S):
                await monitor.receive()
                await monitor.ask("qmp_capabilities")
        except trio.TooSlowError as error:
            raise RefusedError(f"the monitor {path} gives no greeting") from error
        yield monitor


def standstills(events: Iterable[Event]) -> tuple[float, ...]:
    """For how many seconds a guest stood still each time, between a STOP and the RESUME behind it.

    Raises:
        RefusedError: It stood still at the end.
    """
    found = []
    stopped_at = None
    for event in events:
        match event.name:
            case "STOP" if stopped_at is None:
                stopped_at = event.at_s
            case "RESUME" if stopped_at is not None:
                found.append(event.at_s - stopped_at)
                stopped_at = None
    if stopped_at is not None:
        raise RefusedError("the guest was left standing still")
    return tuple(found)


@frozen(eq=False)
class Stage:
    """A ticking guest that is listened to.

    Attributes:
        monitor: The benchmark's own; no way of taking snapshots uses it.
        serial: Where the guest's ticks are printed to, one in a line.
        pid: Its QEMU's.
    """

    monitor: Monitor
    serial: Path
    pid: int

    async def ticks(self) -> None:
        """Wait until the guest has ticked twice more: it is done with its boot, or with standing still."""
        seen = self._lines()
        try:
            with trio.fail_after(_PATIENCE_S):
                while self._lines() < seen + 2:  # noqa: ASYNC110 - a file that grows is no event
                    await trio.sleep(0.02)
        except trio.TooSlowError as error:
            raise RefusedError(f"the guest has not ticked for {_PATIENCE_S:g} s") from error

    def _lines(self) -> int:
        return self.serial.read_bytes().count(b"\n") if self.serial.exists() else 0

    async def rest(self) -> None:
        """Have the guest leave the machine to another one."""
        await self.monitor.ask("stop")

    async def wake(self) -> None:
        """End the rest. Without one: no-op."""
        await self.monitor.ask("cont")
        await self.ticks()

    async def standstills_since(self, first_event: int) -> tuple[float, ...]:
        """How long the guest stood still each time, by the monitor's events from number *first_event* on."""
        await self.monitor.ask("query-status")
        return standstills(self.monitor.events[first_event:])


class Way(Protocol):
    """A way of taking a snapshot with the memory in it."""

    @property
    def stage(self) -> Stage:
        """The guest that it is taken of."""

    async def take(self, tag: str) -> float | None:
        """Take a snapshot called *tag*, and return once it is complete.

        Returns:
            For how many seconds the guest stood still by this way's own account, if it gives one.

        Raises:
            NotMeasuredError: It would not be taken this way.
        """

    async def remove(self) -> None:
        """Delete the snapshot that was taken last."""
