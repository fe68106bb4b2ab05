"""Reading schedule files without changing anything, and telling good ones from the others."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from attrs import define, field, frozen

from hypemand.core.errors import InvalidInput, RuleBroken
from hypemand.core.model import InstanceId, Schedule
from hypemand.core.naming import check_instance_id
from hypemand.state.codec import NewerFormatError, decode_schedule
from hypemand.state.files import Disk, Signature


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
        paths = sorted(path for path in directory.iterdir() if path.suffix == ".json" and path.name[0] != ".")
    except FileNotFoundError:
        scan.missing = True
        return scan
    for path in paths:
        scan_file(path, disk, known or {}, scan)
    return scan


def scan_file(path: Path, disk: Disk, known: Mapping[InstanceId, Signature], scan: Scan) -> None:
    """Read one schedule file into *scan*, unless it is the version in *known*. Blocking."""
    try:
        instance = check_instance_id(path.stem)
        if instance in known and Signature.of(path.stat()) == known[instance]:
            return
        data, signature = disk.read(path)
        scan.schedules[instance] = (decode_schedule(data, instance), signature)
    except NewerFormatError as error:
        scan.newer.append(BadFile(path, str(error)))
    except (InvalidInput, RuleBroken) as error:
        scan.invalid.append(BadFile(path, str(error)))
    except FileNotFoundError:
        return  # removed a moment ago
    except OSError as error:
        scan.unreadable.append(BadFile(path, str(error)))


def quarantine_notes(state_dir: Path) -> Iterable[str]:
    """The first line of each note in the quarantine: which file it was, and why. Blocking."""
    for path in sorted((state_dir / "quarantine").glob("*.note")):
        yield path.read_text(errors="replace").partition("\n")[0]
