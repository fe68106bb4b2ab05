"""Reading schedule files without changing anything, and telling good ones from the others."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from attrs import define, field, frozen

from hypemand.core.errors import InvalidInput, RuleBroken
from hypemand.core.model import InstanceId, Schedule
from hypemand.core.naming import check_instance_id
from hypemand.state.codec import NewerFormatError, decode_schedule
from hypemand.state.files import Disk, Signature

SUFFIX = ".json"


@frozen
class BadFile:
    """A state file with invalid content, and what is wrong with it."""

    path: Path
    problem: str


@define
class Scan:
    """What reading schedule files found: schedules with their files' signatures, and the trouble."""

    schedules: dict[InstanceId, tuple[Schedule, Signature]] = field(factory=dict)
    invalid: list[BadFile] = field(factory=list)
    newer: list[BadFile] = field(factory=list)
    unreadable: list[BadFile] = field(factory=list)
    missing: bool = False  # the directory itself


def scan_schedules(directory: Path, disk: Disk, known: Mapping[InstanceId, Signature] | None = None) -> Scan:
    """Read the schedule files in *directory*; changes nothing. Blocking.

    Args:
        known: Signatures of versions that need no reading; those files are left out of the result,
            but where they changed.
    """
    scan = Scan()
    try:
        names = sorted(name for name in os.listdir(directory) if name.endswith(SUFFIX) and name[0] != ".")  # noqa: PTH208
    except FileNotFoundError:
        scan.missing = True
        return scan
    for name in names:
        scan_file(directory, name, disk, known or {}, scan)
    return scan


def scan_file(directory: Path, name: str, disk: Disk, known: Mapping[InstanceId, Signature], scan: Scan) -> None:
    """Read the schedule file *name* in *directory* into *scan*, unless it is the version in *known*. Blocking."""
    path = f"{directory}/{name}"  # of a hundred thousand files each Path would cost as much as the reading
    try:
        instance = check_instance_id(name.removesuffix(SUFFIX))
        if instance in known and Signature.of(os.stat(path)) == known[instance]:  # noqa: PTH116
            return
        data, signature = disk.read(path)
        schedule = decode_schedule(data, instance)
        scan.schedules[schedule.instance_id] = (schedule, signature)
    except NewerFormatError as error:
        scan.newer.append(BadFile(Path(path), str(error)))
    except (InvalidInput, RuleBroken) as error:
        scan.invalid.append(BadFile(Path(path), str(error)))
    except FileNotFoundError:
        return  # removed a moment ago
    except OSError as error:
        scan.unreadable.append(BadFile(Path(path), str(error)))


def quarantine_notes(state_dir: Path) -> Iterable[str]:
    """The first line of each note in the quarantine: which file it was, and why. Blocking."""
    for path in sorted((state_dir / "quarantine").glob("*.note")):
        yield path.read_text(errors="replace").partition("\n")[0]
