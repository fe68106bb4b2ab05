"""Snapshots on disk, for backends whose hypervisor keeps none or not all of what must be known.

``<root>/<instance>/<snapshot_id>/`` holds the payload and ``manifest.json``.
A snapshot is built as ``.<id>.partial``, made durable and renamed: what has a
plain name is complete. Blocking: call it in a worker thread.
"""

import contextlib
import ctypes
import itertools
import os
import shutil
import stat
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson
import structlog
from attrs import Factory, frozen

from hypemand.backends.base import BackendError, BackendUnavailable
from hypemand.core.errors import InvalidInput
from hypemand.core.model import Extra, InstanceId, RestoreStep, Snapshot, SnapshotKind
from hypemand.core.structure import new_converter, structure
from hypemand.core.utf8 import as_utf8

MARKER = ".hypemand-catalog"
MANIFEST = "manifest.json"
FORMAT = 1
_MARKER_TEXT = b"Made by hypemand. It tells an empty catalog from a filesystem that is not mounted.\n"
_CONVERTER = new_converter(omit_defaults=False)
_log = structlog.get_logger()


@frozen(kw_only=True)
class Manifest:
    """What is known of a snapshot, kept beside it.

    Attributes:
        files: Size in bytes by name, of the payload in this directory.
        hypervisor: Its name, version, and the instance's uuid where it has one.
        restore: The exact way back, once the snapshot has its place in the catalog.
        details: What the backend needs to find the snapshot again.
    """

    id: str
    instance_id: InstanceId
    name: str
    kind: SnapshotKind
    tags: Mapping[str, str]
    created_at: datetime
    size_bytes: int
    files: Mapping[str, int] = Factory(dict)
    hypervisor: Mapping[str, str] = Factory(dict)
    restore: tuple[RestoreStep, ...] = ()
    details: Mapping[str, Any] = Factory(dict)
    format: int = FORMAT
    extra: Extra = Factory(dict)

    def snapshot(self) -> Snapshot:
        """The snapshot as the engine sees it."""
        return Snapshot(
            id=self.id,
            instance_id=self.instance_id,
            name=self.name,
            kind=self.kind,
            created_at=self.created_at,
            size_bytes=self.size_bytes,
            tags=self.tags,
            restore=self.restore,
        )


