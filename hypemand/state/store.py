"""The schedules, in memory and as one file each; what can't be read is set aside or retried, never overwritten."""

import errno
import os
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from types import MappingProxyType

import structlog
import trio

from hypemand.core.errors import InvalidInput
from hypemand.core.model import InstanceId, Schedule
from hypemand.core.naming import check_instance_id
from hypemand.state.codec import NewerFormatError, decode_schedule, encode_schedule
from hypemand.state.files import TEMPORARY_SUFFIX, Disk, Signature
from hypemand.state.scan import BadFile, Scan, scan_file, scan_schedules
from hypemand.state.turns import Turns
from hypemand.state.writing import Writer

_log = structlog.get_logger()


class Store:
    """Schedules by instance. Memory is in force; every change is written through, durable when the call returns.

    Only the holder of the state lock may call what is not a read.
    """

    def __init__(self, state_dir: Path, disk: Disk, now: Callable[[], datetime]) -> None:
        self.state_dir = state_dir
        self._disk = disk
        self._writer = Writer(disk)
        self._now = now
        self._schedules: dict[InstanceId, Schedule] = {}
        self._signatures: dict[InstanceId, Signature] = {}
        self._writing = Turns[InstanceId]()
        self._forgotten: set[InstanceId] = set()  # since files began to be read again
        self.unsaved: set[InstanceId] = set()
        self.has_unsaved = trio.Event()
        self.unreadable: tuple[BadFile, ...] = ()  # left where they are, and never overwritten; `reread` tries again
        self.set_aside: set[InstanceId] = set()

    @property
    def schedules(self) -> Mapping[InstanceId, Schedule]:
        """Every schedule, by instance."""
        return MappingProxyType(self._schedules)

    @property
    def unreadable_instances(self) -> frozenset[str]:
        """Instances whose file is there, but can't be read."""
        return frozenset(bad.path.stem for bad in self.unreadable)

    @property
    def directory(self) -> Path:
        """Where the schedule files are."""
        return self.state_dir / "schedules"

    @property
    def retired_directory(self) -> Path:
        """Where the files of schedules are that were taken out of the config."""
        return self.directory / "retired"

    @property
    def quarantine_directory(self) -> Path:
        """Where files with invalid content are, each with a note."""
        return self.state_dir / "quarantine"

    async def load(self) -> None:
        """Read every file. Invalid ones go to quarantine, unreadable ones are left for `reread`.

        Raises:
            NewerFormatError: A file of a later version; nothing was touched.
            OSError: The directories can't be made or listed.
        """
        scan = await self._disk.call(self._scan_and_prepare)
        if scan.newer:
            raise NewerFormatError("; ".join(f"{bad.path}: {bad.problem}" for bad in scan.newer))
        await self._take_in(scan, {})

    def _scan_and_prepare(self) -> Scan:
        scan = scan_schedules(self.directory, self._disk)
        if scan.newer:
            return scan
        for directory in (self.state_dir, self.directory, self.retired_directory, self.quarantine_directory):
            self._disk.make_directory(directory)
            for leftover in directory.glob(f".*{TEMPORARY_SUFFIX}"):
                leftover.unlink()
        return scan

    async def _take_in(self, scan: Scan, known: Mapping[InstanceId, Signature]) -> None:
        """Put *scan* in force, made when the files were *known*, but for what has changed here meanwhile."""
        for bad in scan.unreadable:
            _log.error("state file unreadable; will be tried again", path=str(bad.path), error=bad.problem)
        for bad in scan.newer:
            _log.error("state file of a newer hypemand left alone", path=str(bad.path), error=bad.problem)
        self.unreadable = (*scan.unreadable, *scan.newer)
        for bad in scan.invalid:
            await self._set_aside(bad, known)
        for instance, (schedule, signature) in scan.schedules.items():
            if not self._changed_since(instance, known):
                self._schedules[instance] = schedule
                self._signatures[instance] = signature
                self.unsaved.discard(instance)

    def _changed_since(self, instance: InstanceId, known: Mapping[InstanceId, Signature]) -> bool:
        """Whether the file of *instance* was written or removed by us since it was *known*, or is just now."""
        if instance in self._forgotten or self._writing.is_taken(instance):
            return True
        return self._signatures.get(instance) != known.get(instance)

    async def _set_aside(self, bad: BadFile, known: Mapping[InstanceId, Signature]) -> None:
        instance = InstanceId(bad.path.stem)
        if self._changed_since(instance, known):
            return
        async with self._writing.turn(instance):
            if await self._quarantine(bad):
                self.set_aside.add(instance)
                self._signatures.pop(instance, None)
            else:
                self.unreadable = (*self.unreadable, bad)
        if instance in self._schedules:  # an edit gone wrong
            try:
                await self.put(self._schedules[instance])
            except OSError as error:
                _log.error("schedule not written; trying again", instance_id=instance, error=str(error))

    async def _quarantine(self, bad: BadFile) -> bool:
        aside = self.quarantine_directory / f"{bad.path.name}.{self._now():%Y%m%d-%H%M%S-%f}"
        note = f"{bad.path.name}: {bad.problem}\nSet aside at {self._now():%Y-%m-%dT%H:%M:%SZ}.\n"

        def move() -> None:
            self._disk.replace(aside.with_name(f"{aside.name}.note"), note.encode(errors="backslashreplace"))
            self._disk.rename(bad.path, aside)
            aside.chmod(0o600)

        try:
            await self._disk.call(move)
        except OSError as error:
            _log.error("invalid state file can't be set aside", path=str(bad.path), error=str(error))
            return False
        _log.error("invalid state file set aside", path=str(bad.path), quarantine=str(aside), error=bad.problem)
        return True

    async def reread(self) -> frozenset[InstanceId]:
        """Take in what was edited by hand, and what could not be read before.

        An invalid edit goes to quarantine, and the schedule in memory is
        written anew. The schedule of a removed file is dropped.

        Returns:
            Instances whose schedule changed, came or went.
        """
        before = dict(self._schedules)
        known = dict(self._signatures)
        self._forgotten.clear()
        try:
            scan = await self._disk.call(scan_schedules, self.directory, self._disk, known)
        except OSError as error:
            _log.error("schedules not read again", path=str(self.directory), error=str(error))
            return frozenset()
        if scan.missing:
            _log.error("the directory of schedules is gone; those in memory stay in force", path=str(self.directory))
            return frozenset()
        invalid = [InstanceId(bad.path.stem) for bad in scan.invalid]
        passed_over = [instance for instance in invalid if self._changed_since(instance, known)]
        await self._take_in(scan, known)
        for instance, (_, signature) in scan.schedules.items():
            if self._signatures.get(instance) != signature:
                await self._look_again(instance)
        for instance in passed_over:
            await self._look_again(instance)
        for instance in known.keys() & self._schedules.keys():
            await self._drop_if_removed(instance, known)
        keys = before.keys() | self._schedules.keys()
        return frozenset(key for key in keys if before.get(key) != self._schedules.get(key))

    async def _look_again(self, instance: InstanceId) -> None:
        """Take in an edit that was not, for the file was just being written; it may have come right after that."""
        again = Scan()
        async with self._writing.turn(instance):
            known = {i: s for i, s in self._signatures.items() if i == instance}
            await self._disk.call(scan_file, self.directory, self._path(instance).name, self._disk, known, again)
            if instance in self._schedules and instance in again.schedules:
                self._schedules[instance], self._signatures[instance] = again.schedules[instance]
                self.unsaved.discard(instance)
        for bad in again.invalid:
            await self._set_aside(bad, dict(self._signatures))

    async def _drop_if_removed(self, instance: InstanceId, known: Mapping[InstanceId, Signature]) -> None:
        if not self._changed_since(instance, known):
            async with self._writing.turn(instance):
                if await self._disk.call(_is_gone, self._path(instance)):
                    self._forget(instance)

    def hold(self, schedule: Schedule) -> None:
        """Make *schedule* the one in force at once; `save_unsaved` writes it."""
        self._take(schedule)
        self.has_unsaved.set()

    def remember(self, schedule: Schedule) -> None:
        """Make *schedule* the one in force. The run log has what is new in it; the file follows with the next put."""
        self._schedules[schedule.instance_id] = schedule

    def _take(self, schedule: Schedule) -> None:
        self._schedules[schedule.instance_id] = schedule
        self.unsaved.add(schedule.instance_id)

    def is_written(self, instance: InstanceId) -> bool:
        """Whether its schedule is on the disk as it is in force, for sure."""
        return instance not in self.unsaved and not self._writing.is_taken(instance)

    async def put(self, schedule: Schedule) -> None:
        """Make *schedule* the one in force, and write it.

        Raises:
            OSError: It is in force, but not written; `save_unsaved` tries again.
        """
        instance = check_instance_id(schedule.instance_id)
        self._take(schedule)
        async with self._writing.turn(instance):
            latest = self._schedules.get(instance)
            if latest is None or instance not in self.unsaved:
                return  # removed, or written together with a later change
            self.unsaved.discard(instance)
            try:
                signature = await self._writer.replace(self._writable(instance), encode_schedule(latest))
            except BaseException:
                self.unsaved.add(instance)
                self.has_unsaved.set()
                raise
            if instance in self._schedules:
                self._signatures[instance] = signature

    def _writable(self, instance: InstanceId) -> Path:
        path = self._path(instance)
        if any(bad.path == path for bad in self.unreadable):
            raise OSError(errno.EBUSY, "not overwritten: it holds what could not be read", str(path))
        return path

    async def save_unsaved(self) -> None:
        """Write again what could not be written before. Raises OSError if some of it still can't be."""
        self.has_unsaved = trio.Event()
        failed: OSError | None = None
        for instance in sorted(self.unsaved):
            if instance not in self._schedules:
                self.unsaved.discard(instance)
                continue
            try:
                await self.put(self._schedules[instance])
            except OSError as error:
                failed = error
        if failed is not None:
            raise failed

    async def remove(self, instance: InstanceId) -> None:
        """Delete the schedule of *instance*, and its file."""
        self._forget(instance)
        async with self._writing.turn(instance):
            await self._disk.call(self._disk.remove, self._path(instance))

    async def retire(self, instance: InstanceId) -> None:
        """Take the schedule of *instance* out of force, and keep its file apart.

        An earlier one there that can't be read is set aside.
        """
        schedule = self._schedules[instance]
        self._forget(instance)
        target = self.retired_directory / f"{instance}.json"

        def move() -> None:
            # From memory: the file may lag behind.
            self._disk.replace(target, encode_schedule(schedule))
            self._disk.remove(self._path(instance))

        async with self._writing.turn(instance):
            if await self._disk.call(target.exists) and await self.read_retired(instance) is None:
                await self._quarantine(BadFile(target, "retired again, and the one before can't be read"))
            await self._disk.call(move)

    async def read_retired(self, instance: InstanceId) -> Schedule | None:
        """The retired schedule of *instance*, or None where there is none that can be read."""
        path = self.retired_directory / f"{check_instance_id(instance)}.json"
        try:
            data, _ = await self._disk.call(self._disk.read, path)
            return decode_schedule(data, instance)
        except FileNotFoundError:
            return None
        except (OSError, InvalidInput, NewerFormatError) as error:
            _log.error("retired schedule unreadable; starting anew", path=str(path), error=str(error))
            return None

    async def retired_among(self, instances: frozenset[InstanceId]) -> frozenset[InstanceId]:
        """Those of *instances* that have a retired file, or may have one."""
        try:
            names = await self._disk.call(os.listdir, self.retired_directory)
        except OSError:
            return instances  # each is told of when it is read
        return instances & {InstanceId(name.removesuffix(".json")) for name in names}

    async def put_retired(self, schedule: Schedule) -> None:
        """Rewrite the file of a retired schedule."""
        path = self.retired_directory / f"{schedule.instance_id}.json"
        async with self._writing.turn(schedule.instance_id):
            await self._disk.call(self._disk.replace, path, encode_schedule(schedule))

    async def all_retired(self) -> list[Schedule]:
        """Every retired schedule that can be read."""
        scan = await self._disk.call(scan_schedules, self.retired_directory, self._disk)
        return [schedule for schedule, _ in scan.schedules.values()]

    async def forget_retired(self, instance: InstanceId) -> None:
        """Remove the retired file of *instance*; its schedule is in force again."""
        await self._disk.call(self._disk.remove, self.retired_directory / f"{instance}.json")

    def _forget(self, instance: InstanceId) -> None:
        self._schedules.pop(instance, None)
        self._signatures.pop(instance, None)
        self._forgotten.add(instance)
        self.unsaved.discard(instance)

    def _path(self, instance: InstanceId) -> Path:
        return self.directory / f"{instance}.json"


def _is_gone(path: Path) -> bool:
    try:
        path.stat()
    except FileNotFoundError:
        return True
    except OSError:
        pass  # nothing is known
    return False
