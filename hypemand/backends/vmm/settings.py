"""The config keys that backends of a VMM share."""

import re
from pathlib import Path
from typing import Any, TypeVar

from attrs import evolve, field, frozen

from hypemand.backends.registry import connection_of
from hypemand.backends.templates import broken_rules, files_of, filled, find_instances
from hypemand.core.errors import RuleBroken, RulesBroken
from hypemand.core.model import InstanceId

S = TypeVar("S", bound="VmmSettings")
ALONE = 0o700
THROUGH = 0o2710
"""Its group gets through the directory to what it may have in there, and new directories belong to that group, too."""
_MODE = re.compile(r"[0-7]{3,4}")


@frozen(kw_only=True)
class VmmSettings:
    """Keys of a backend of a VMM.

    Attributes:
        socket: Every guest's API socket, with ``{instance}`` where its id stands.
        disks: The disks of a guest whose VMM has ended, with ``{instance}``
            and wildcards; none: such guests are not captured.
        snapshot_dir: The catalog; the default is below the state directory.
        snapshot_group: A group that the VMMs are in, where they run as another user.
        snapshot_mode: Mode of the directories in the catalog, in octal digits.
    """

    socket: Path
    disks: tuple[Path, ...] = ()
    snapshot_dir: Path | None = None
    snapshot_group: str | None = None
    snapshot_mode: str | None = field(default=None)

    def __attrs_post_init__(self) -> None:
        """Check what a type alone does not say."""
        if broken := self._broken():
            raise RulesBroken(broken)

    def _broken(self) -> list[RuleBroken]:
        broken = broken_rules(self.socket, self.disks)
        mode = self.snapshot_mode
        if mode is None:
            return broken
        if not _MODE.fullmatch(mode):
            broken.append(RuleBroken(f'{mode!r} must be a mode in octal digits, like "2710"', "snapshot_mode"))
        elif int(mode, 8) & 0o700 != 0o700 or int(mode, 8) & 0o002:
            broken.append(
                RuleBroken(f"{mode!r} must give all to the owner, and others no right to write", "snapshot_mode")
            )
        return broken

    @property
    def mode(self) -> int:
        """Of directories in the catalog."""
        if self.snapshot_mode is not None:
            return int(self.snapshot_mode, 8)
        return ALONE if self.snapshot_group is None else THROUGH

    def socket_of(self, instance: InstanceId) -> Path:
        """The API socket of *instance*."""
        return filled(self.socket, instance)

    def disks_of(self, instance: InstanceId) -> list[Path]:
        """Files that fit the patterns for *instance*, links resolved, in the order of patterns and names. Blocking."""
        return files_of(self.disks, instance)

    def find_instances(self) -> frozenset[InstanceId]:
        """Ids for which there is a socket, or a disk. Blocking."""
        return find_instances(self.socket, self.disks)


def absolute(settings: S, catalog: Path) -> S:
    """*settings* with absolute paths, and *catalog* where no directory for snapshots is given."""
    return evolve(
        settings,
        socket=settings.socket.absolute(),
        disks=tuple(template.absolute() for template in settings.disks),
        snapshot_dir=(settings.snapshot_dir or catalog).absolute(),
    )


def connection(type_name: str, settings: VmmSettings) -> dict[str, Any]:
    """*settings* as JSON values, with their type."""
    return {**connection_of(type_name, settings), "disks": [str(template) for template in settings.disks]}