@frozen
class Catalog:
    """The snapshots below one directory.

    What reads raises `BackendUnavailable` where the catalog's filesystem is
    not there; what writes does so too, and lets `OSError` pass: what a full
    disk means is for the backend to say.

    Attributes:
        mode: Of the directories that are made.
        group: To which they belong, a name or a number; None: as the filesystem has it.
    """

    root: Path
    mode: int = 0o700
    group: str | None = None

    def open(self, *, first_use: bool) -> None:
        """Make the directory and its marker on first use; afterwards only look for them.

        Raises:
            BackendUnavailable: No marker, though it was used before; or it can't be made.
        """
        if not first_use:
            self.check()
            return
        try:
            self._make(self.root)
            if not (self.root / MARKER).exists():
                (self.root / MARKER).write_bytes(_MARKER_TEXT)
                sync_tree(self.root, deep=False)
        except OSError as error:
            raise BackendUnavailable(f"snapshot directory {self.root} can't be made: {error.strerror}") from error

    def check(self) -> None:
        """Raise `BackendUnavailable` unless the catalog's own filesystem is there."""
        try:
            (self.root / MARKER).stat()
        except OSError as error:
            raise BackendUnavailable(
                f"snapshot directory {self.root} has no {MARKER} ({error.strerror}): is its filesystem mounted?"
                f" If it is new on purpose, run: mkdir -p {self.root} && touch {self.root / MARKER}"
            ) from error

    def manifests(self, instance: InstanceId) -> list[Manifest]:
        """Complete snapshots of *instance*, oldest first. A damaged manifest is logged and passed over, never deleted.

        Raises:
            BackendUnavailable: The catalog can't be read.
        """
        self.check()
        names = self._names(instance)
        found = [m for name in names if (m := _read_manifest(self.root / instance / name, instance, name)) is not None]
        return sorted(found, key=lambda m: (m.created_at, m.id))

    def _names(self, instance: InstanceId) -> list[str]:
        try:
            with os.scandir(self.root / instance) as entries:
                return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise BackendUnavailable(f"{self.root / instance} can't be read: {error.strerror}") from error

    def begin(self, instance: InstanceId, snapshot_id: str) -> Path:
        """An empty directory for the payload, not listed until `publish`."""
        self.check()
        partial = self.partial(instance, snapshot_id)
        shutil.rmtree(partial, ignore_errors=True)
        if partial.parent.is_dir():
            self._let_in(partial.parent)
        else:
            self._make(partial.parent)
        partial.mkdir(mode=self.mode & 0o777)
        self._open_up(partial)
        return partial

    def _make(self, directory: Path) -> None:
        if not directory.is_dir():
            directory.mkdir(mode=self.mode & 0o777, parents=True, exist_ok=True)
            self._open_up(directory)

    def _let_in(self, directory: Path) -> None:
        """Open *directory*, if it is ours, to whom it was not open when it was made. It is closed to nobody."""
        status = directory.stat()
        mode = stat.S_IMODE(status.st_mode)
        if status.st_uid != os.geteuid():
            return
        self._give_to_group(directory)
        if mode & self.mode & 0o777 == self.mode & 0o777:
            return
        try:
            directory.chmod(mode | self.mode)
        except PermissionError:  # the service's sandbox forbids to set that bit
            if mode & stat.S_ISGID:
                raise
            directory.chmod((mode | self.mode) & 0o777)

    def _open_up(self, directory: Path) -> None:
        """For a hypervisor that runs as another user."""
        self._give_to_group(directory)
        # The service's sandbox forbids to set the bit by which a directory hands on its group; it is handed on itself.
        if stat.S_IMODE(directory.stat().st_mode) not in (self.mode, self.mode | stat.S_ISGID):
            directory.chmod(self.mode)

    def _give_to_group(self, directory: Path) -> None:
        if self.group is not None:
            try:
                shutil.chown(directory, group=int(self.group) if self.group.isdecimal() else self.group)
            except LookupError as error:
                raise BackendUnavailable(f"there is no group {self.group!r} here: see snapshot_group") from error
            except OSError:  # in a user namespace a directory can have the group of the one above alone
                if not directory.stat().st_mode & stat.S_ISGID:
                    raise

    def home(self, instance: InstanceId, snapshot_id: str) -> Path:
        """Where a complete snapshot lives."""
        return self.root / _named(instance) / _named(snapshot_id)

    def partial(self, instance: InstanceId, snapshot_id: str) -> Path:
        """Where a snapshot is built."""
        return self.root / _named(instance) / f".{_named(snapshot_id)}.partial"

    def draft(self, instance: InstanceId, snapshot_id: str) -> Manifest | None:
        """The manifest of an unpublished snapshot, or None where it has none."""
        self.check()
        partial = self.partial(instance, snapshot_id)
        return _read_manifest(partial, instance, snapshot_id) if (partial / MANIFEST).exists() else None

    def find(self, instance: InstanceId, snapshot_id: str) -> Manifest | None:
        """The manifest of a complete snapshot, or None."""
        self.check()
        path = self.home(instance, snapshot_id)
        return _read_manifest(path, instance, snapshot_id) if path.is_dir() else None

    def write_manifest(self, manifest: Manifest) -> None:
        """Write the manifest of the snapshot that `begin` began."""
        path = self.partial(manifest.instance_id, manifest.id) / MANIFEST
        data = orjson.dumps(as_utf8(_CONVERTER.unstructure(manifest)), option=orjson.OPT_INDENT_2)
        new = path.with_suffix(".new")
        new.write_bytes(data + b"\n")
        new.replace(path)

    def publish(self, instance: InstanceId, snapshot_id: str) -> None:
        """Make the snapshot durable, then listed. Idempotent."""
        self.check()
        final = self.home(instance, snapshot_id)
        if not final.is_dir():
            partial = self.partial(instance, snapshot_id)
            sync_tree(partial)
            partial.rename(final)
        # Also where it has its name already: the publish that gave it may have failed right here.
        sync_tree(final.parent, deep=False)
        sync_tree(self.root, deep=False)

    def discard(self, instance: InstanceId, snapshot_id: str) -> None:
        """Remove what `begin` began, if it is still there. Nobody can publish it then, nor add a file by its path."""
        self.check()
        self._drop(self.partial(instance, snapshot_id), instance, snapshot_id)

    def delete(self, instance: InstanceId, snapshot_id: str) -> None:
        """Delete a snapshot durably: unlisted first, so that half of one is never seen. Already gone: no error."""
        self.check()
        self._drop(self.home(instance, snapshot_id), instance, snapshot_id)

    def _drop(self, directory: Path, instance: InstanceId, snapshot_id: str) -> None:
        home = self.root / instance
        # Nothing can be renamed onto what an earlier deletion of the same id left.
        names = (f".{snapshot_id}{number or ''}.deleted" for number in itertools.count())
        doomed = next(path for name in names if not (path := home / name).exists())
        with contextlib.suppress(FileNotFoundError):
            directory.rename(doomed)
            sync_tree(home, deep=False)
        # Unlisted it is deleted. What its bytes still take is given back now, or after a later deletion.
        for leftover in home.glob(".*.deleted"):
            try:
                _remove(leftover)
            except OSError as error:
                _log.warning(
                    "deleted snapshot still takes space; tried again later", path=str(leftover), error=str(error)
                )


