"""The example of docs/backends.md as if it were installed: found by its entry point, and by nothing else."""

import importlib
import os
import sys
import tomllib
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from hypemand.backends.registry import ENTRY_POINT_GROUP
from hypemand.conformance import Subject
from tests.processes import ROOT

EXAMPLE = ROOT / "docs" / "example_backend"


def write_metadata(site: Path, name: str, entry_points: Mapping[str, str]) -> None:
    """What an installer leaves of a distribution that offers backend types."""
    info = site / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{type_name} = {where}" for type_name, where in entry_points.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{ENTRY_POINT_GROUP}]", *lines, ""]))


def write_example(site: Path) -> None:
    """The metadata of the example, from its pyproject.toml."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    write_metadata(site, project["name"], project["entry-points"][ENTRY_POINT_GROUP])


@contextmanager
def importable(*directories: Path) -> Iterator[None]:
    """Have *directories* on the path, of this process and of those that it starts."""
    before = sys.path[:]
    sys.path[:0] = map(str, directories)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = before


def python_path(*directories: Path) -> dict[str, str]:
    """The same, for the environment of a process."""
    return {"PYTHONPATH": os.pathsep.join(map(str, directories))}


@asynccontextmanager
async def example_subject(directory: Path, type_name: str = "folder") -> AsyncIterator[Subject]:
    """The subject of the example's own test file, from the installed example."""
    site = directory / "site"
    write_example(site)
    with importable(site, EXAMPLE):
        from test_folder import folder_subject  # noqa: PLC0415 - it can be imported from here on

        async with folder_subject(directory, type_name) as subject:
            yield subject
