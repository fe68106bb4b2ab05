"""The real daemon and real QEMU guests: scheduled, captured, pruned, restored; and one that dies."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.processes import Lab, run_cli, running_daemon
from tests.qemu_guest import Guest, run_img, running_guest

pytestmark = pytest.mark.qemu

KEPT, RUNS = 2, 4


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


def write_config(lab: Lab, sockets: str, schedules: Iterable[str], interval: str = "1h") -> None:
    entries = "".join(
        f"""
[[schedules]]
instance = "{instance}"
interval = "{interval}"
first_run = "now"
retention = {{ max_count = {KEPT} }}
name_prefix = "nightly"
"""
        for instance in schedules
    )
    lab.replace(f"""
state_dir = "state"
[runs]
min_free = "1MiB"
[backends.vms]
type = "qemu"
socket = "{sockets}"
{entries}
""")


def tick_on_disk(disk: Path, tag: str) -> int:
    """The counter in the ticker's disk as the snapshot *tag* has it."""
    raw = disk.with_suffix(".raw")
    run_img("convert", "-l", f"snapshot.name={tag}", "-O", "raw", disk, raw)
    return int.from_bytes(raw.read_bytes()[4096:4100], "little")


async def test_a_guest_is_captured_on_schedule_pruned_and_restored(lab: Lab) -> None:
    async with running_guest(lab.directory) as guest:
        write_config(lab, str(guest.socket_template), ["web-1"])
        async with running_daemon(lab.config) as daemon:
            for times in range(1, RUNS + 1):
                await daemon.wait_for("snapshot taken", instance_id="web-1", times=times)
                await lab.recorded(times)
                await guest.next_ticks()
                if times < RUNS:
                    lab.make_due(daemon)
            status = (await run_cli("status", "-c", lab.config, "--json")).json
            await daemon.stop()
        last_tick = (await guest.next_ticks())[-1]
        assert guest.serial().count("BOOT") == 1
        tags = await tags_of(guest)

    runs = lab.history()
    assert [run["outcome"] for run in runs] == ["succeeded"] * RUNS
    assert all(run["freeze_s"] > 0 for run in runs)
    assert [len(run["pruned"]) for run in runs] == [0, 0, 1, 1]
    kept = [run["snapshot_name"] for run in runs[-KEPT:]]
    assert tags == {"disk0": kept}
    (view,) = status["instances"]
    assert (view["state"], view["snapshots_kept"]) == ("Running", KEPT)
    assert view["last_snapshot"]["name"] == kept[-1]

    on_disk = tick_on_disk(guest.disk, kept[-1])
    async with running_guest(lab.directory, loadvm=kept[-1]) as restored:
        ticks = await restored.next_ticks()
        assert "BOOT" not in restored.serial()
        # The line that is cut and the one before it were printed from the memory that was saved.
        assert abs(ticks[0] - 2 - on_disk) <= 1
        assert ticks == list(range(ticks[0], ticks[0] + len(ticks)))
        assert ticks[0] - 2 <= last_tick


async def tags_of(guest: Guest) -> dict[str, list[str]]:
    nodes: list[dict[str, Any]] = await guest.qmp("query-named-block-nodes", flat=True)
    return {n["node-name"]: [s["name"] for s in n["image"].get("snapshots", ())] for n in nodes if n["drv"] == "qcow2"}


async def test_a_guest_that_dies_fails_its_runs_and_holds_up_no_other(lab: Lab) -> None:
    one, two = lab.directory / "one", lab.directory / "two"
    one.mkdir()
    two.mkdir()
    async with running_guest(one, instance_id="web-1") as first, running_guest(two, instance_id="web-2") as second:
        write_config(lab, share(first, second), ["web-1", "web-2"], interval="1m")  # too short for retries
        async with running_daemon(lab.config) as daemon:
            for instance in ("web-1", "web-2"):
                await daemon.wait_for("snapshot taken", instance_id=instance)
                await lab.recorded(1, instance)
            before = lab.schedule("web-1")

            await first.kill()
            lab.make_due(daemon, "web-1", "web-2")
            failed = await daemon.wait_for("run failed", instance_id="web-1")
            taken = await daemon.wait_for("snapshot taken", instance_id="web-2", times=2)
            assert taken["late_s"] < 5
            await lab.recorded(2)
            after = lab.schedule("web-1")
            assert after["last_error"] == failed["error"]
            assert str(first.socket.name) in failed["error"]
            assert after["last_snapshot_id"] == before["last_snapshot_id"]
            assert "gone_since_at" not in after
            assert after["next_run_at"] > after["last_run_at"]
            await daemon.stop()
        await second.next_ticks()
    (_, run) = lab.history("web-1")
    assert (run["outcome"], run["freeze_s"], run["pruned"]) == ("failed", None, [])
    assert [run["outcome"] for run in lab.history("web-2")] == ["succeeded"] * 2


def share(first: Guest, second: Guest) -> str:
    """A socket template that fits both: their own directories are apart."""
    (first.socket.parent.parent / second.instance_id).symlink_to(second.socket.parent)
    return str(first.socket_template)
