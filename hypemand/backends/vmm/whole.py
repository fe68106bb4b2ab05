"""Whether what a VMM says to have saved is all of its guest. A snapshot that can't be restored is none."""

from collections.abc import Mapping
from pathlib import Path

import orjson

from hypemand.backends.base import CaptureFailed
from hypemand.backends.vmm.dialect import Dialect, Machine
from hypemand.core.size import format_size

MOST_BYTES = 256 << 20
"""No VMM describes a guest at such length."""


def check_sizes(dialect: Dialect, machine: Machine, saving: Path, sizes: Mapping[str, int]) -> None:
    """Make sure that each file is there, and that the memory is as large as that of *machine*.

    Raises:
        CaptureFailed: One is missing, or too small.
    """
    missing = [name for name in dialect.saved if not sizes.get(name)]
    if missing:
        raise CaptureFailed(
            f"{dialect.title} says that it has saved the guest, but {' and '.join(missing)} can't be"
            f" found in {saving}: does it see the same directory there?"
        )
    if sizes[dialect.memory_file] < machine.least_memory_bytes:
        raise CaptureFailed(
            f"{dialect.title} says that it has saved the guest, but {dialect.memory_file} has"
            f" {format_size(sizes[dialect.memory_file])} of its memory of {format_size(machine.least_memory_bytes)}"
        )


def check_documents(dialect: Dialect, directory: Path) -> None:
    """Make sure that what should be JSON is that, as far as it may be read. Blocking.

    Raises:
        CaptureFailed: It is not.
    """
    for name in dialect.documents:
        file = directory / name
        try:
            with file.open("rb") as opened:
                data = opened.read(MOST_BYTES + 1)
        except PermissionError:  # of another user, behind our door
            continue
        try:
            orjson.loads(data)
        except orjson.JSONDecodeError as error:
            raise CaptureFailed(
                f"{dialect.title} says that it has saved the guest, but {name} is not whole: {error}"
            ) from error
