"""The run log: journal and history in one file of JSON lines.

Appends are durable when they return, one sync for all that wait (group
commit). A torn end is cut when the log is opened for writing; a damaged line
elsewhere is passed over and reported. The log rotates by size; open runs are
carried over, so nothing of them is ever in an old segment alone.
"""

import errno
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

import structlog
import trio
from attrs import define, field

from hypemand.core.model import InstanceId, RunStarted
from hypemand.state.codec import Line, encode_line
from hypemand.state.files import Disk
from hypemand.state.segments import LogContent, read_log, segments
from hypemand.state.sure import SureEvent

ROTATE_BYTES = 8 * 1024 * 1024
UNSURE_BYTES = 1024 * 1024  # more than one commit writes; what is before it was synced by whoever wrote it
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_log = structlog.get_logger()


@define
class _Batch:
    """Lines that are made durable together, by the first one's `RunLog.append`.

    Attributes:
        bad: Those that can't be written, and why: that is nobody else's trouble.
    """

    lines: list[Line] = field(factory=list)
    bad: dict[int, Exception] = field(factory=dict)
    done: SureEvent = field(factory=SureEvent)
    error: OSError | None = None

    def encoded(self) -> bytes:
        """All lines but the bad ones, as they are written."""
        data = []
        for number, line in enumerate(self.lines):
            try:
                data.append(encode_line(line))
            except Exception as error:  # noqa: BLE001 - whatever it is, it is told to whoever made that line
                self.bad[number] = error
        return b"".join(data)

    def written(self) -> Iterator[Line]:
        """The lines that are in the log once it is done without an error."""
        return (line for number, line in enumerate(self.lines) if number not in self.bad)


