"""Many small files, replaced durably and together: what waits while others are written is written in one go.

One thread does it: more of them wait for each other, and take several times
the processor. What it saves is the sync of the directory, one for all of them.
"""

import errno
from pathlib import Path

import trio
from attrs import Factory, define

from hypemand.state.files import Disk, Signature
from hypemand.state.sure import SureEvent

MOST_TOGETHER = 64
"""More files than that are not open at once."""


@define(eq=False)
class _Batch:
    """Files that are replaced together, by the first one's `Writer.replace`."""

    files: list[tuple[Path, bytes]] = Factory(list)
    outcomes: list[Signature | OSError] = Factory(list)
    done: SureEvent = Factory(SureEvent)


class Writer:
    """Replaces files."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._batch = _Batch()
        self._turn = trio.Lock()

    async def replace(self, path: Path, data: bytes) -> Signature:
        """Make *data* the content of *path*, durably. Not cancelled once it is called.

        Raises:
            OSError: The content is the one before, or it is not known to last.
        """
        batch, number = self._batch, len(self._batch.files)
        batch.files.append((path, data))
        if len(batch.files) == MOST_TOGETHER:
            self._batch = _Batch()
        if number == 0:
            with trio.CancelScope(shield=True):
                await self._write(batch)
        else:
            await batch.done.wait()
        outcome = batch.outcomes[number]
        if isinstance(outcome, OSError):
            raise OSError(outcome.errno, outcome.strerror, str(path)) from outcome
        return outcome

    async def _write(self, batch: _Batch) -> None:
        async with self._turn:
            if self._batch is batch:
                self._batch = _Batch()
            try:
                batch.outcomes = await self._disk.call(self._disk.replace_all, batch.files)
            except BaseException as error:
                batch.outcomes = [OSError(errno.EIO, f"not written: {error!r}") for _ in batch.files]
                raise
            finally:
                batch.done.set()