def _named(name: str) -> str:
    """*name*, which leads to no other directory than the one of that name.

    Raises:
        BackendError: It would.
    """
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise BackendError(f"{name!r} can't name anything in a catalog")
    return name


def _remove(directory: Path) -> None:
    # A copy that was abandoned may still add a file while the tree is being removed, or another call remove it too.
    for last_try in (False, False, True):
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(directory, ignore_errors=not last_try)
        if not directory.exists():
            return


def _read_manifest(directory: Path, instance: InstanceId, snapshot_id: str) -> Manifest | None:
    try:
        manifest = structure(_CONVERTER, orjson.loads((directory / MANIFEST).read_bytes()), Manifest)
    except (OSError, orjson.JSONDecodeError, InvalidInput) as error:
        if directory.exists():  # else it was deleted meanwhile
            _left_alone(directory, str(error))
        return None
    if manifest.format > FORMAT:
        _left_alone(directory, f"format {manifest.format} is newer than this hypemand")
        return None
    if (manifest.instance_id, manifest.id) != (instance, snapshot_id):
        # Somebody's copy: under the id that it claims, another one would be counted and deleted.
        _left_alone(directory, f"it says that it is {manifest.instance_id}/{manifest.id}")
        return None
    return manifest


def _left_alone(directory: Path, why: str) -> None:
    _log.error("snapshot passed over and left alone: its manifest can't be used", path=str(directory), error=why)


def sync_tree(directory: Path, *, deep: bool = True) -> None:
    """Make *directory* durable, with all that is in it where *deep*."""
    if deep:
        for entry in directory.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                sync_tree(entry)
            elif not entry.is_symlink():
                try:
                    _sync(entry)
                except PermissionError:  # a hypervisor of another user has written it
                    _sync(directory, whole_filesystem=True)
    _sync(directory)


def _sync(path: Path, *, whole_filesystem: bool = False) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if whole_filesystem:
            _syncfs(descriptor)
        else:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _syncfs(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syncfs(descriptor) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
