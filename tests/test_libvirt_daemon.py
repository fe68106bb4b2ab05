"""The real daemon, a real libvirtd and a real guest: scheduled, captured, pruned; and either killed in mid-capture."""

import signal
from pathlib import Path

import pytest
import trio

from tests.libvirt_guest import SAVING, LibvirtGuest, running_libvirt_guest, shared_libvirtd
from tests.processes import ALONE, Lab, run_cli, running_daemon

pytestmark = pytest.mark.libvirt

KEPT, RUNS = 2, 4
WITHIN_S = 10.0
"""So soon after libvirt answers again the guest runs, on a machine as busy as it may be."""


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


def write_config(lab: Lab, guest: LibvirtGuest, *, runs: str = "", interval: str = "1h") -> None:
    lab.replace(f"""
state_dir = "state"
[runs]
min_free = "1MiB"
{runs}
[backends.vms]
type = "libvirt"
uri = "{guest.libvirtd.uri}"
[[schedules]]
instance = "web-1"
interval = "{interval}"
first_run = "now"
retention = {{ max_count = {KEPT} }}
name_prefix = "nightly"
""")


async def names_of(lab: Lab) -> list[str]:
    """What ``hypemand snapshots`` lists."""
    return [found["name"] for found in (await run_cli("snapshots", "web-1", "-c", lab.config, "--json")).json]


async def test_a_guest_is_captured_on_schedule_and_pruned(lab: Lab) -> None:
    with running_libvirt_guest(shared_libvirtd()) as guest:
        write_config(lab, guest)
        checked = await run_cli("check-config", "-c", lab.config)
        assert (checked.status, checked.stderr) == (0, "")
        async with running_daemon(lab.config) as daemon:
            for times in range(1, RUNS + 1):
                await daemon.wait_for("snapshot taken", instance_id="web-1", times=times)
                await lab.recorded(times)
                if times < RUNS:
                    lab.make_due(daemon)
            await daemon.stop()
        await guest.next_ticks()
        runs = lab.history()
        assert [(run["outcome"], run["error"]) for run in runs] == [("succeeded", None)] * RUNS
        assert all(run["freeze_s"] > 0 for run in runs)
        assert [len(run["pruned"]) for run in runs] == [0, 0, 1, 1]
        kept = [run["snapshot_name"] for run in runs[-KEPT:]]
        assert guest.names() == guest.tags() == sorted(kept)
        assert await names_of(lab) == kept
        assert guest.serial().count("BOOT") == 1


async def test_a_libvirtd_killed_in_mid_capture_fails_the_run_and_the_guest_runs_as_soon_as_it_is_back(
    lab: Lab,
) -> None:
    with running_libvirt_guest(shared_libvirtd(), memory_mb=256, filled=True) as guest:
        await guest.next_ticks(20)
        write_config(lab, guest)
        async with running_daemon(lab.config) as daemon:
            await guest.comes_to(SAVING)
            guest.libvirtd.kill()
            await daemon.wait_for(
                "libvirt can't be reached in the middle of a capture; its guest may stand still until it can"
            )
            await guest.saved()
            seen = len(guest.ticks())
            guest.libvirtd.start()
            with trio.fail_after(WITHIN_S):
                while len(guest.ticks()) < seen + 2:
                    await trio.sleep(0.01)
            failed = await daemon.wait_for("run failed")
            assert "the guest was found paused and was resumed" in failed["error"]
            await lab.recorded(1)
            assert (guest.names(), guest.tags()) == ([], [])
            lab.make_due(daemon)
            taken = await daemon.wait_for("snapshot taken")
            await daemon.stop()
        assert guest.names() == guest.tags() == [taken["snapshot_name"]]
        await guest.next_ticks()


async def test_a_daemon_killed_in_mid_capture_leaves_a_guest_that_runs_and_its_snapshot_is_adopted(lab: Lab) -> None:
    with running_libvirt_guest(shared_libvirtd(), memory_mb=256, filled=True) as guest:
        await guest.next_ticks(20)
        write_config(lab, guest, runs=ALONE)
        async with running_daemon(lab.config) as daemon:
            await guest.comes_to(SAVING)
            await daemon.kill()
        await guest.next_ticks()
        recovered = await run_cli("recover", "-c", lab.config)
        assert recovered.status == 0, recovered.stderr
        (run,) = lab.history()
        assert run["outcome"] == "interrupted"
        assert "its snapshot was complete and is kept" in run["error"]
        assert await names_of(lab) == guest.tags() == [run["snapshot_name"]]


async def test_when_daemon_and_libvirtd_are_killed_in_mid_capture_the_guard_has_the_guest_resumed(lab: Lab) -> None:
    with running_libvirt_guest(shared_libvirtd(), memory_mb=256, filled=True) as guest:
        await guest.next_ticks(20)
        write_config(lab, guest)
        async with running_daemon(lab.config) as daemon:
            await guest.comes_to(SAVING)
            guest.libvirtd.kill()
            await daemon.kill()
            await guest.saved()
            seen = len(guest.ticks())
            guest.libvirtd.start()
            with trio.fail_after(WITHIN_S):
                while len(guest.ticks()) < seen + 2:
                    await trio.sleep(0.01)
            with trio.fail_after(WITHIN_S):
                while not lab.history():
                    await trio.sleep(0.05)
        (run,) = lab.history()
        assert (run["outcome"], run["found_frozen"]) == ("interrupted", True)
        assert (guest.names(), guest.tags()) == ([], [])


async def test_a_daemon_whose_libvirtd_hangs_in_mid_capture_ends_all_the_same_and_the_next_one_settles_the_run(
    lab: Lab,
) -> None:
    with running_libvirt_guest(shared_libvirtd(), memory_mb=640, filled=True) as guest:  # it takes long to save
        await guest.next_ticks(20)
        write_config(lab, guest, runs='shutdown_grace = "1s"')
        async with running_daemon(lab.config) as daemon:
            await guest.comes_to(SAVING)
            with guest.libvirtd.hung():
                daemon.send(signal.SIGTERM)
                assert await daemon.ended() in (0, 1)
        await guest.next_ticks()
        recovered = await run_cli("recover", "-c", lab.config)
        assert recovered.status == 0, recovered.stderr
        (run,) = lab.history()
        assert run["outcome"] == "interrupted"
        assert await names_of(lab) == guest.tags() == [run["snapshot_name"]]
