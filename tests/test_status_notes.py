"""What is said below the table of `status`: of a few instances each by itself, of many that share a trouble at once."""

from collections.abc import Mapping
from typing import Any

from hypemand.surface.render import MOST_NAMED, status_notes

DOWN = "libvirt: connection refused"


def view(instance: str, **keys: Any) -> dict[str, Any]:
    """An instance as `status` has it, as far as notes go."""
    return {
        "instance_id": instance,
        "made": True,
        "schedule": {"last_error": None},
        "freeze": {"over_budget": None},
        "trouble": None,
        "current_run": None,
        "under_way": False,
        **keys,
    }


def notes(*views: Mapping[str, Any]) -> list[str]:
    """Without that of the daemon."""
    told = dict.fromkeys(
        (
            "config_problems",
            "problems",
            "warnings",
            "unreadable_state_files",
            "quarantine",
            "damaged_log_lines",
        ),
        (),
    )
    return status_notes({"lock": None, "state_dir": "/state", "instances": views, **told})[1:]


def numbered(count: int, **keys: Any) -> list[dict[str, Any]]:
    return [view(f"vm-{number:05}", **keys) for number in range(count)]


def test_a_few_have_a_line_each() -> None:
    assert notes(*numbered(MOST_NAMED, trouble=DOWN)) == [f"vm-{number:05}: {DOWN}" for number in range(MOST_NAMED)]


def test_many_that_share_a_trouble_have_one_line_that_says_how_many() -> None:
    assert notes(*numbered(10_000, trouble=DOWN)) == [
        f"vm-00000, vm-00001, vm-00002, vm-00003, vm-00004 and 9,995 more: {DOWN}"
    ]


def test_another_trouble_among_many_is_not_lost() -> None:
    odd = view("odd-1", trouble="no instance odd-1", schedule={"last_error": "disk\nfull"})
    assert notes(*numbered(5_000, trouble=DOWN), odd, *numbered(5_000, schedule={"last_error": DOWN})) == [
        f"vm-00000, vm-00001, vm-00002, vm-00003, vm-00004 and 4,995 more: {DOWN}",
        "odd-1: last error: disk full",
        "odd-1: no instance odd-1",
        f"vm-00000, vm-00001, vm-00002, vm-00003, vm-00004 and 4,995 more: last error: {DOWN}",
    ]


def test_a_run_that_is_not_settled_is_said() -> None:
    run = {"run_id": "r1", "error": "resume failed"}
    assert notes(view("web-1", current_run=run), view("web-2", current_run=run, under_way=True)) == [
        "web-1: run r1 is not settled yet: resume failed"
    ]


def test_an_error_that_a_warning_tells_already_is_not_said_twice() -> None:
    over = view("web-1", schedule={"last_error": "refused: too long"}, freeze={"over_budget": "too long"})
    assert notes(over) == []


def test_of_many_that_are_to_come_the_first_are_named() -> None:
    assert notes(*numbered(MOST_NAMED + 1, made=False)) == [
        "begins when the daemon takes up the config: vm-00000, vm-00001, vm-00002, vm-00003, vm-00004 and 6 more"
    ]
    assert notes(*numbered(2, made=False)) == ["begins when the daemon takes up the config: vm-00000, vm-00001"]
