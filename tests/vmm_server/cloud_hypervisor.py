"""Cloud Hypervisor's API, as its documents and sources have it."""

import fcntl
import json
import os
import re
import struct
from typing import Any

from tests.vmm_server.machine import Machine

ROOT = "/api/v1"
Answer = tuple[int, Any]


class CloudHypervisor:
    """One process with one VM. Statuses of old versions (before 2026) are 500 throughout, and their bodies plain."""

    def __init__(self, options: Any) -> None:
        self.options = options
        self.machine: Machine | None = None
        self.state = "Created"
        self.config: dict[str, Any] = {}
        self.locks: list[int] = []
        os.umask(0o077)
        if options.restore:
            self._restore(re.fullmatch("source_url=file://(.+)", options.restore)[1])  # type: ignore[index]
        elif not options.empty:
            self._create()

    def _create(self) -> None:
        options = self.options
        disks = [
            {"path": path, "readonly": kind == "ro", "direct": False, "vhost_user": False, "id": f"_disk{number}"}
            for number, (path, kind) in enumerate(options.disks)
        ]
        self.config = {
            "cpus": {"boot_vcpus": 1, "max_vcpus": 1},
            "memory": {"size": options.memory, "shared": False, "hotplugged_size": None, "zones": None},
            "payload": {"kernel": "/boot/vmlinux"},
            "disks": disks,
            "net": None,
            "fs": None,
            "pmem": None,
            "devices": None,
            "platform": {"num_pci_segments": 1, "uuid": "6f0bd1d3-3f1c-4d7e-9f0e-2d4a1c0b5e77"},
            **options.config,
        }
        self._machine()
        self.machine.run()  # type: ignore[union-attr]
        self.state = "Running"

    def _machine(self) -> None:
        disks = self.config["disks"] or []
        writable = [disk["path"] for disk in disks if not disk["readonly"] and disk.get("path")]
        self.machine = Machine(self.config["memory"]["size"], writable, self.options.tick_s)
        for pmem in self.config.get("pmem") or []:
            self.machine.hold(pmem["file"])
        if self.options.locks:
            self.locks = [self._locked(path) for path in writable]

    def _locked(self, path: str) -> int:
        descriptor = os.open(path, os.O_RDWR)
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0))
        return descriptor

    def _restore(self, directory: str) -> None:
        with open(f"{directory}/config.json") as file:
            self.config = json.load(file)
        self._machine()
        assert self.machine is not None
        self.machine.load(f"{directory}/memory-ranges")
        self.state = "Paused"

    def answer(self, method: str, path: str, body: bytes) -> Answer:
        name = path.removeprefix(f"{ROOT}/").replace(".", "_").replace("-", "_")
        handler = getattr(self, f"{method.lower()}_{name}", None)
        if handler is None or not path.startswith(ROOT):
            return self._error(404, "Not Found")
        return handler(json.loads(body) if body else None)  # type: ignore[no-any-return]

    def _error(self, status: int, *causes: str) -> Answer:
        if self.options.old:
            return 500 if status == 404 else status, ": ".join(causes)
        return status, list(causes)

    def _refused(self, what: str, why: str) -> Answer:
        return self._error(500, "Error from API", f"The VM could not be {what}", why)

    def _transition(self, what: str, to: str) -> Answer:
        return self._refused(what, f"Cannot {what}: Invalid transition: InvalidStateTransition({self.state}, {to})")

    def get_vmm_ping(self, _: Any) -> Answer:
        version = self.options.version
        return 200, {"build_version": f"v{version}", "version": version, "pid": os.getpid(), "features": ["kvm"]}

    def get_vm_info(self, _: Any) -> Answer:
        if self.machine is None:
            return self._error(404, "Error from API", "The VM info is not available", "VM is not created")
        size = self.config["memory"]["size"]
        return 200, {"config": self.config, "state": self.state, "memory_actual_size": size, "device_tree": {}}

    def put_vm_pause(self, body: Any) -> Answer:
        if body is not None:
            return self._error(400, "Bad Request")
        if self.machine is None:
            return self._error(404, "Error from API", "The VM could not be paused", "VM is not created")
        if self.state != "Running":
            return self._transition("paused", "Paused")
        self.machine.pause()
        self.state = "Paused"
        return 204, None

    def put_vm_resume(self, body: Any) -> Answer:
        if body is not None:
            return self._error(400, "Bad Request")
        if self.machine is None:
            return self._error(404, "Error from API", "The VM could not be resumed", "VM is not created")
        if self.state != "Paused":
            return self._transition("resumed", "Running")
        self.machine.run()
        self.state = "Running"
        return 204, None

    def put_vm_snapshot(self, body: Any) -> Answer:
        if self.machine is None:
            return self._error(404, "Error from API", "The VM could not be snapshotted", "VM is not created")
        if self.state != "Paused":
            return self._refused("snapshotted", "Trying to snapshot while VM is running")
        directory = str(body["destination_url"]).removeprefix("file://")
        try:
            if not os.path.isdir(directory):
                return self._refused("snapshotted", "Destination is not a directory")
            for name, content in (("config.json", self.config), ("state.json", {"devices": ["all of them"]})):
                with open(f"{directory}/{name}", "x") as file:
                    json.dump(content, file)
            self.machine.save(f"{directory}/memory-ranges", self.options.save_s, exclusive=True)
        except OSError as error:
            return self._refused("snapshotted", f"{error.strerror} (os error {error.errno})")
        return 204, None

    def put_vm_add_disk(self, body: Any) -> Answer:
        assert self.machine is not None
        self.machine.hold(body["path"])
        self.config["disks"].append({"readonly": False, "id": f"_disk{len(self.config['disks'])}", **body})
        return 204, None
