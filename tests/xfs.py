"""A filesystem that can reflink, for tests: an XFS of 320 MiB from a kilobyte or two, as no mkfs.xfs is at hand.

``xfs.b85`` has its sectors that are not zero, as mkfs.xfs 6.1 made them, each
with its number; its log is left empty, which the kernel takes for a new one.
"""

import base64
import struct
import subprocess
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SIZE = 320 << 20
_SECTOR = 512
_NUMBER = struct.Struct("<I")


def make_image(path: Path) -> None:
    """Write the filesystem to *path*, a file that is nearly all hole."""
    packed = (Path(__file__).parent / "xfs.b85").read_text().replace("\n", "")
    sectors = zlib.decompress(base64.b85decode(packed))
    with path.open("wb") as file:
        for start in range(0, len(sectors), _NUMBER.size + _SECTOR):
            (number,) = _NUMBER.unpack_from(sectors, start)
            file.seek(number * _SECTOR)
            file.write(sectors[start + _NUMBER.size :][:_SECTOR])
        file.truncate(SIZE)


@contextmanager
def mounted_xfs(directory: Path) -> Iterator[Path]:
    """Where it is mounted, until the end of the block; the test is skipped where that is not possible."""
    image, where = directory / "xfs.image", directory / "xfs"
    make_image(image)
    where.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "xfs", "-o", "loop,nouuid", image, where], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"no XFS can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", where], check=True)


@contextmanager
def loop_device(image: Path) -> Iterator[Path]:
    """A block device over *image*."""
    made = subprocess.run(["losetup", "--show", "-f", image], check=False, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no block device can be made here: {made.stderr.strip()}")
    device = Path(made.stdout.strip())
    try:
        yield device
    finally:
        subprocess.run(["losetup", "-d", device], check=True)
