"""Whose the directories are that a VMM writes into, where it runs as another user. Blocking.

The memory of a guest is a secret: what a VMM has to write is open to it while
it writes, and to nobody else.
"""

import errno
import grp
import os
import pwd
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from attrs import frozen

from hypemand.backends.base import BackendUnavailable, CaptureFailed, Unsupported
from hypemand.backends.catalog import Catalog
from hypemand.backends.vmm.client import Peer
from hypemand.core.model import InstanceId
from hypemand.core.size import format_size

_ENTER = 0o1
_FOR_GROUP = 0o730
_ACL = "system.posix_acl_access"
_DEFAULT_ACL = "system.posix_acl_default"
_FILE_SIZE = "Max file size"


def group_id(group: str | None) -> int | None:
    """The id of *group*, a name or a number.

    Raises:
        Unsupported: There is none of that name.
    """
    if group is None or group.isdecimal():
        return None if group is None else int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise Unsupported(f"there is no group {group!r} here: see the backend's snapshot_group") from None


@frozen
class Writer:
    """A VMM's user, as it matters for files.

    Attributes:
        peer: None where nothing is known of it.
        group: Of `snapshot_group`.
    """

    peer: Peer | None
    group: int | None = None

    @property
    def is_other(self) -> bool:
        """Whether it needs to be let in: neither ours nor root's."""
        return self.peer is not None and self.peer.uid not in (0, os.geteuid())

    @property
    def is_known(self) -> bool:
        """Whether the user is one that can be told from here; in a user namespace others are all one."""
        return self.peer is not None and self.peer.uid != overflow_uid()

    def make_directory(self, directory: Path) -> None:
        """Make *directory* for the VMM to write into, and for nobody else."""
        directory.mkdir(mode=0o700)
        if not self.is_other:
            return
        assert self.peer is not None
        # By a descriptor: the directory above may be the VMM's, which could put something else in its place.
        descriptor = open_own(directory)
        try:
            if os.geteuid() == 0:
                os.fchown(descriptor, self.peer.uid, self.peer.gid)
                return
            if self.group is not None and os.fstat(descriptor).st_gid != self.group:
                with suppress(OSError):  # of a user namespace: it has the group already, or `why_shut_out` said so
                    os.fchown(descriptor, -1, self.group)
            os.fchmod(descriptor, _FOR_GROUP)
        finally:
            os.close(descriptor)

    def why_shut_out(self, directory: Path) -> str | None:
        """Why the VMM could not write into a directory made in *directory*, or None."""
        if not self.is_other:
            return None
        for step in (*reversed(directory.parents), directory):
            if not self._may(step, _ENTER):
                return f"can't get into {step} (mode {step.stat().st_mode & 0o7777:o})"
        if os.geteuid() == 0 or not self.is_known:
            return None
        status = directory.stat()
        inherits = status.st_mode & stat.S_ISGID
        gid = self.group if self.group is not None else status.st_gid if inherits else os.getegid()
        return None if gid in self._groups() else f"is not in the group {gid}, to which its directory would belong"

    def why_shut_out_of(self, catalog: Catalog, instance: InstanceId) -> str | None:
        """Why it could not write into a snapshot of *instance*, or None, with directories as they will be made."""
        why = self.why_shut_out(catalog.root)
        if why is not None or not self.is_other:
            return why
        above = _Inode.of(catalog.root)
        if _has_list(catalog.root, _DEFAULT_ACL):
            return None  # that may let it in: seen when it writes
        home = catalog.root / instance
        for directory in (home, catalog.partial(instance, "run")):
            there = directory.is_dir()
            if there and _has_list(directory):
                return None
            above = self._let_in(_Inode.of(directory), catalog.mode) if there else self._made(above, catalog.mode)
            if not self._may_at(above, _ENTER):
                return f"can't get into {home} (mode {stat.S_IMODE(above.mode):o})"
        return None

    def _made(self, above: "_Inode", mode: int) -> "_Inode":
        gid = self.group if self.group is not None else above.gid if above.mode & stat.S_ISGID else os.getegid()
        return _Inode(os.geteuid(), gid, mode | above.mode & stat.S_ISGID)

    def _let_in(self, there: "_Inode", mode: int) -> "_Inode":
        """As `Catalog.begin` opens what is its own."""
        if there.uid != os.geteuid():
            return there
        return _Inode(there.uid, there.gid if self.group is None else self.group, there.mode | mode)

    def why_too_small(self, file_bytes: int) -> str | None:
        """Why it could not write a file of *file_bytes*, or None: beyond its limit the kernel ends it and its guest."""
        limit = None if self.peer is None else _file_limit(self.peer.pid)
        if limit is None or limit >= file_bytes:
            return None
        return (
            f"may write files of {format_size(limit)} at most (RLIMIT_FSIZE), and its guest's memory may take"
            f" {format_size(file_bytes)}: a capture would end it. Raise that limit (the jailer's"
            " --resource-limit fsize=, LimitFSIZE= in its unit), and start it anew"
        )

    def _may(self, path: Path, wanted: int) -> bool:
        # A list may let it in: seen when it writes.
        return _has_list(path) or self._may_at(_Inode.of(path), wanted)

    def _may_at(self, there: "_Inode", wanted: int) -> bool:
        assert self.peer is not None
        if not self.is_known:
            return bool(there.mode & (wanted << 3 | wanted))
        if there.uid == self.peer.uid:
            return bool(there.mode & wanted << 6)
        if there.gid in self._groups():
            return bool(there.mode & wanted << 3)
        return bool(there.mode & wanted)

    def _groups(self) -> set[int]:
        assert self.peer is not None
        return {self.peer.gid, *_groups_of_process(self.peer.pid), *_groups_of_user(self.peer)}


