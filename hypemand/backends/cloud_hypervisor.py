"""The type ``cloud-hypervisor``: what Cloud Hypervisor's API says and wants. The rest is in `hypemand.backends.vmm`.

States and bodies are those of its sources (vmm/src/api), from 2021's v14 to
v51: later versions say more with their status codes, and are not relied upon.
"""

import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from hypemand.backends.base import BackendType, Surroundings
from hypemand.backends.vmm.backend import VmmBackend, build
from hypemand.backends.vmm.client import Client, Refused
from hypemand.backends.vmm.dialect import Drive, Identity, Look, Machine, table, tables
from hypemand.backends.vmm.settings import VmmSettings
from hypemand.core.model import InstanceState, RestoreAction, RestoreStep

_API = "/api/v1"
_STATES = {
    "Created": InstanceState.CREATED,
    "Running": InstanceState.RUNNING,
    "Shutdown": InstanceState.SHUTDOWN,
    "Paused": InstanceState.PAUSED,
}
_NO_VM = re.compile(r"not created|VmNotCreated|config is missing|VmMissingConfig", re.IGNORECASE)
_PAUSED_ALREADY = re.compile(r"\bPaused\b\W+(to\W+)?Paused\b")
_VERSION = re.compile(r"v?(\d+)\.")
_WRITES_TABLES = 54
"""The first version that does so for a pause (its pull request 8607, of July 2026, after 53.0)."""
_DEVICES = {
    "devices": "devices of the host (VFIO)",
    "user_devices": "devices of other processes (vfio-user)",
    # Cloud Hypervisor refuses to pause it when the vCPUs stand still already, and can't resume them then.
    "vdpa": "vDPA devices",
}


@frozen
class CloudHypervisor:
    """Follows `hypemand.backends.vmm.dialect.Dialect`."""

    type_name: str = "cloud-hypervisor"
    title: str = "Cloud Hypervisor"
    saved: tuple[str, ...] = ("config.json", "state.json", "memory-ranges")
    memory_file: str = "memory-ranges"
    documents: tuple[str, ...] = ("config.json", "state.json")
    knows_qcow2: bool = True

    def why_no_qcow2(self, version: str) -> str | None:
        """Until 53 it had an image's newest tables in its memory alone, until the guest flushed or shut down."""
        known = _VERSION.match(version)
        if known is not None and int(known[1]) >= _WRITES_TABLES:
            return None
        return (
            f"Cloud Hypervisor {version or 'of an unknown version'} does not write the tables of a qcow2 image when it"
            f" pauses a guest (since {_WRITES_TABLES}.0 it does): a copy would lack what the guest has written. Use a"
            " raw disk (image_type=raw), or a newer version"
        )

    async def look(self, client: Client) -> Look:
        """By ``vm.info``, which is an error where the process has no VM yet, or no more."""
        look, _ = await self._info(client)
        return look

    async def inspect(self, client: Client) -> tuple[Look, Machine]:
        """By the same answer."""
        look, info = await self._info(client)
        return look, _machine(info)

    async def _info(self, client: Client) -> tuple[Look, Mapping[str, Any]]:
        try:
            info = table(await client.get(f"{_API}/vm.info"))
        except Refused as error:
            if error.status == 404 or _NO_VM.search(error.reason):
                return Look(InstanceState.CREATED, "the VMM runs without a VM"), {}
            raise
        word = str(info.get("state"))
        known = _STATES.get(word)
        return (Look(known) if known is not None else Look(InstanceState.UNKNOWN, word)), info

    async def identify(self, client: Client) -> Identity:
        """Its version, and the UUID that the guest sees, if it was given one."""
        ping = table(await client.get(f"{_API}/vmm.ping"))
        info = table(await client.get(f"{_API}/vm.info"))
        uuid = table(table(info.get("config")).get("platform")).get("uuid")
        return Identity(str(ping.get("version") or ping.get("build_version") or ""), str(uuid or ""))

    async def pause(self, client: Client) -> None:
        """An error where it is paused already."""
        await client.send("PUT", f"{_API}/vm.pause")

    async def resume(self, client: Client) -> None:
        """An error where it runs already."""
        await client.send("PUT", f"{_API}/vm.resume")

    async def save(self, client: Client, directory: str) -> None:
        """The directory has to be there, and none of the files in it. The path goes as it is: nothing is decoded."""
        await client.send("PUT", f"{_API}/vm.snapshot", {"destination_url": f"file://{directory}"})

    def paused_already(self, reason: str) -> bool:
        """It names both states: ``InvalidStateTransition(Paused, Paused)``, or ``Paused to Paused``."""
        return _PAUSED_ALREADY.search(reason) is not None

    def restore(self, socket: Path, directory: str) -> tuple[RestoreStep, ...]:
        """It comes up paused. ``--restore`` stands in the place of all that describes the machine."""
        resume = ["curl", "-fsS", "--unix-socket", str(socket), "-X", "PUT", f"http://localhost{_API}/vm.resume"]
        return (
            RestoreStep(RestoreAction.START, f"--restore {shlex.quote(f'source_url=file://{directory}')}"),
            RestoreStep(RestoreAction.MONITOR, shlex.join(resume)),
        )


