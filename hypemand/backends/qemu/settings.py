"""The config keys of a qemu backend, and what its path templates lead to."""

import fnmatch
import glob
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from attrs import frozen

from hypemand.core.errors import RuleBroken, RulesBroken
from hypemand.core.model import InstanceId
from hypemand.core.naming import check_instance_id

PLACEHOLDER = "{instance}"
INTERNAL = "internal"
BACKGROUND = "background"
_WILDCARD = re.compile(r"[*?[]")


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
        broken = [RuleBroken(rule, "socket") for rule in _misplaced(self.socket)]
        for number, disk in enumerate(self.disks):
            rules = [*_misplaced(disk), *_ambiguous(disk)] or [*_overlapping(disk, self.disks[:number])]
            broken += [RuleBroken(rule, f"disks[{number}]") for rule in rules]
        if self.mode not in (INTERNAL, BACKGROUND):
            broken.append(RuleBroken(f"{self.mode!r} must be {INTERNAL!r} or {BACKGROUND!r}", "mode"))
        if broken:
            raise RulesBroken(broken)

    def socket_of(self, instance: InstanceId) -> Path:
        """The monitor of *instance*."""
        return Path(str(self.socket).replace(PLACEHOLDER, instance))

    def disks_of(self, instance: InstanceId) -> list[Path]:
        """Files that fit the patterns for *instance*, links resolved, in the order of patterns and names. Blocking."""
        found: dict[Path, None] = {}
        for template in self.disks:
            # Path.glob takes no absolute patterns.
            for path in sorted(glob.glob(str(template).replace(PLACEHOLDER, instance))):  # noqa: PTH207
                if not Path(path).is_dir():
                    found[Path(path).resolve()] = None
        return list(found)

    def find_instances(self) -> frozenset[InstanceId]:
        """Ids for which there is a socket, or a disk. Blocking."""
        sockets = (i for i, path in _fitting(self.socket, literally=True) if path.is_socket())
        disks = (i for template in self.disks for i, path in _fitting(template) if not path.is_dir())
        return frozenset([*sockets, *disks])


def _misplaced(template: Path) -> Iterator[str]:
    if PLACEHOLDER not in str(template):
        yield f"{str(template)!r} must have {PLACEHOLDER} where an id stands"


def _ambiguous(template: Path) -> Iterator[str]:
    """Else several ids would fit one name, and one guest's disk would be taken for another's."""
    if any(PLACEHOLDER in part and _WILDCARD.search(part) for part in template.parts):
        yield f"{str(template)!r} must not have a wildcard beside {PLACEHOLDER}, in the same part of the path"
    if "**" in template.parts:
        yield f"{str(template)!r} must name its directories one by one, without **"


def _overlapping(template: Path, others: Iterable[Path]) -> Iterator[str]:
    """The same: ``{instance}-data.qcow2`` of web is ``{instance}.qcow2`` of web-data."""
    for other in others:
        if _takes_for_another(template, other) or _takes_for_another(other, template):
            yield (
                f"{str(template)!r} and {str(other)!r} may fit the same file for two ids:"
                " give each instance a directory of its own"
            )


def _takes_for_another(template: Path, other: Path) -> bool:
    """Whether a file of *other* would also fit *template*, but with another id."""
    if len(template.parts) != len(other.parts):
        return False
    ids = set()
    for part, text in zip(template.parts, other.parts, strict=True):
        example = text.replace(PLACEHOLDER, "x")
        if PLACEHOLDER in part:
            ids.add(_id_in(example, part))
        elif not (fnmatch.fnmatchcase(example, part) or fnmatch.fnmatchcase(part, example)):
            return False
    return len(ids) == 1 and not ids & {"", "x"}


def _fitting(template: Path, *, literally: bool = False) -> Iterator[tuple[InstanceId, Path]]:
    """What fits *template*, each with its id; *literally*: what stands in it beside ids is no wildcard."""
    keep = glob.escape if literally else str
    pattern = "/".join("*".join(keep(text) for text in part.split(PLACEHOLDER)) for part in template.parts)
    for found in glob.iglob(pattern.replace("//", "/", 1)):  # noqa: PTH207 - Path.glob takes no absolute patterns
        pairs = zip(template.parts, Path(found).parts, strict=True)
        ids = {_id_in(text, part) for part, text in pairs if PLACEHOLDER in part}
        if len(ids) == 1:
            with suppress(OSError, RuleBroken):
                yield check_instance_id(ids.pop()), Path(found)


def _id_in(text: str, part: str) -> str:
    first, *others = map(re.escape, part.split(PLACEHOLDER))
    fits = re.fullmatch(first + "(?P<id>.+)" + "(?P=id)".join(others), text)
    return fits["id"] if fits else ""
