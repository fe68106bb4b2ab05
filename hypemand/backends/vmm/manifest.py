"""What is written down of a snapshot of a VMM's guest, and the way back to it."""

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from hypemand.backends.base import CaptureRequest
from hypemand.backends.catalog import Manifest
from hypemand.backends.vmm.dialect import Dialect, Drive, Identity
from hypemand.backends.vmm.disks import Disk, named
from hypemand.backends.vmm.guests import SAVED
from hypemand.backends.vmm.rights import Writer
from hypemand.core.model import InstanceId, RestoreAction, RestoreStep, SnapshotKind

DISKS = "disks"
"""Directory of the copies in a snapshot."""
_DEVICES = ("kvm", "net/tun", "urandom", "userfaultfd")


@frozen
class Contents:
    """What a snapshot consists of.

    Attributes:
        disks: Sizes by name, of the copies.
        saved: The same of the VMM's files.
        drives: As the VMM has them; those that can't be written to are no part of the snapshot.
    """

    copied: Sequence[Disk]
    disks: Mapping[str, int]
    saved: Mapping[str, int]
    drives: Iterable[Drive] = ()

    @property
    def files(self) -> dict[str, int]:
        """Sizes by path in the snapshot."""
        saved = {f"{SAVED}/{name}": size for name, size in self.saved.items()}
        return saved | {f"{DISKS}/{name}": size for name, size in self.disks.items()}


@frozen
class Way:
    """What the way back to a snapshot needs to know.

    Attributes:
        home: Where the snapshot will be.
        socket: The guest's API socket.
        chroot: The VMM's root directory, where that is not ours.
    """

    dialect: Dialect
    home: Path
    socket: Path
    writer: Writer
    chroot: Path | None


def manifest_of(
    instance: InstanceId, request: CaptureRequest, contents: Contents, way: Way, identity: Identity
) -> Manifest:
    """The manifest of a capture that is done."""
    return Manifest(
        id=request.run_id,
        instance_id=instance,
        name=request.name,
        kind=request.kind,
        tags=request.tags,
        created_at=request.created_at,
        size_bytes=sum(contents.files.values()),
        files=contents.files,
        hypervisor=_hypervisor(way.dialect, identity),
        restore=(*_disks_back(contents, way.home), *_start(request, way)),
        details=_details(contents),
    )


def _hypervisor(dialect: Dialect, identity: Identity) -> dict[str, str]:
    told = {"name": dialect.type_name, "version": identity.version, "uuid": identity.uuid}
    return {key: value for key, value in told.items() if value}


def _details(contents: Contents) -> dict[str, Any]:
    disks = [
        {
            "name": disk.name,
            "file": str(disk.file),
            "copy": f"{DISKS}/{name}",
            **({"backing": disk.backing} if disk.backing else {}),
        }
        for name, disk in named(contents.copied)
    ]
    left_out = [
        {"name": drive.name, "file": drive.path, "why": "read-only"} for drive in contents.drives if drive.read_only
    ]
    return {"disks": disks, "left_out": left_out}


def _disks_back(contents: Contents, home: Path) -> list[RestoreStep]:
    return [_run(command) for name, disk in named(contents.copied) for command in _disk_back(disk, home / DISKS / name)]


def _disk_back(disk: Disk, copy: Path) -> Iterator[list[str]]:
    if disk.is_device:  # with its zeros: what is there may be anything
        yield ["dd", f"if={copy}", f"of={disk.file}", "bs=4M", "conv=fsync,notrunc,nocreat", "status=none"]
        return
    # Below a chroot, which is the guest's user's: a link that has come to be there must not be written through.
    anew = [] if disk.root is None else ["--remove-destination"]
    yield ["cp", "--reflink=auto", "--sparse=always", *anew, str(copy), str(disk.file)]
    if disk.owner is None:
        return
    if disk.owner != (0, 0):  # a file that is new is that of whoever restores
        yield ["chown", "-h", f"{disk.owner[0]}:{disk.owner[1]}", str(disk.file)]
    if anew:
        yield ["chmod", disk.mode, str(disk.file)]


def _start(request: CaptureRequest, way: Way) -> list[RestoreStep]:
    """Of a guest that ran: from the VMM's files, which it has to be able to read."""
    if request.kind is SnapshotKind.STOPPED:
        return [RestoreStep(RestoreAction.START, "")]
    saved = way.home / SAVED
    if way.chroot is None:
        return [*_let_in(way.writer, saved), _left_over([way.socket]), *way.dialect.restore(way.socket, str(saved))]
    name = f"restored-{request.run_id}"
    inside = way.chroot / name
    steps = [
        _run(["mkdir", "-p", "-m", "700", str(inside)]),
        _run(
            ["cp", "--reflink=auto", "--sparse=always", *(str(saved / one) for one in way.dialect.saved), str(inside)]
        ),
        *_let_in(way.writer, inside),
        _left_over([way.socket, *_of_the_jailer(way.chroot)]),
    ]
    return [*steps, *way.dialect.restore(way.socket, f"/{name}")]


def _left_over(files: Iterable[Path]) -> RestoreStep:
    """A VMM does not begin where the socket of the one before is, nor the jailer where its files are."""
    return _run(["rm", "-f", *map(str, files)])


def _of_the_jailer(chroot: Path) -> list[Path]:
    """What it makes, and makes only once, in ``<base>/<program>/<id>/root``."""
    return [*(chroot / "dev" / device for device in _DEVICES), chroot / f"{chroot.parent.parent.name}.pid"]


def _let_in(writer: Writer, directory: Path) -> list[RestoreStep]:
    if not writer.is_other:
        return []
    assert writer.peer is not None
    if not writer.is_known:  # then its files are its own already
        return [_run(["chmod", "710", str(directory)])]
    return [_run(["chown", "-R", f"{writer.peer.uid}:{writer.peer.gid}", str(directory)])]


def _run(command: Iterable[str]) -> RestoreStep:
    return RestoreStep(RestoreAction.RUN, shlex.join(command))