def _machine(info: Mapping[str, Any]) -> Machine:
    config = table(info.get("config"))
    memory = table(config.get("memory"))
    return Machine(
        drives=(*map(_disk, tables(config.get("disks"))), *map(_pmem, tables(config.get("pmem")))),
        memory_bytes=max(_memory(memory), _number(info.get("memory_actual_size"))),
        least_memory_bytes=sum(_number(part.get("size")) for part in (memory, *tables(memory.get("zones")))),
        refusals=tuple(_refusals(config)),
        warnings=tuple(_warnings(config)),
        may_write=tuple(_landlock(config)) if config.get("landlock_enable") else None,
    )


def _landlock(config: Mapping[str, Any]) -> Iterator[str]:
    """Its own files are allowed beside them, of which none is a directory."""
    for rule in tables(config.get("landlock_rules")):
        if "w" in str(rule.get("access")):
            yield str(rule.get("path"))


def _disk(disk: Mapping[str, Any]) -> Drive:
    elsewhere = disk.get("vhost_user") or disk.get("vhost_socket") or not disk.get("path")
    # Without a word on it, or in a version that knows none, it goes by what the file begins with.
    may_be_qcow2 = str(disk.get("image_type") or "unknown").lower() in ("qcow2", "unknown")
    path = None if elsewhere else disk["path"]
    return Drive(str(disk.get("id") or disk.get("path")), path, bool(disk.get("readonly")), may_be_qcow2)


def _pmem(pmem: Mapping[str, Any]) -> Drive:
    """With ``discard_writes`` what the guest writes is the VMM's own, and goes with it."""
    path = pmem.get("file")
    return Drive(str(pmem.get("id") or path), path or None, bool(pmem.get("discard_writes")))


def _memory(memory: Mapping[str, Any]) -> int:
    zones = sum(_number(zone.get("size")) + _number(zone.get("hotplug_size")) for zone in tables(memory.get("zones")))
    return _number(memory.get("size")) + _number(memory.get("hotplugged_size")) + zones


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _refusals(config: Mapping[str, Any]) -> Iterator[str]:
    for key, what in _DEVICES.items():
        if tables(config.get(key)):
            yield f"Cloud Hypervisor makes no snapshots of a guest with {what}: detach them"
    for what in _vhost_user(config):
        yield (
            f"{what} is served by another process (vhost-user), whose state is in no snapshot: a restore hangs, or the"
            " capture does harm. Take it away, or have it without vhost-user"
        )
    memory = table(config.get("memory"))
    for zone in (memory, *tables(memory.get("zones"))):
        if zone.get("file") and zone.get("shared"):
            yield (
                f"its memory is a shared file ({zone['file']}), which Cloud Hypervisor leaves out of a snapshot:"
                " have it private (shared=off), or without a file"
            )


def _vhost_user(config: Mapping[str, Any]) -> Iterator[str]:
    """Devices of which only the front is the VMM's."""
    for share in tables(config.get("fs")):
        yield f"the shared directory {share.get('tag')!r} (fs)"
    for key in ("generic_vhost_user", "generic-vhost-user"):
        for device in tables(config.get(key)):
            yield f"device {device.get('id') or device.get('socket')}"
    for key, what in (("net", "network device"), ("disks", "disk")):
        for device in tables(config.get(key)):
            if device.get("vhost_user") or device.get("vhost_socket"):
                yield f"{what} {device.get('id') or device.get('vhost_socket')}"


def _warnings(config: Mapping[str, Any]) -> Iterator[str]:
    if nets := [str(net.get("id")) for net in tables(config.get("net")) if net.get("fds")]:
        yield f"network devices {', '.join(nets)} were given as descriptors: a restore needs new ones (net_fds)"


def _build(name: str, settings: VmmSettings, surroundings: Surroundings) -> VmmBackend:
    return build(name, CloudHypervisor(), settings, surroundings)


@frozen
class _Type:
    settings: type[VmmSettings] = VmmSettings
    build: Callable[[str, VmmSettings, Surroundings], VmmBackend] = _build


TYPE: BackendType = _Type()
