"""Reading the run log: its segments, and what they tell. Changes nothing."""

from collections.abc import Iterator
from pathlib import Path

import orjson
from attrs import define, field, frozen

from hypemand.core.errors import InvalidInput
from hypemand.core.model import InstanceId, RunFinished, RunStarted
from hypemand.state.codec import Line, decode_line
from hypemand.state.files import Disk

OLD_SEGMENTS = 4


@define
class LogContent:
    """What the segments hold.

    Attributes:
        lines: Oldest first; a line carried over by a rotation stands there once.
        damaged: Where a line can't be read, and why.
        torn_bytes: Length of the unfinished end of the newest segment.
    """

    lines: list[Line] = field(factory=list)
    damaged: list[str] = field(factory=list)
    torn_bytes: int = 0

    def open_runs(self) -> dict[str, RunStarted]:
        """Runs that were started and not finished, by id, oldest first."""
        finished = {line.run_id for line in self.lines if isinstance(line, RunFinished)}
        return {
            line.run_id: line for line in self.lines if isinstance(line, RunStarted) and line.run_id not in finished
        }

    def started(self) -> list[RunStarted]:
        """Every started line, oldest first."""
        return [line for line in self.lines if isinstance(line, RunStarted)]

    def finished(self, instance: InstanceId | None = None) -> list[RunFinished]:
        """The history, newest last; of *instance* alone where one is given."""
        return [line for line in self.lines if isinstance(line, RunFinished) and instance in (None, line.instance_id)]


def segments(state_dir: Path) -> list[Path]:
    """Every segment that there may be, oldest first."""
    base = state_dir / "runs.jsonl"
    return [*(base.with_name(f"runs.jsonl.{age}") for age in range(OLD_SEGMENTS, 0, -1)), base]


@frozen
class Segment:
    """A segment as it was read, without the unfinished end that a crash left of a write, of *torn_bytes*."""

    name: str
    data: bytes
    torn_bytes: int = 0

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Its lines, numbered from 1."""
        return enumerate(self.data.splitlines(), start=1)


def read_segments(state_dir: Path, disk: Disk) -> Iterator[Segment]:
    """Each segment that there is, oldest first. Blocking.

    Raises:
        OSError: One is there, but can't be read.
    """
    for path in segments(state_dir):
        try:
            data, _ = disk.read(path)
        except FileNotFoundError:
            continue
        whole = _whole_length(data) if path.suffix == ".jsonl" else len(data)
        yield Segment(path.name, data[:whole], len(data) - whole)


def read_log(state_dir: Path, disk: Disk) -> LogContent:
    """All segments of the run log; changes nothing. Blocking.

    Raises:
        OSError: A segment is there, but can't be read.
    """
    content = LogContent()
    started: set[str] = set()
    for segment in read_segments(state_dir, disk):
        content.torn_bytes += segment.torn_bytes
        for number, raw in segment.lines():
            _read_line(raw, f"{segment.name}:{number}", content, started)
    return content


def _read_line(raw: bytes, where: str, content: LogContent, started: set[str]) -> None:
    try:
        line = decode_line(raw)
    except InvalidInput as error:
        content.damaged.append(f"{where}: {error}")
        return
    if isinstance(line, RunStarted):
        if line.run_id in started:
            return
        started.add(line.run_id)
    content.lines.append(line)


def _whole_length(data: bytes) -> int:
    """Bytes of *data* up to the end of its last line that is JSON; what follows is what a crash left of a write."""
    end = data.rfind(b"\n") + 1
    while end:
        start = data.rfind(b"\n", 0, end - 1) + 1
        try:
            orjson.loads(data[start:end])
        except orjson.JSONDecodeError:
            end = start  # blocks that never reached the disk read as zeros
        else:
            return end
    return 0
