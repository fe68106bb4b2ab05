"""The history as it stands in the run log: finished lines, not read as runs. Cheap enough to be done beside runs."""

from pathlib import Path

import orjson
from attrs import define, field

from hypemand.core.model import InstanceId
from hypemand.state.files import Disk
from hypemand.state.segments import read_segments


@define
class History:
    """Finished lines, oldest first, each a JSON object; and where a line can't be read."""

    lines: list[bytes] = field(factory=list)
    damaged: list[str] = field(factory=list)


def read_history(state_dir: Path, disk: Disk, instance: InstanceId | None = None) -> History:
    """The finished lines in all segments of the run log; of *instance* alone where one is given. Blocking.

    Raises:
        OSError: A segment is there, but can't be read.
    """
    history = History()
    for segment in read_segments(state_dir, disk):
        for number, line in segment.lines():
            try:
                told = orjson.loads(line)
                if told["event"] == "finished" and instance in (None, told["instance_id"]):
                    history.lines.append(line)
            except (ValueError, KeyError, TypeError):
                history.damaged.append(f"{segment.name}:{number}: no line of a run log")
    return history
