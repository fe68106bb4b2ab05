"""The directories that stand for guests in the embedded backend. Blocking: call it in a worker thread."""

import hashlib
import os
import shutil
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import orjson
from attrs import Factory, evolve, frozen

from hypemand.backends.base import BackendUnavailable, InvalidState, Unsupported
from hypemand.core.errors import InvalidInput
from hypemand.core.model import Extra, InstanceId, InstanceState, Size
from hypemand.core.structure import new_converter, structure

MARK = "hypemand"
STATE_FILE = "instance.json"
MEMORY, DISK = "memory", "disk"
_BLOCK = 1 << 20
_CONVERTER = new_converter()


@frozen
class InstanceSpec:
    """An instance to make where there is none of its name. Sizes in bytes."""

    state: InstanceState = InstanceState.RUNNING
    memory: Size = 16 << 20
    disk: Size = 64 << 20


@frozen
class Guest:
    """What ``instance.json`` says. The mark tells our pause from an operator's."""

    state: InstanceState
    paused_by: str | None = None
    paused_at: datetime | None = None
    extra: Extra = Factory(dict)

    @property
    def frozen_by_us(self) -> bool:
        """Whether hypemand paused it, and nobody resumed it since."""
        return self.state is InstanceState.PAUSED and self.paused_by == MARK

    def running(self) -> "Guest":
        """The same, running and without the mark."""
        return evolve(self, state=InstanceState.RUNNING, paused_by=None, paused_at=None)


def paused(guest: Guest) -> Guest:
    """*guest*, paused with our mark."""
    if guest.frozen_by_us:
        return guest
    if guest.state is InstanceState.PAUSED:
        raise InvalidState(f"instance is paused, and not by hypemand ({STATE_FILE} has no mark of it)")
    if guest.state is not InstanceState.RUNNING:
        raise InvalidState(f"instance is {guest.state}: only a running one can be paused")
    return evolve(guest, state=InstanceState.PAUSED, paused_by=MARK, paused_at=datetime.now(UTC))


def resumed(guest: Guest) -> Guest:
    """*guest*, running; as it is where an operator has paused it, at whatever time."""
    if guest.state not in (InstanceState.RUNNING, InstanceState.PAUSED):
        raise InvalidState(f"instance is {guest.state}: there is nothing to resume")
    return guest.running() if guest.frozen_by_us else guest


def size_of(path: Path) -> int:
    """Bytes of an instance's file."""
    try:
        return path.stat().st_size
    except FileNotFoundError as error:
        raise Unsupported(f"{path} is missing: without it there is nothing to capture; put it back") from error


def read_state(path: Path) -> Guest:
    """What the ``instance.json`` at *path* says.

    Raises:
        FileNotFoundError: There is none.
        BackendUnavailable: It can't be understood.
    """
    try:
        return structure(_CONVERTER, orjson.loads(path.read_bytes()), Guest)
    except (orjson.JSONDecodeError, InvalidInput) as error:
        raise BackendUnavailable(f"{path} can't be understood: {error}") from error


def write_state(home: Path, guest: Guest) -> None:
    """Replace the ``instance.json`` in *home*, durably."""
    new = home / f".{STATE_FILE}.new"
    with new.open("wb") as file:
        file.write(orjson.dumps(_CONVERTER.unstructure(guest), option=orjson.OPT_INDENT_2) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    new.replace(home / STATE_FILE)


def make_instance(instances: Path, instance: InstanceId, spec: InstanceSpec) -> None:
    """Make the directory of *instance* below *instances*, whole or not at all."""
    building = Path(tempfile.mkdtemp(prefix=f".{instance}.", dir=instances))
    try:
        _write_bytes(building / MEMORY, instance, spec.memory)
        _write_bytes(building / DISK, instance, spec.disk)
        write_state(building, Guest(spec.state))
        building.rename(instances / instance)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write_bytes(path: Path, instance: InstanceId, size: int) -> None:
    # Without zeros, and no block like another, so that nothing on the way can save itself the copying.
    block = hashlib.shake_256(f"{instance}/{path.name}".encode()).digest(_BLOCK).replace(b"\0", b"\1")
    with path.open("wb") as file:
        for start in range(0, size, _BLOCK):
            file.write((b"%016d" % start + block[16:])[: size - start])
