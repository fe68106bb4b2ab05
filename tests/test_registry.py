"""How a table of settings becomes a backend."""

from pathlib import Path

import pytest

from hypemand.backends import registry
from hypemand.backends.base import Surroundings
from hypemand.core.errors import InvalidInput, Problem

OTHER_BACKEND = """
from hypemand.backends.embedded import EmbeddedBackend
from hypemand.backends.embedded_settings import Settings


class TYPE:
    settings = Settings
    build = staticmethod(lambda name, settings, surroundings: EmbeddedBackend(name + "!", settings))
"""


@pytest.fixture
def other_distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another distribution, installed, with a backend type called ``other``."""
    site = tmp_path / "site"
    info = site / "hypemand_other-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hypemand-other\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[hypemand.backends]\nother = hypemand_other_backend:TYPE\n")
    (site / "hypemand_other_backend.py").write_text(OTHER_BACKEND)
    monkeypatch.syspath_prepend(str(site))
    return site


def problems(type_name: str, table: dict[str, object]) -> list[Problem]:
    with pytest.raises(InvalidInput) as caught:
        registry.parse_settings(type_name, table)
    return list(caught.value.problems)


def test_a_table_becomes_a_backend_under_its_name(tmp_path: Path) -> None:
    backend = registry.connect("lab", {"type": "embedded", "root": str(tmp_path)}, Surroundings(tmp_path))
    assert backend.name == "lab"
    assert backend.connection == {"type": "embedded", "root": str(tmp_path)}


def test_building_a_backend_makes_nothing(tmp_path: Path) -> None:
    registry.connect("lab", {"type": "embedded", "root": str(tmp_path / "root")}, Surroundings(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("type_name", ["embeded", "", "../embedded"])
def test_an_unknown_type_is_refused_with_those_that_are_known(other_distribution: Path, type_name: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        registry.backend_type(type_name)
    [problem] = caught.value.problems
    assert problem.path == "type"
    assert repr(type_name) in problem.message
    for known in ("embedded", "qemu", "other"):
        assert known in problem.message


def test_a_table_without_a_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="not a backend type"):
        registry.connect("lab", {"root": "/somewhere"}, Surroundings(tmp_path))


def test_every_problem_of_the_settings_is_told_with_its_dotted_path() -> None:
    table: dict[str, object] = {
        "root": 7,
        "rooot": "/x",
        "copy_rate": "fast",
        "instances": {
            "web-1": {"state": "Sleeping", "memory": "lots", "disks": "1GiB"},
            ".hidden": {},
        },
    }
    found = {problem.path: problem.message for problem in problems("embedded", table)}
    assert found.keys() == {
        "root",
        "rooot",
        "copy_rate",
        "instances.web-1.state",
        "instances.web-1.memory",
        "instances.web-1.disks",
        "instances..hidden",
    }
    assert "did you mean 'root'?" in found["rooot"]
    assert "did you mean 'disk'?" in found["instances.web-1.disks"]
    assert "Running" in found["instances.web-1.state"]


def test_a_missing_setting_is_told() -> None:
    assert [problem.path for problem in problems("embedded", {})] == ["root"]


def test_a_rate_of_zero_is_refused() -> None:
    [problem] = problems("embedded", {"root": "/x", "copy_rate": 0})
    assert problem.path == "copy_rate"
    assert "more than zero" in problem.message


def test_a_type_of_another_distribution_is_found_by_its_entry_point(other_distribution: Path, tmp_path: Path) -> None:
    backend = registry.connect("lab", {"type": "other", "root": str(tmp_path)}, Surroundings(tmp_path))
    assert backend.name == "lab!"
    assert [problem.path for problem in problems("other", {"root": "/x", "nope": 1})] == ["nope"]


def test_another_distribution_can_not_take_the_place_of_a_built_in(other_distribution: Path, tmp_path: Path) -> None:
    (other_distribution / "hypemand_other-1.0.dist-info" / "entry_points.txt").write_text(
        "[hypemand.backends]\nembedded = hypemand_other_backend:TYPE\n"
    )
    backend = registry.connect("lab", {"type": "embedded", "root": str(tmp_path)}, Surroundings(tmp_path))
    assert backend.name == "lab"
