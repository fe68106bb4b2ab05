"""What `check-config` finds by asking the instances: whatever would keep them from being captured, and advice."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pytest
import trio
from attrs import define, field
from trio.testing import MockClock

from hypemand.backends.base import (
    Backend,
    BackendUnavailable,
    Capabilities,
    InstanceNotFound,
    Preparation,
    Status,
    Unsupported,
)
from hypemand.core.model import Freezer, InstanceId, InstanceState, SnapshotKind
from hypemand.surface.instance_checks import AT_ONCE, MOST_TOLD, InstanceChecks
from tests.processes import Lab, Ran, run_cli, running_daemon

HOURLY = """
[[schedules]]
instance = "web-*"
interval = "1h"
retention = { max_count = 3 }
"""


@define
class Answers:
    """A backend that answers as it is told; what is no answer hangs."""

    name: ClassVar[str] = "vms"
    states: Mapping[str, Status | Exception | None] = field(factory=dict)
    prepared: Mapping[str, Preparation | Exception] = field(factory=dict)
    kinds: frozenset[SnapshotKind] = frozenset(SnapshotKind)
    asking: int = 0
    most: int = 0

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(Freezer.ENGINE, abortable=True, kinds=self.kinds)

    async def state(self, instance: InstanceId) -> Status:
        self.asking += 1
        self.most = max(self.most, self.asking)
        try:
            await trio.sleep(0.001)
            answer = self.states.get(instance, Status(InstanceState.RUNNING))
            if answer is None:
                await trio.sleep_forever()
            if isinstance(answer, Exception):
                raise answer
            assert answer is not None
            return answer
        finally:
            self.asking -= 1

    async def prepare(self, instance: InstanceId, kind: SnapshotKind) -> Preparation:
        answer = self.prepared.get(instance, Preparation())
        if isinstance(answer, Exception):
            raise answer
        return answer


async def found(answers: Answers, *instances: str, used: bool = True) -> list[str]:
    backends: dict[str, Backend] = {"vms": answers}  # type: ignore[dict-item] # no more of it is asked
    checks = InstanceChecks(backends, {"vms"} if used else ())
    return await checks.warnings((InstanceId(name), "vms") for name in instances)


async def test_warnings_and_advice_are_told_by_backend_and_instance() -> None:
    ready = {"web-1": Preparation(warnings=("falls back",)), "web-2": Preparation(advice=("could be faster",))}
    assert await found(Answers(prepared=ready), "web-2", "web-1", "web-3") == [
        "backends.vms: web-1: falls back",
        "backends.vms: web-2: could be faster",
    ]


@pytest.mark.parametrize(
    "error", [Unsupported("has a raw disk"), InstanceNotFound("no such instance"), BackendUnavailable("no answer")]
)
async def test_what_keeps_an_instance_from_being_captured_is_told(error: Exception) -> None:
    assert await found(Answers(prepared={"web-1": error}), "web-1") == [f"backends.vms: web-1: {error}"]
    assert await found(Answers(states={"web-1": error}), "web-1") == [f"backends.vms: web-1: {error}"]


async def test_before_its_first_use_a_backend_may_lack_what_it_makes_at_that_and_no_more() -> None:
    missing, raw = BackendUnavailable("no snapshot directory"), Unsupported("has a raw disk")
    answers = Answers(prepared={"web-1": missing, "web-2": raw})
    assert await found(answers, "web-1", "web-2", used=False) == ["backends.vms: web-2: has a raw disk"]


async def test_a_bug_in_a_backend_is_told_and_keeps_no_other_instance_from_being_looked_at() -> None:
    answers = Answers(
        prepared={"web-1": PermissionError(13, "Permission denied"), "web-2": Unsupported("has a raw disk")}
    )
    first, second = await found(answers, "web-1", "web-2")
    assert "web-1: internal error: PermissionError(13" in first
    assert second.endswith("web-2: has a raw disk")


async def test_an_instance_in_a_state_that_passes_is_no_finding() -> None:
    assert await found(Answers(states={"web-1": Status(InstanceState.PAUSED)}), "web-1") == []


async def test_a_state_of_which_the_backend_makes_no_snapshots_is_told() -> None:
    answers = Answers({"web-1": Status(InstanceState.STOPPED)}, kinds=frozenset({SnapshotKind.STANDBY}))
    (line,) = await found(answers, "web-1")
    assert line == "backends.vms: web-1: is Stopped; this backend makes no Stopped snapshots as it is configured"


async def test_an_instance_that_hangs_is_told_and_holds_up_no_other(autojump_clock: MockClock) -> None:
    answers = Answers(states={"web-1": None}, prepared={"web-2": Unsupported("has a raw disk")})
    assert await found(answers, "web-1", "web-2") == [
        "backends.vms: web-1: the hypervisor did not answer within 5 s (state)",
        "backends.vms: web-2: has a raw disk",
    ]


async def test_so_many_that_hang_are_given_up_together_and_counted(autojump_clock: MockClock) -> None:
    names = [f"web-{number:03}" for number in range(200)]
    lines = await found(Answers(states=dict.fromkeys(names)), *names)
    assert trio.current_time() < 29
    assert lines[-1].startswith("120 instances were not looked at within 28 s, the first is web-")
    assert lines[-2] == f"and {200 - 120 - MOST_TOLD} more findings of this kind"
    assert len(lines) == MOST_TOLD + 2


async def test_not_all_are_asked_at_once() -> None:
    answers = Answers()
    await found(answers, *(f"web-{number}" for number in range(100)))
    assert answers.most == AT_ONCE


# The command.


async def check(lab: Lab, *args: str) -> Ran:
    return await run_cli("check-config", "-c", lab.config, *args)


@pytest.fixture
async def lab(tmp_path: Path) -> Lab:
    lab = Lab(tmp_path).write(HOURLY)
    async with running_daemon(lab.config) as daemon:
        await daemon.wait_for("schedule made")
        await daemon.stop()
    return lab


async def test_check_config_names_what_an_instance_lacks_for_a_capture(lab: Lab) -> None:
    clean = await check(lab)
    assert (clean.status, clean.stderr) == (0, "")
    lab.instance_file().with_name("disk").unlink()
    told = await check(lab)
    assert told.status == 0
    assert "backends.lab: web-1: " in told.stderr
    assert "disk is missing" in told.stderr
    (warning,) = json.loads((await check(lab, "--json")).stdout)["warnings"]
    assert warning in told.stderr


async def test_check_config_asks_no_instances_where_it_is_told_so(lab: Lab) -> None:
    lab.instance_file().with_name("disk").unlink()
    told = await check(lab, "--no-instances")
    assert (told.status, told.stderr) == (0, "")


async def test_check_config_changes_nothing(lab: Lab) -> None:
    def tree() -> dict[Path, float]:
        return {path: path.stat().st_mtime for path in lab.directory.rglob("*")}

    before = tree()
    await check(lab)
    assert tree() == before
