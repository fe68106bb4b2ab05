"""Firecracker's API, as its documents have it."""

import json
import os
from typing import Any

from tests.vmm_server.machine import Machine

Answer = tuple[int, Any]
MIB = 1 << 20


class Firecracker:
    """One process with one microVM. With a chroot, each path is below it, as under the jailer."""

    def __init__(self, options: Any) -> None:
        self.options = options
        self.machine: Machine | None = None
        self.state = "Not started"
        self.config: dict[str, Any] = {"drives": [], "machine-config": {"vcpu_count": 1, "mem_size_mib": 0}}
        if not options.empty:
            self._start()

    def _start(self) -> None:
        options = self.options
        drives = [
            {
                "drive_id": "rootfs" if number == 0 else f"drive{number}",
                "is_root_device": number == 0,
                "is_read_only": kind == "ro",
                "path_on_host": path,
                "cache_type": "Unsafe",
                "io_engine": "Sync",
            }
            for number, (path, kind) in enumerate(options.disks)
        ]
        self.config = {
            "drives": drives,
            "boot-source": {"kernel_image_path": "/boot/vmlinux"},
            "machine-config": {"vcpu_count": 1, "mem_size_mib": options.memory // MIB, "track_dirty_pages": False},
            "network-interfaces": [],
            "vsock": None,
            **options.config,
        }
        self._machine()
        self.machine.run()  # type: ignore[union-attr]
        self.state = "Running"

    def _machine(self) -> None:
        writable = [self._host(d["path_on_host"]) for d in self.config["drives"] if not d["is_read_only"]]
        size = self.config["machine-config"]["mem_size_mib"] * MIB
        self.machine = Machine(size, writable, self.options.tick_s)
        for pmem in self.config.get("pmem") or []:
            self.machine.hold(self._host(pmem["path_on_host"]))

    def _host(self, path: str) -> str:
        return f"{self.options.chroot}/{path.lstrip('/')}" if self.options.chroot else path

    def answer(self, method: str, path: str, body: bytes) -> Answer:
        handler = {
            "GET /": self.info,
            "GET /version": lambda _: (200, {"firecracker_version": "1.13.1"}),
            "GET /vm/config": lambda _: (200, self.config),
            "PATCH /vm": self.change,
            "PUT /snapshot/create": self.create,
            "PUT /snapshot/load": self.load,
        }.get(f"{method} {path}")
        if handler is None:
            return self._error(f"Invalid request method and/or path: {method} {path}.")
        return handler(json.loads(body) if body else None)

    def _error(self, message: str) -> Answer:
        return 400, {"fault_message": message}

    def info(self, _: Any) -> Answer:
        return 200, {"app_name": "Firecracker", "id": "anonymous", "state": self.state, "vmm_version": "1.13.1"}

    def change(self, body: Any) -> Answer:
        """Asked for the state that it has, it says yes."""
        if self.machine is None:
            return self._error("The requested operation is not supported before starting the microVM.")
        if body == {"state": "Paused"}:
            self.machine.pause()
            self.state = "Paused"
        elif body == {"state": "Resumed"}:
            self.machine.run()
            self.state = "Running"
        else:
            return self._error(f"An error occurred when deserializing the json body of a request: {body}.")
        return 204, None

    def create(self, body: Any) -> Answer:
        """Files that are there are overwritten."""
        if self.machine is None:
            return self._error("The requested operation is not supported before starting the microVM.")
        if self.state != "Paused":
            return self._error("Create snapshot error: Cannot save the microVM state: it is not paused.")
        if body.keys() - {"snapshot_type", "snapshot_path", "mem_file_path"} or body["snapshot_type"] != "Full":
            return self._error("An error occurred when deserializing the json body of a request.")
        try:
            with open(self._host(body["snapshot_path"]), "w") as file:
                json.dump(self.config, file)
            self.machine.save(self._host(body["mem_file_path"]), self.options.save_s, exclusive=False)
        except OSError as error:
            return self._error(f"Create snapshot error: Cannot write: {error.strerror} (os error {error.errno})")
        return 204, None

    def load(self, body: Any) -> Answer:
        if self.machine is not None:
            return self._error("Loading a microVM snapshot not allowed after configuring boot-specific resources.")
        try:
            with open(self._host(body["snapshot_path"])) as file:
                self.config = json.load(file)
            memory = self._host(body["mem_backend"]["backend_path"])
            if os.path.getsize(memory) != self.config["machine-config"]["mem_size_mib"] * MIB:
                return self._error("Load snapshot error: the size of the memory file is not that of the memory.")
            self._machine()
            assert self.machine is not None
            self.machine.load(memory)
        except OSError as error:
            self.machine = None
            return self._error(f"Load snapshot error: {error.strerror} (os error {error.errno})")
        self.state = "Paused"
        return self.change({"state": "Resumed"}) if body.get("resume_vm") else (204, None)
