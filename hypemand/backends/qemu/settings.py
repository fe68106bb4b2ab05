"""The config keys of a qemu backend, and what its path templates lead to."""

from pathlib import Path

from attrs import frozen

from hypemand.backends.templates import broken_rules, files_of, filled, find_instances
from hypemand.core.errors import RuleBroken, RulesBroken
from hypemand.core.model import InstanceId

INTERNAL = "internal"
BACKGROUND = "background"


@frozen(kw_only=True)
class QemuSettings:
    """Keys of a backend of this type.

    Attributes:
        socket: Every guest's monitor, with ``{instance}`` where its id stands.
        disks: The disks of a guest that is not running, with ``{instance}``
            and wildcards; none: such guests are not captured.
        snapshot_dir: The catalog; the default is below the state directory.
        mode: ``internal`` or ``background``.
    """

    socket: Path
    disks: tuple[Path, ...] = ()
    snapshot_dir: Path | None = None
    mode: str = INTERNAL

    def __attrs_post_init__(self) -> None:
        """Check what a type alone does not say."""
        broken = broken_rules(self.socket, self.disks)
        if self.mode not in (INTERNAL, BACKGROUND):
            broken.append(RuleBroken(f"{self.mode!r} must be {INTERNAL!r} or {BACKGROUND!r}", "mode"))
        if broken:
            raise RulesBroken(broken)

    def socket_of(self, instance: InstanceId) -> Path:
        """The monitor of *instance*."""
        return filled(self.socket, instance)

    def disks_of(self, instance: InstanceId) -> list[Path]:
        """Files that fit the patterns for *instance*, links resolved, in the order of patterns and names. Blocking."""
        return files_of(self.disks, instance)

    def find_instances(self) -> frozenset[InstanceId]:
        """Ids for which there is a socket, or a disk. Blocking."""
        return find_instances(self.socket, self.disks)