class RunLog:
    """The run log, open for writing. Only the holder of the state lock may have one."""

    def __init__(self, state_dir: Path, disk: Disk, *, rotate_bytes: int = ROTATE_BYTES) -> None:
        self._state_dir = state_dir
        self._path = state_dir / "runs.jsonl"
        self._disk = disk
        self._rotate_bytes = rotate_bytes
        self._descriptor = -1
        self._size = 0
        self._names_unsure = False
        self._batch = _Batch()
        self._turn = trio.Lock()
        self._open: dict[str, RunStarted] = {}
        self._open_of: dict[InstanceId, dict[str, RunStarted]] = {}
        self.damaged: tuple[str, ...] = ()  # where a line could not be read when it was opened, and why

    @property
    def is_open(self) -> bool:
        """Whether lines can be appended."""
        return self._descriptor >= 0

    @property
    def open_runs(self) -> tuple[RunStarted, ...]:
        """Runs that were started and not finished, oldest first."""
        return tuple(self._open.values())

    def open_run(self, run_id: str) -> RunStarted | None:
        """The started line of a run that is open, or None."""
        return self._open.get(run_id)

    def open_run_of(self, instance: InstanceId) -> RunStarted | None:
        """The oldest open run of *instance*, or None."""
        return next(iter(self.open_runs_of(instance)), None)

    def open_runs_of(self, instance: InstanceId) -> Collection[RunStarted]:
        """The open runs of *instance*, oldest first: one, but for a fault."""
        return self._open_of.get(instance, {}).values()

    async def open(self) -> LogContent:
        """Read the log, cut a torn end, and make it ready for appends."""
        content = await self._disk.call(self._open_blocking)
        self._open, self._open_of, self.damaged = {}, {}, tuple(content.damaged)
        self._remember(content.open_runs().values())
        if content.torn_bytes:
            _log.warning("torn end of the run log cut", path=str(self._path), bytes=content.torn_bytes)
        for place in content.damaged:
            _log.error("damaged line in the run log passed over", line=place)
        return content

    def _open_blocking(self) -> LogContent:
        content = read_log(self._state_dir, self._disk)
        self._make_sure(content.torn_bytes)
        self._reopen(content.torn_bytes)
        return content

    def _make_sure(self, torn_bytes: int) -> None:
        """Have the sync that follows bring the end of the log to the disk, even if one before it failed to."""
        try:
            whole = self._path.stat().st_size - torn_bytes
            self._disk.write_again(self._path, max(0, whole - UNSURE_BYTES), whole)
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno not in _NO_SPACE:  # a filesystem that copies on write needs space for it
                raise

    def _reopen(self, torn_bytes: int = 0) -> None:
        descriptor = self._disk.open_append(self._path)
        try:
            self._disk.sync_directory(self._state_dir)
            size = os.fstat(descriptor).st_size - torn_bytes
            if torn_bytes:
                self._disk.truncate(descriptor, size)
            # What a killed process wrote, and did not wait for, counts from now on: it must not be lost any more.
            self._disk.sync(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        self._close_descriptor()
        self._descriptor, self._size = descriptor, size

    async def append(self, line: Line) -> None:
        """Append *line*; durable when this returns. Not cancelled once it is called.

        Raises:
            OSError: The line is not in the log; what was written of it is cut off again.
        """
        batch, number = self._batch, len(self._batch.lines)
        batch.lines.append(line)
        if number == 0:
            with trio.CancelScope(shield=True):
                await self._commit(batch)
        else:  # all that wait are woken at once: a lock would let them through one by one
            await batch.done.wait()
        if number in batch.bad:
            raise batch.bad[number]
        if batch.error is not None:
            raise OSError(batch.error.errno, batch.error.strerror, str(self._path)) from batch.error

    async def _commit(self, batch: _Batch) -> None:
        async with self._turn:
            self._batch = _Batch()
            try:
                await self._disk.call_ahead(self._write_batch, batch)
            except OSError as error:
                batch.error = error
            except BaseException as error:
                batch.error = OSError(errno.EIO, f"not written: {error!r}")
                raise
            else:
                self._remember(batch.written())
            finally:
                batch.done.set()
            if batch.error is None and self._size >= self._rotate_bytes:
                await self._rotate()

    def _remember(self, lines: Iterable[Line]) -> None:
        for line in lines:
            of_instance = self._open_of.setdefault(line.instance_id, {})
            if isinstance(line, RunStarted):
                self._open[line.run_id] = of_instance[line.run_id] = line
            else:
                self._open.pop(line.run_id, None)
                of_instance.pop(line.run_id, None)
                if not of_instance:
                    del self._open_of[line.instance_id]

    def _write_batch(self, batch: _Batch) -> None:
        """Blocking. Lines become bytes here: where many runs begin at one moment, none waits for that of others."""
        data = batch.encoded()
        if data:
            self._write(data)

    def _write(self, data: bytes) -> None:
        if self._names_unsure:
            # Else a power cut could bring the rotation back, and there runs are open that end in this file now.
            self._disk.sync_directory(self._state_dir)
            self._names_unsure = False
        if not self._in_place():  # moved away by hand, or by a rotation that failed half-way
            self._reopen()
            data = self._carried() + data
        elif os.fstat(self._descriptor).st_size != self._size:
            self._cut_back()
        try:
            self._disk.write(self._descriptor, data)
            self._disk.sync(self._descriptor)
        except OSError:
            self._try_to(self._cut_back)  # else the next append does it, before it writes
            raise
        self._size += len(data)

    def _in_place(self) -> bool:
        try:
            return os.path.samestat(self._path.stat(), os.fstat(self._descriptor))
        except OSError:
            return False

    def _cut_back(self) -> None:
        """End the file where the last durable line ends."""
        self._size = min(self._size, os.fstat(self._descriptor).st_size)  # somebody else may have emptied it
        self._disk.truncate(self._descriptor, self._size)

    @staticmethod
    def _try_to(work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:
            _log.error("run log can't be cut back", error=str(error))

    async def _rotate(self) -> None:
        try:
            await self._disk.call_ahead(self._rotate_blocking)
        except OSError as error:
            _log.error("run log can't be rotated; it grows on", error=str(error))

    def _carried(self) -> bytes:
        return b"".join(encode_line(run) for run in self._open.values())

    def _rotate_blocking(self) -> None:
        *old, current = segments(self._state_dir)
        fresh = current.with_name("runs.jsonl.new")
        self._disk.replace(fresh, self._carried())
        # Until the last rename there is no newest segment: open runs are then read from the one before.
        moved: list[tuple[Path, Path]] = []
        try:
            for source, target in [*zip([*old[1:], current], old, strict=True), (fresh, current)]:
                if source.exists():
                    moved.append((source, target))
                    self._disk.rename(source, target)
            self._reopen()
        except OSError:
            # Else each further attempt would push a segment out, and in the end the one that is written to.
            self._names_unsure = True
            for source, target in reversed(moved):
                if target.exists() and not source.exists():
                    target.rename(source)
            raise

    def close(self) -> None:
        """Close the file. What was appended is durable already."""
        self._close_descriptor()

    def _close_descriptor(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
