"""The real daemon and real QEMU guests: scheduled, captured, pruned, restored; and one that dies."""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import trio

from hypemand.backends import qmp
from tests.processes import ALONE, Lab, run_cli, running_daemon
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


async def test_a_guest_is_captured_running_and_stopped_in_one_list_that_is_pruned_together(lab: Lab) -> None:
    with tempfile.TemporaryDirectory(prefix="hypemand-") as short:
        sockets = Path(short)
        async with running_guest(lab.directory, sockets_in=sockets) as guest:
            write_config(lab, str(guest.socket_template), ["web-1"])
            disks = f'disks = ["{lab.directory}/{{instance}}.qcow2"]'
            lab.replace(lab.config.read_text().replace('type = "qemu"', f'type = "qemu"\n{disks}\nmode = "background"'))
            async with running_daemon(lab.config) as daemon:
                await daemon.wait_for("snapshot taken", instance_id="web-1")
                await lab.recorded(1)
                await guest.kill()
                for times in (2, 3):
                    lab.make_due(daemon)
                    await daemon.wait_for("snapshot taken", instance_id="web-1", times=times)
                    await lab.recorded(times)
                stopped = (await run_cli("status", "-c", lab.config, "--json")).json["instances"][0]
                async with running_guest(lab.directory, sockets_in=sockets) as again:
                    lab.make_due(daemon)
                    await daemon.wait_for("snapshot taken", instance_id="web-1", times=4)
                    await lab.recorded(4)
                    await again.next_ticks()
                    listed = (await run_cli("snapshots", "web-1", "-c", lab.config, "--json")).json
                    tags = await tags_of(again)
                await daemon.stop()
    assert (stopped["state"], stopped["snapshots_kept"]) == ("Stopped", KEPT)
    runs = lab.history()
    assert [run["kind"] for run in runs] == ["Standby", "Stopped", "Stopped", "Standby"]
    assert [len(run["pruned"]) for run in runs] == [0, 0, 1, 1]
    assert [run["freeze_s"] is None for run in runs] == [False, True, True, False]
    assert [(s["name"], s["kind"]) for s in listed] == [(run["snapshot_name"], run["kind"]) for run in runs[-KEPT:]]
    assert tags == {"disk0": [s["name"] for s in listed]}
    assert [step["action"] for step in listed[0]["restore"]] == ["run", "start"]
    assert [step["action"] for step in listed[1]["restore"]] == ["run", "start", "monitor"]


async def test_a_fallback_to_mode_internal_is_warned_about_in_log_history_and_status(lab: Lab) -> None:
    async with running_guest(lab.directory) as guest:
        await guest.qmp("migrate-set-capabilities", capabilities=[{"capability": "xbzrle", "state": True}])
        write_config(lab, str(guest.socket_template), ["web-1"])
        lab.replace(lab.config.read_text().replace('type = "qemu"', 'type = "qemu"\nmode = "background"'))
        async with running_daemon(lab.config) as daemon:
            await daemon.wait_for("snapshot taken", instance_id="web-1")
            await lab.recorded(1)
            (warned,) = daemon.logged("capture with a warning", level="warning")
            shown = await run_cli("status", "-c", lab.config)
            status = (await run_cli("status", "-c", lab.config, "--json")).json
            history = (await run_cli("history", "-c", lab.config, "--json")).json
            await daemon.stop()
    assert "xbzrle" in warned["warning"]
    assert history[0]["warnings"] == [warned["warning"]]
    assert [warned["warning"] in line for line in status["warnings"] if "web-1" in line] == [True]
    assert warned["warning"] in shown.stderr
    assert (history[0]["outcome"], history[0]["error"]) == ("succeeded", None)
    assert lab.started()[0]["freezes"] == "hypervisor"


async def test_hypemand_killed_in_mid_save_is_settled_by_recover_and_the_guest_runs_all_the_time(lab: Lab) -> None:
    async with running_guest(lab.directory, memory_mb=256, filled=True) as guest:
        write_config(lab, str(guest.socket_template), ["web-1"])
        config = lab.config.read_text().replace('type = "qemu"', 'type = "qemu"\nmode = "background"')
        lab.replace(config.replace("[runs]", f"[runs]\n{ALONE}"))
        async with running_daemon(lab.config) as daemon, qmp.connect(guest.test_socket) as monitor:
            with trio.fail_after(30):
                await monitor.wait_event("RESUME")
            await daemon.kill()
        await guest.next_ticks()
        with trio.fail_after(60):
            while (recovered := await run_cli("recover", "-c", lab.config)).status != 0:
                assert "still being saved" in recovered.stderr
        (run,) = lab.history()
        assert (run["outcome"], run["kind"]) == ("interrupted", "Standby")
        assert "its snapshot was complete and is kept" in run["error"]
        assert await tags_of(guest) == {"disk0": [run["snapshot_name"]]}
        listed = (await run_cli("snapshots", "web-1", "-c", lab.config, "--json")).json
        assert [s["id"] for s in listed] == [run["snapshot_id"]]
        await guest.next_ticks()
