"""Paths with ``{instance}`` where an instance's id stands: its socket, its disks. What they lead to, and back.

Settings of the backends whose guests are found by their files.
"""

import fnmatch
import glob
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from hypemand.core.errors import RuleBroken
from hypemand.core.model import InstanceId
from hypemand.core.naming import check_instance_id

PLACEHOLDER = "{instance}"
_WILDCARD = re.compile(r"[*?[]")


def broken_rules(socket: Path, disks: Sequence[Path]) -> list[RuleBroken]:
    """What is wrong with the settings ``socket``, a plain path, and ``disks``, which may have wildcards."""
    broken = [RuleBroken(rule, "socket") for rule in misplaced(socket)]
    for number, disk in enumerate(disks):
        rules = [*misplaced(disk), *_ambiguous(disk)] or [*_overlapping(disk, disks[:number])]
        broken += [RuleBroken(rule, f"disks[{number}]") for rule in rules]
    return broken


def filled(template: Path, instance: InstanceId) -> Path:
    """*template* for *instance*."""
    return Path(str(template).replace(PLACEHOLDER, instance))


def files_of(templates: Iterable[Path], instance: InstanceId) -> list[Path]:
    """Files that fit *templates* for *instance*, links resolved, in the order of patterns and names. Blocking."""
    return list(dict.fromkeys(path.resolve() for path in named_by(templates, instance)))


def named_by(templates: Iterable[Path], instance: InstanceId) -> Iterator[Path]:
    """The same, links and all. Blocking."""
    for template in templates:
        # Path.glob takes no absolute patterns.
        for path in map(Path, sorted(glob.glob(str(filled(template, instance))))):  # noqa: PTH207
            if not path.is_dir():
                yield path


def find_instances(socket: Path, disks: Iterable[Path]) -> frozenset[InstanceId]:
    """Ids for which there is a socket, or a disk. Blocking."""
    sockets = (i for i, path in _fitting(socket, literally=True) if path.is_socket())
    files = (i for template in disks for i, path in _fitting(template) if not path.is_dir())
    return frozenset([*sockets, *files])


def misplaced(template: Path) -> Iterator[str]:
    """Whether the id is missing in *template*, in words."""
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
