"""A daemon on a Hypeman server, as it is installed: what it keeps, and what is left when it or the server is killed."""

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.hypeman_site import WEB, Site, running_server
from tests.processes import Lab, children_of, run_cli, running_daemon, wait_until

SNAPSHOTS = f"POST /instances/{WEB}/snapshots"
RESTORE = f"POST /instances/{WEB}/restore"


@asynccontextmanager
async def scheduled(tmp_path: Path) -> AsyncIterator[tuple[Site, Lab]]:
    """A server, and a config with a schedule whose first run is at once."""
    async with running_server(tmp_path) as site:
        lab = Lab(tmp_path)
        lab.replace(f"""
state_dir = "state"
[runs]
guard = false
[backends.cloud]
type = "hypeman"
url = "{site.url}"
token_file = "{site.token_file}"
[[schedules]]
instance = "{WEB}"
interval = "1h"
first_run = "now"
retention = {{ max_count = 1 }}
name_prefix = "nightly"
""")
        yield site, lab


async def test_a_schedule_takes_snapshots_and_prunes_them_on_the_server(tmp_path: Path) -> None:
    async with scheduled(tmp_path) as (site, lab):
        checked = await run_cli("check-config", "-c", lab.config)
        assert checked.status == 0, checked.stderr
        site.add_snapshot("by-hand", at="2026-03-09T01:00:00Z", tags={})
        async with running_daemon(lab.config) as daemon:
            await lab.recorded(1, WEB)
            lab.make_due(daemon, WEB)
            await lab.recorded(2, WEB)
            await daemon.stop()
        first, second = lab.history(WEB)
        assert (first["outcome"], second["outcome"], second["error"]) == ("succeeded", "succeeded", None)
        assert [one["snapshot_id"] for one in second["pruned"]] == [first["snapshot_id"]]
        assert second["freeze_s"] > 0
        assert {one["name"] for one in site.snapshots()} == {"by-hand", second["snapshot_name"]}
        assert site.state() == "Running"
        listed = await run_cli("snapshots", WEB, "--json", "-c", lab.config)
        assert [one["id"] for one in listed.json] == [second["snapshot_id"]]
        assert "curl" in listed.json[0]["restore"][0]["command"]


@pytest.mark.parametrize("with_holder", [False, True], ids=["alone", "with-all-it-started"])
async def test_a_daemon_killed_in_mid_capture_leaves_no_guest_down(tmp_path: Path, with_holder: bool) -> None:
    async with scheduled(tmp_path) as (site, lab):
        site.fault(SNAPSHOTS, takes_s=2)
        async with running_daemon(lab.config) as daemon:
            await wait_until(lambda: site.state() == "Standby", "the capture")
            (holder,) = children_of(daemon.pid)
            await daemon.kill()
            if with_holder:
                os.kill(holder, signal.SIGKILL)
        recovered = await run_cli("recover", "-c", lab.config)
        assert (recovered.status, recovered.stdout) == (0, "1 of 1 open runs settled\n"), recovered.stderr
        (run,) = lab.history(WEB)
        assert (run["outcome"], site.state()) == ("interrupted", "Running")
        assert run["found_frozen"] is with_holder
        assert (run["snapshot_id"] is None) is with_holder
        assert len(site.snapshots()) == (0 if with_holder else 1)
        assert len(site.requests(RESTORE)) == (1 if with_holder else 0)
        await wait_until(lambda: not Path(f"/proc/{holder}").exists(), "the holder to end")


async def test_a_server_killed_in_mid_capture_has_its_guest_brought_back_by_the_running_daemon(tmp_path: Path) -> None:
    async with scheduled(tmp_path) as (site, lab):
        site.fault(SNAPSHOTS, takes_s=60)
        async with running_daemon(lab.config) as daemon:
            await wait_until(lambda: site.state() == "Standby", "the capture")
            await site.kill()
            await daemon.wait_for("run left open until its hypervisor answers")
            await site.start()
            await lab.recorded(1, WEB)
            assert site.state() == "Running"
            assert children_of(daemon.pid) == []
            taken = await run_cli("run-now", WEB, "-c", lab.config)
            assert taken.status == 0, taken.stderr
            await daemon.stop()
        first, second = lab.history(WEB)
        assert (first["outcome"], first["found_frozen"], first["snapshot_id"]) == ("interrupted", True, None)
        assert "gave no answer" in first["error"]
        assert [one["name"] for one in site.snapshots()] == [second["snapshot_name"]]


async def test_a_daemon_that_is_stopped_in_mid_capture_waits_for_it(tmp_path: Path) -> None:
    async with scheduled(tmp_path) as (site, lab):
        lab.replace(lab.config.read_text().replace("[runs]", '[runs]\nshutdown_grace = "1ms"'))
        site.fault(SNAPSHOTS, takes_s=1)
        async with running_daemon(lab.config) as daemon:
            await wait_until(lambda: site.state() == "Standby", "the capture")
            await daemon.stop()
        (run,) = lab.history(WEB)
        assert site.state() == "Running"
        assert (run["outcome"], run["snapshot_id"] is None) == ("interrupted", False)
        assert site.requests(RESTORE) == []
