"""The folder backend keeps what hypemand asks of every backend."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from hypemand.backends import registry
from hypemand.backends.base import Surroundings
from hypemand.conformance import Subject, Traits, conformance
from hypemand.core.model import InstanceId


class FolderSubject(Subject):
    """One guest; an operator edits its file, and unreachable is a folder that is not mounted."""

    def __init__(self, directory: Path, type_name: str) -> None:
        self.instance = InstanceId("web-1")
        self.root = directory / "root"
        self.catalog = self.root / "snapshots"
        self.surroundings = Surroundings(directory)
        self.guest = self.root / "guests" / "web-1.json"
        self.guest.parent.mkdir(parents=True)
        self.guest.write_text('{"state": "Running", "memory": "all that it knows"}')
        connection = {"type": type_name, "root": str(self.root)}
        self.backend = registry.connect("mine", connection, self.surroundings)

    async def guest_runs(self) -> bool:
        return bool(json.loads(self.guest.read_text())["state"] == "Running")

    async def operator_pauses(self) -> None:
        self.guest.write_text('{"state": "Paused", "memory": "all that it knows"}')

    async def operator_resumes(self) -> None:
        self.guest.write_text('{"state": "Running", "memory": "all that it knows"}')

    async def go_away(self) -> None:
        self.root.rename(self.root.with_name("unmounted"))
        self.root.mkdir()

    async def come_back(self) -> None:
        self.root.rmdir()
        self.root.with_name("unmounted").rename(self.root)


@asynccontextmanager
async def folder_subject(directory: Path, type_name: str = "folder") -> AsyncIterator[Subject]:
    subject = FolderSubject(directory, type_name)
    await subject.backend.open(first_use=True)
    yield subject


test_conformance = conformance(folder_subject, Traits(catalog=True))