@frozen
class _Inode:
    """By which the kernel decides who may go where."""

    uid: int
    gid: int
    mode: int

    @classmethod
    def of(cls, path: Path) -> "_Inode":
        status = path.stat()
        return cls(status.st_uid, status.st_gid, status.st_mode)


def _file_limit(pid: int) -> int | None:
    """In bytes; None where there is none, or it is not seen."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/limits").read_text().splitlines():
            if line.startswith(_FILE_SIZE):
                soft = line.removeprefix(_FILE_SIZE).split()[0]
                return int(soft) if soft.isdecimal() else None
    return None


def _groups_of_process(pid: int) -> Iterator[int]:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(("Gid:", "Groups:")):
                yield from map(int, line.split()[1:])


def _groups_of_user(peer: Peer) -> list[int]:
    try:
        return os.getgrouplist(pwd.getpwuid(peer.uid).pw_name, peer.gid)
    except KeyError:
        return []


def _has_list(path: Path, name: str = _ACL) -> bool:
    try:
        os.getxattr(path, name)
    except OSError:
        return False
    return True


def overflow_uid() -> int:
    """The one that stands for all users that can't be told from here."""
    try:
        return int(Path("/proc/sys/kernel/overflowuid").read_text())
    except OSError:
        return 65534


def _opened(directory: Path) -> int:
    return os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def open_own(directory: Path) -> int:
    """A descriptor of *directory*, which is ours alone: where others may write, another could have taken its place.

    Raises:
        BackendUnavailable: It is somebody else's.
    """
    descriptor = _opened(directory)
    status = os.fstat(descriptor)
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        os.close(descriptor)
        raise BackendUnavailable(f"{directory} is not the directory that hypemand made: somebody has changed it")
    return descriptor


def take_back(directory: Path, target: Path) -> tuple[dict[str, int], list[str]]:
    """Take *directory* back from the VMM that wrote into it, and move its files to *target*, if that is another one.

    Returns:
        Sizes by name; and the names of files that have to be copied, as *target* is on another filesystem.

    Raises:
        CaptureFailed: Something else than files is in it.
    """
    descriptor = _opened(directory)
    try:
        sizes = _sealed(directory, descriptor)
        return sizes, [name for name in sizes if directory != target and not _moved(descriptor, name, target)]
    except OSError as error:
        raise BackendUnavailable(f"{directory} can't be taken back from the VMM: {error.strerror}") from error
    finally:
        os.close(descriptor)


def _moved(descriptor: int, name: str, target: Path) -> bool:
    try:
        os.rename(name, target / name, src_dir_fd=descriptor)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        return False
    return True


def _sealed(directory: Path, descriptor: int) -> dict[str, int]:
    is_root = os.geteuid() == 0
    if is_root:
        os.fchown(descriptor, 0, 0)
    os.fchmod(descriptor, 0o700)
    sizes = {}
    for name in sorted(os.listdir(descriptor)):
        status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
        if not stat.S_ISREG(status.st_mode):
            raise CaptureFailed(f"{directory / name} is not a file, and nothing that a VMM would make")
        if is_root:
            os.chown(name, 0, 0, dir_fd=descriptor, follow_symlinks=False)
        if is_root or status.st_uid == os.geteuid():
            os.chmod(name, 0o600, dir_fd=descriptor)  # the directory is ours: nobody changes what has this name
        sizes[name] = status.st_size
    return sizes
