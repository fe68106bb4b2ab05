"""The type ``firecracker``: what Firecracker's API says and wants. The rest is in `hypemand.backends.vmm`.

After its documents (docs/snapshotting/snapshot-support.md, the API's
definition) for v1.x.
"""

import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from attrs import evolve, frozen

from hypemand.backends.base import BackendType, BackendUnavailable, Surroundings
from hypemand.backends.templates import filled, misplaced, named_by
from hypemand.backends.vmm.backend import VmmBackend, build
from hypemand.backends.vmm.both import both
from hypemand.backends.vmm.client import Client
from hypemand.backends.vmm.dialect import Drive, Identity, Look, Machine, table, tables
from hypemand.backends.vmm.handles import held_below
from hypemand.backends.vmm.settings import VmmSettings
from hypemand.core.errors import RuleBroken
from hypemand.core.model import InstanceId, InstanceState, RestoreAction, RestoreStep

MEMORY, STATE = "memory", "state"
_FULL = "Full"
_TRACKED = (
    "it tracks its dirty pages, and a snapshot by hypemand begins that anew: a diff snapshot that somebody takes later"
    " has only what changed since"
)
_MIB = 1 << 20
_STATES = {
    "Not started": InstanceState.CREATED,
    "Running": InstanceState.RUNNING,
    "Paused": InstanceState.PAUSED,
}


@frozen(kw_only=True)
class FirecrackerSettings(VmmSettings):
    """Keys of a backend of this type.

    Attributes:
        chroot: Where the jailer has a guest's Firecracker live, with ``{instance}``; None: not jailed.
        snapshot_type: ``Full`` alone.
    """

    chroot: Path | None = None
    snapshot_type: str = _FULL

    def disks_of(self, instance: InstanceId) -> list[Path]:
        """Files that fit the patterns. Below the chroot links lead to where they lead for Firecracker. Blocking.

        Raises:
            BackendUnavailable: A link leads out of there, or nowhere.
        """
        if self.chroot is None:
            return super().disks_of(instance)
        root = filled(self.chroot, instance)
        return list(dict.fromkeys(_below(root, path) for path in named_by(self.disks, instance)))

    def _broken(self) -> list[RuleBroken]:
        broken = super()._broken()
        if self.chroot is not None:
            broken += [RuleBroken(rule, "chroot") for rule in misplaced(self.chroot)]
        if self.snapshot_type == "Diff":
            broken.append(
                RuleBroken(
                    "'Diff' is not made: it holds only what changed since whoever took the last snapshot of this"
                    " guest, and is worth nothing without that one; see docs/firecracker.md. Use 'Full'",
                    "snapshot_type",
                )
            )
        elif self.snapshot_type != _FULL:
            broken.append(RuleBroken(f"{self.snapshot_type!r} must be 'Full'", "snapshot_type"))
        return broken


def _below(root: Path, path: Path) -> Path:
    if not path.is_relative_to(root):
        return path.resolve()
    try:
        return held_below(root, str(path.relative_to(root)))[1]
    except OSError as error:
        raise BackendUnavailable(
            f"{path} is a link, or below one, that leads out of {root}, or nowhere ({error.strerror}):"
            " a guest's disks have to be inside its chroot"
        ) from error


@frozen
class Firecracker:
    """Follows `hypemand.backends.vmm.dialect.Dialect`."""

    type_name: str = "firecracker"
    title: str = "Firecracker"
    saved: tuple[str, ...] = (MEMORY, STATE)
    memory_file: str = MEMORY
    documents: tuple[str, ...] = ()
    knows_qcow2: bool = False

    def why_no_qcow2(self, version: str) -> str | None:
        """It has none."""
        del version
        return None

    async def look(self, client: Client) -> Look:
        """By the instance info."""
        word = str(table(await client.get("/")).get("state"))
        known = _STATES.get(word)
        return Look(known) if known is not None else Look(InstanceState.UNKNOWN, word)

    async def inspect(self, client: Client) -> tuple[Look, Machine]:
        """The configuration is there before the guest is started, too."""
        look, config = await both(lambda: self.look(client), lambda: client.get("/vm/config"))
        return look, _machine(table(config))

    async def identify(self, client: Client) -> Identity:
        """Its version, and the id that it was started with."""
        info = table(await client.get("/"))
        return Identity(str(info.get("vmm_version") or ""), str(info.get("id") or ""))

    async def pause(self, client: Client) -> None:
        """No error where it is paused already."""
        await client.send("PATCH", "/vm", {"state": "Paused"})

    async def resume(self, client: Client) -> None:
        """No error where it runs already."""
        await client.send("PATCH", "/vm", {"state": "Resumed"})

    async def save(self, client: Client, directory: str) -> None:
        """Files that are there would be overwritten."""
        paths = {"snapshot_path": f"{directory}/{STATE}", "mem_file_path": f"{directory}/{MEMORY}"}
        await client.send("PUT", "/snapshot/create", {"snapshot_type": _FULL, **paths})

    def paused_already(self, reason: str) -> bool:
        """It never refuses for that."""
        del reason
        return False

    def restore(self, socket: Path, directory: str) -> tuple[RestoreStep, ...]:
        """A fresh process takes it, before anything else; it reads the memory for as long as the guest runs."""
        body = {
            "snapshot_path": f"{directory}/{STATE}",
            "mem_backend": {"backend_type": "File", "backend_path": f"{directory}/{MEMORY}"},
            "resume_vm": True,
        }
        load = ["curl", "-fsS", "--unix-socket", str(socket), "-X", "PUT", "http://localhost/snapshot/load"]
        load += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
        return (RestoreStep(RestoreAction.MONITOR, shlex.join(load)),)


def _machine(config: Mapping[str, Any]) -> Machine:
    hotplug = table(config.get("memory-hotplug")).get("total_size_mib")
    size = table(config.get("machine-config")).get("mem_size_mib")
    mebibytes = sum(value for value in (size, hotplug) if isinstance(value, int))
    return Machine(
        drives=(*map(_drive, tables(config.get("drives"))), *map(_pmem, tables(config.get("pmem")))),
        memory_bytes=mebibytes * _MIB,
        least_memory_bytes=(size if isinstance(size, int) else 0) * _MIB,
        refusals=tuple(
            f"drive {drive.get('drive_id')} is served by another process (vhost-user): Firecracker makes no"
            " snapshots of it. Attach it by its path"
            for drive in tables(config.get("drives"))
            if drive.get("socket")
        ),
        warnings=(_TRACKED,) if table(config.get("machine-config")).get("track_dirty_pages") else (),
    )


def _drive(drive: Mapping[str, Any]) -> Drive:
    path = None if drive.get("socket") else drive.get("path_on_host")
    return Drive(str(drive.get("drive_id")), path or None, bool(drive.get("is_read_only")))


def _pmem(pmem: Mapping[str, Any]) -> Drive:
    return Drive(str(pmem.get("id")), pmem.get("path_on_host") or None, bool(pmem.get("read_only")))


def _build(name: str, settings: FirecrackerSettings, surroundings: Surroundings) -> VmmBackend:
    chroot = settings.chroot.absolute() if settings.chroot is not None else None
    return build(name, Firecracker(), evolve(settings, chroot=chroot), surroundings, chroot=chroot)


@frozen
class _Type:
    settings: type[FirecrackerSettings] = FirecrackerSettings
    build: Callable[[str, FirecrackerSettings, Surroundings], VmmBackend] = _build


TYPE: BackendType = _Type()
