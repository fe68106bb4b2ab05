"""The disks of a guest that is not running, by qemu-img. QEMU's own lock on an image keeps a running guest's out."""

import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import orjson
import trio

from hypemand.backends.base import BackendError, BackendUnavailable, CaptureFailed, Unsupported
from hypemand.backends.qemu.disks import QCOW2, Disk, entry_of
from hypemand.backends.qemu.threads import limiter_of

_LOCKED = re.compile(r'Failed to get (shared )?"\w+" lock')
_ABSENT = "No such file or directory"
_OTHER_FORMAT = "Image is not in qcow2 format"


class ImageInUse(BackendUnavailable):
    """A QEMU holds the image: its guest runs, whatever became of the monitor."""


class QemuImgError(BackendError):
    """qemu-img has refused, with its reason."""


async def read_images(files: Sequence[Path], *, unlocked: bool = False) -> tuple[Disk, ...]:
    """The disks in *files*, in that order, without those that are only the base of another one among them.

    Args:
        unlocked: Make sure that no QEMU holds them. A guest that is started at
            that moment may find them held by us, so this is not for mere reading.

    Raises:
        ImageInUse: One is held by a running QEMU.
        BackendUnavailable: One is missing or can't be read.
        Unsupported: There is no qemu-img.
    """
    found = [(path, await _info(path, unlocked=unlocked)) for path in files]
    # Others may stand on the same base: a snapshot in it would be a change under their feet.
    named = [path.parent / info["backing-filename"] for path, info in found if "backing-filename" in info]
    bases = await trio.to_thread.run_sync(lambda: {os.path.realpath(base) for base in named}, abandon_on_cancel=True)
    return tuple(
        Disk(
            device=path.name,
            node="",
            file=str(path),
            format=info["format"],
            entries=tuple(entry_of(snapshot) for snapshot in info.get("snapshots", ())),
        )
        for path, info in found
        if str(path) not in bases
    )


def present(names: Iterable[str]) -> list[Path]:
    """Those of *names* that are files which are seen from here. Blocking."""
    return [path for path in map(Path, names) if path.is_absolute() and path.is_file()]


async def create(disk: Disk, tag: str) -> None:
    """Make a snapshot of *disk*. qemu-img would give a name twice: the caller has looked whether *tag* is free.

    Raises:
        ImageInUse: The guest was started meanwhile; nothing was done.
        CaptureFailed: With qemu-img's reason.
    """
    try:
        await _run(disk.file, "snapshot", "-c", tag)
    except QemuImgError as error:
        raise CaptureFailed(f"{disk.file}: {error}") from error


async def delete(disk: Disk, tag: str) -> None:
    """Delete from *disk* the first snapshot called *tag*. There is none: no error.

    Raises:
        ImageInUse: The guest was started meanwhile; nothing was done.
        BackendError: With qemu-img's reason.
    """
    try:
        await _run(disk.file, "snapshot", "-d", tag)
    except QemuImgError as error:
        if "snapshot not found" not in str(error):
            raise BackendError(f"{disk.file}: snapshot {tag} could not be deleted: {error}") from error


async def _info(path: Path, *, unlocked: bool) -> dict[str, Any]:
    shared = () if unlocked else ("--force-share",)
    try:
        info: dict[str, Any] = orjson.loads(await _run(str(path), "info", "--output=json", *shared))
    except QemuImgError as error:
        if _OTHER_FORMAT in str(error):
            return {"format": f"not {QCOW2}"}
        raise BackendUnavailable(f"{path} can't be read: {error}") from error
    return info


def _name(file: str) -> str:
    """*file* for qemu-img, with nothing left to guess: no format, no protocol, and none of the images below it."""
    spec = {"driver": QCOW2, "backing": None, "file": {"driver": "file", "filename": file}}
    try:
        return "json:" + orjson.dumps(spec).decode()
    except TypeError as error:  # orjson's error for what is not UTF-8
        raise Unsupported(f"{file!r}: a disk's name has to be UTF-8") from error


async def _run(file: str, *args: str) -> bytes:
    """Run qemu-img on *file*.

    On cancellation it goes on by itself: killed in the middle of a change it could spoil the image.
    """
    name = _name(file)
    done = await trio.to_thread.run_sync(_wait, (*args, name), abandon_on_cancel=True, limiter=limiter_of(file))
    if done.returncode == 0:
        return done.stdout
    said = " ".join(done.stderr.decode(errors="replace").replace(name, file).split())
    if _LOCKED.search(said):
        raise ImageInUse(f"a running QEMU holds {file}")
    if _ABSENT in said:
        raise BackendUnavailable(f"{file}: {_ABSENT}")
    raise QemuImgError(said.removeprefix("qemu-img: ") or f"qemu-img ended with status {done.returncode}")


def _wait(args: Sequence[str]) -> "subprocess.CompletedProcess[bytes]":
    try:
        # In a session of its own: a Ctrl-C at the daemon is none at this. In C, for its messages are looked at.
        return subprocess.run(  # noqa: S603 - no shell is between, and the file comes as JSON
            ["qemu-img", *args],  # noqa: S607 - where it is installed is the host's business
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            start_new_session=True,
            env={**os.environ, "LC_ALL": "C"},
        )
    except FileNotFoundError:
        raise Unsupported("qemu-img is not installed; on Debian: apt-get install qemu-utils") from None
