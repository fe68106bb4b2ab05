"""The real daemon over guests of Cloud Hypervisor and Firecracker: scheduled, pruned, restored; one that is killed."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from hypemand.core.model import RestoreAction, RestoreStep
from tests.processes import Lab, guards_of, run_cli, running_daemon, wait_until
from tests.vmm_backend import carry_out, restore_option
from tests.vmm_guest import FIRECRACKER, KINDS, running_guest

both = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def short() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hypemand-") as made:
        yield Path(made)


def write_config(lab: Lab, kind: str, sockets: Path, more: str = "", runs: str = "") -> None:
    lab.replace(f"""
state_dir = "state"
[runs]
min_free = "1MiB"
{runs}
[backends.vms]
type = "{kind}"
socket = "{sockets}/{{instance}}.sock"
{more}
[[schedules]]
instance = "web-1"
interval = "1h"
first_run = "now"
retention = {{ max_count = 2 }}
name_prefix = "nightly"
""")


@both
async def test_a_guest_is_captured_on_schedule_pruned_and_restored(kind: str, short: Path, tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    write_config(lab, kind, short, f'disks = ["{tmp_path}/{{instance}}/*.raw"]')
    async with running_guest(kind, tmp_path, socket=short / "web-1.sock") as guest:
        checked = await run_cli("check-config", "-c", lab.config)
        assert checked.status == 0, checked.stderr
        async with running_daemon(lab.config) as daemon:
            for times in range(1, 4):
                await daemon.wait_for("snapshot taken", instance_id="web-1", times=times)
                await lab.recorded(times)
                await guest.ticks()
                lab.make_due(daemon) if times < 3 else None
            status = (await run_cli("status", "-c", lab.config, "--json")).json
            await daemon.stop()
        last = await guest.ticks()
    (view,) = status["instances"]
    assert (view["state"], view["snapshots_kept"]) == ("Running", 2)
    runs = lab.history()
    assert [(run["outcome"], len(run["pruned"])) for run in runs] == [
        ("succeeded", 0),
        ("succeeded", 0),
        ("succeeded", 1),
    ]
    assert all(0 < run["freeze_s"] < 30 and run["kind"] == "Standby" for run in runs)

    listed = (await run_cli("snapshots", "web-1", "--json", "-c", lab.config)).json
    steps = tuple(RestoreStep(RestoreAction(step["action"]), step["command"]) for step in listed[-1]["restore"])
    carry_out(steps, RestoreAction.RUN)
    option = restore_option(steps)
    async with running_guest(
        kind, tmp_path, socket=short / "web-1.sock", restore=option, empty=True, wait=False
    ) as restored:
        carry_out(steps, RestoreAction.MONITOR)
        assert await restored.ticks() < last


@both
async def test_the_guest_of_a_daemon_that_is_killed_in_mid_save_runs_again(
    kind: str, short: Path, tmp_path: Path
) -> None:
    lab = Lab(tmp_path)
    write_config(lab, kind, short)
    async with (
        running_guest(kind, tmp_path, socket=short / "web-1.sock", save_s=1.0) as guest,
        running_daemon(lab.config) as daemon,
    ):
        await wait_until(lambda: list(lab.state.glob("catalog/vms/web-1/.*/vmm/*")), "the VMM saves")
        await daemon.kill()
        await guest.ticks()
        await wait_until(lambda: not guards_of(daemon.pid), "the guard has ended")
        (run,) = lab.history()
        assert (run["outcome"], run["found_frozen"]) == ("interrupted", True)
        assert list(lab.state.glob("catalog/vms/web-1/.*")) == []
        assert guest.saves() == 1


@both
async def test_a_save_beyond_the_budget_is_waited_for_and_told_and_the_next_one_refused(
    kind: str, short: Path, tmp_path: Path
) -> None:
    lab = Lab(tmp_path)
    write_config(lab, kind, short, runs='max_freeze = "1s"')
    async with running_guest(kind, tmp_path, socket=short / "web-1.sock", save_s=1.5) as guest:
        async with running_daemon(lab.config) as daemon:
            await lab.recorded(1)
            await guest.ticks()
            lab.make_due(daemon)
            await lab.recorded(2)
            await daemon.stop()
        assert guest.state() == "Running"
        assert guest.saves() == 1
    first, second = lab.history()
    assert "freeze budget was over when 0 B" in first["error"]
    assert first["freeze_s"] > 1.5
    assert "longer than its max_freeze" in second["error"] or "can't be interrupted" in second["error"]


@both
async def test_the_vmms_own_words_are_the_last_error_and_a_guest_without_a_vmm_is_stopped(
    kind: str, short: Path, tmp_path: Path
) -> None:
    lab = Lab(tmp_path)
    write_config(lab, kind, short, f'disks = ["{tmp_path}/{{instance}}/*.raw"]')
    async with running_guest(kind, tmp_path, socket=short / "web-1.sock") as guest:
        said = {"fault_message": "no space left"} if kind == FIRECRACKER else ["Error from API", "no space left"]
        guest.fail_save(status=400, body=said)
        async with running_daemon(lab.config) as daemon:
            await lab.recorded(1)
            await guest.kill()
            lab.make_due(daemon)
            await lab.recorded(2)
            await daemon.stop()
    failed, stopped = lab.history()
    assert "no space left" in failed["error"]
    assert (stopped["outcome"], stopped["kind"]) == ("succeeded", "Stopped")
    assert len(list(lab.state.glob("catalog/vms/web-1/*/disks/*"))) == 1


async def test_daemons_of_one_guest_leave_a_pause_by_an_operator_alone(short: Path, tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    write_config(lab, FIRECRACKER, short)
    async with running_guest(FIRECRACKER, tmp_path, socket=short / "web-1.sock") as guest:
        guest.pause()
        async with running_daemon(lab.config) as daemon:
            await lab.recorded(1)
            with trio.fail_after(30):
                await daemon.stop()
        assert guest.state() == "Paused"
    (run,) = lab.history()
    assert "is Paused" in run["error"]
