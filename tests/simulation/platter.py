"""What a disk holds, what of it is durable, and what it may hold after a power cut."""

import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import orjson
from attrs import define, field

Image = dict[str, dict[str, bytes]]
"""Contents of files, by directory and name."""


@define
class File:
    """A file on the platter: what was written, and how much of it is durable."""

    data: bytearray = field(factory=bytearray)
    synced: int = 0
    poisoned: int | None = None  # from here on the kernel dropped what it could not write, and calls it clean
    scanned: int = 0


@define(eq=False)
class Platter:
    """Real files below *root*, and beside them what of them would outlive a power cut.

    Attributes:
        lines: Lines of the run log that are durable: event and run id to document.
        on_line, on_twice: Told of each as it becomes durable, and of a finished line that is there already.
    """

    root: Path
    on_line: Callable[[dict[str, Any]], None]
    on_twice: Callable[[dict[str, Any]], None]
    files: dict[int, File] = field(factory=dict)
    entries: dict[Path, dict[str, int]] = field(factory=dict)
    lines: dict[tuple[str, str], dict[str, Any]] = field(factory=dict)
    lost_renames: int = 0
    torn_ends: int = 0

    def wrote(self, descriptor: int, count: int, data: bytes) -> None:
        """The last *count* bytes of the file are *data*."""
        status = os.fstat(descriptor)
        file = self.files.setdefault(status.st_ino, File())
        start = status.st_size - count
        if len(file.data) > start:  # emptied when it was opened
            self._cut(file, start)
        file.data += data

    def wrote_again(self, path: Path, start: int, end: int) -> None:
        """What the file holds from *start* to *end* was written once more, and is the kernel's to write back again."""
        file = self.files.get(path.stat().st_ino)
        if file is not None and file.poisoned is not None and start <= file.poisoned <= end:
            file.poisoned = None

    @staticmethod
    def _cut(file: File, size: int) -> None:
        del file.data[size:]
        file.synced, file.scanned = min(file.synced, size), min(file.scanned, size)
        if file.poisoned is not None and size <= file.poisoned:
            file.poisoned = None

    def synced(self, descriptor: int) -> None:
        file = self.files.setdefault(os.fstat(descriptor).st_ino, File())
        file.synced = len(file.data) if file.poisoned is None else min(file.poisoned, len(file.data))
        self._scan(file)

    def sync_failed(self, descriptor: int) -> None:
        file = self.files.setdefault(os.fstat(descriptor).st_ino, File())
        if file.poisoned is None and file.synced < len(file.data):
            file.poisoned = file.synced

    def truncated(self, descriptor: int, size: int) -> None:
        file = self.files.setdefault(os.fstat(descriptor).st_ino, File())
        self._cut(file, size)
        self.synced(descriptor)

    def _scan(self, file: File) -> None:
        if not file.data.startswith(b'{"event"'):
            return
        fresh = bytes(file.data[file.scanned : file.synced])
        end = fresh.rfind(b"\n") + 1
        for raw in fresh[:end].splitlines():
            try:
                line = orjson.loads(raw)
            except orjson.JSONDecodeError:
                continue
            key = (line["event"], line["run_id"])
            if key in self.lines and line["event"] == "finished":
                self.on_twice(line)
            self.lines[key] = line
            self.on_line(line)
        file.scanned += end

    def synced_directory(self, path: Path) -> None:
        self.entries[path] = self._listing(path)

    @staticmethod
    def _listing(path: Path) -> dict[str, int]:
        with os.scandir(path) as found:
            return {entry.name: entry.inode() for entry in found if entry.is_file(follow_symlinks=False)}

    def _directories(self) -> list[Path]:
        return sorted(path for path in [self.root, *self.root.rglob("*")] if path.is_dir())

    def _content(self, directory: Path, name: str, inode: int) -> File:
        if inode not in self.files:  # made past us: durable by then
            data = bytearray((directory / name).read_bytes())
            self.files[inode] = File(data, len(data), None, len(data))
        return self.files[inode]

    def as_it_is(self) -> Image:
        """What is on the disk now, as long as the power stays."""
        return {
            str(directory.relative_to(self.root)): {
                name: (directory / name).read_bytes() for name in sorted(self._listing(directory))
            }
            for directory in self._directories()
        }

    def after_power_cut(self, rng: Random) -> Image:
        """A state that the disk may have when the power is cut now: what was not synced is lost or not."""
        kept: dict[Path, dict[str, int]] = {}
        gone: dict[int, list[tuple[Path, str]]] = {}
        now = {directory: self._listing(directory) for directory in self._directories()}
        for directory, current in now.items():
            durable = self.entries.get(directory, {})
            chosen = kept.setdefault(directory, {})
            for name in sorted(current.keys() | durable.keys()):
                inode = current.get(name)
                if current.get(name) != durable.get(name) and rng.random() < 0.5:
                    inode = durable.get(name)
                    self.lost_renames += name in durable and name in current
                if inode is not None:
                    chosen[name] = inode
                elif name in durable and inode is None:
                    gone.setdefault(durable[name], []).append((directory, name))
        self._undo_half_moves(kept, gone, now)
        self._undo_doubles(kept)
        self._undo_half_shifts(kept, now)
        return {
            str(directory.relative_to(self.root)): {
                name: self._torn(self._content(directory, name, inode), rng) for name, inode in sorted(names.items())
            }
            for directory, names in kept.items()
        }

    @staticmethod
    def _undo_half_moves(
        kept: dict[Path, dict[str, int]], gone: dict[int, list[tuple[Path, str]]], now: dict[Path, dict[str, int]]
    ) -> None:
        """A file that was moved is in one place at least: a rename is one step of the filesystem's journal."""
        held = {inode for names in kept.values() for inode in names.values()}
        there = {inode for names in now.values() for inode in names.values()}
        for inode, places in gone.items():
            if inode in there and inode not in held:
                directory, name = places[0]
                kept[directory].setdefault(name, inode)

    def _undo_doubles(self, kept: dict[Path, dict[str, int]]) -> None:
        """A file that was moved is in one place only: where it was, if that is durable."""
        for directory, names in kept.items():
            durable = self.entries.get(directory, {})
            homes = {inode: name for name, inode in durable.items() if names.get(name) == inode}
            for name, inode in sorted(names.items()):
                if homes.get(inode, name) != name:
                    del names[name]
                    if name in durable and durable[name] not in names.values():
                        names[name] = durable[name]

    def _undo_half_shifts(self, kept: dict[Path, dict[str, int]], now: dict[Path, dict[str, int]]) -> None:
        """Files that moved into each other's places did so one after the other: none of them is lost on the way."""
        held = {inode for names in kept.values() for inode in names.values()}
        there = {inode for names in now.values() for inode in names.values()}
        for directory, durable in self.entries.items():
            if directory in kept and any(inode in there and inode not in held for inode in durable.values()):
                kept[directory] = {**durable}

    def _torn(self, file: File, rng: Random) -> bytes:
        tail = bytes(file.data[file.synced :])
        if not tail:
            return bytes(file.data)
        self.torn_ends += 1
        held = rng.randrange(len(tail) + 1)
        zeros = rng.randrange(len(tail) - held + 1) if rng.random() < 0.3 else 0
        return bytes(file.data[: file.synced]) + tail[:held] + bytes(zeros)

    def rebuild(self, image: Image) -> None:
        """Make the disk hold *image*, all of it durable."""
        for directory in self._directories():
            for name in self._listing(directory):
                (directory / name).unlink()
        for name_of_directory, contents in image.items():
            (self.root / name_of_directory).mkdir(parents=True, exist_ok=True)
            for name, data in contents.items():
                (self.root / name_of_directory / name).write_bytes(data)
        self.adopt()

    def edited(self, path: Path, data: bytes) -> None:
        """Somebody else put a new file at *path*, durably."""
        inode = path.stat().st_ino
        self.files[inode] = File(bytearray(data), len(data), None, len(data))
        self.entries.setdefault(path.parent, {})[path.name] = inode

    def adopt(self) -> None:
        """Take all that is there for durable: it was edited by hand, or is what a crash left."""
        self.files.clear()
        self.entries.clear()
        self.lines.clear()
        for directory in self._directories():
            self.entries[directory] = self._listing(directory)
            for name, inode in self.entries[directory].items():
                data = bytearray((directory / name).read_bytes())
                self.files[inode] = File(data, len(data))
                if name.startswith("runs.jsonl"):
                    self._scan(self.files[inode])
