"""The example config as it is: the first thing that anybody runs."""

import shutil
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from tests.processes import ROOT, Lab, run_cli, running_daemon


@pytest.fixture
def example(tmp_path: Path) -> Lab:
    """The example where it is copied to; its paths are relative to itself."""
    shutil.copy(ROOT / "config.example.toml", tmp_path / "config.toml")
    return Lab(tmp_path)


async def test_the_example_is_valid(example: Lab) -> None:
    checked = await run_cli("check-config", "-c", example.config)
    assert checked.status == 0
    assert "valid" in checked.stdout


async def test_the_example_shows_a_snapshot_and_the_next_run_at_once(example: Lab) -> None:
    async with running_daemon(example.config) as daemon:
        await daemon.wait_for("snapshot taken", instance_id="web-1")
        await daemon.wait_for("next run", instance_id="web-1", times=2)
        await daemon.wait_for("API serves")  # whenever its socket is made: no run waits for that
        told = [line for line in daemon.lines() if line["level"] == "info" and line["event"] != "API serves"]
        events = [line["event"] for line in told]
        expected = ["hypemand starts", "schedule made", "next run", "capture begins", "snapshot taken", "next run"]
        assert events[:6] == expected
        at = [datetime.fromisoformat(line["timestamp"]) for line in told]
        assert at == sorted(at)
        assert at[5] - at[0] < timedelta(seconds=5)
        assert timedelta(0) < datetime.fromisoformat(told[5]["at"]) - at[5] <= timedelta(minutes=1)

        demo = example.directory / "demo"
        (snapshot,) = (demo / "embedded" / "snapshots" / "web-1").glob("[!.]*")
        assert (snapshot / "memory").stat().st_size == 16 << 20
        assert (snapshot / "disk").stat().st_size == 64 << 20
        for name in ("memory", "disk"):
            with (snapshot / name).open("rb") as file:
                assert b"\0" not in file.read(1 << 20)
            assert (snapshot / name).stat().st_blocks * 512 >= (snapshot / name).stat().st_size

        shown = await run_cli("status", "-c", example.config)
        assert shown.status == 0
        _, row = shown.stdout.splitlines()
        assert row.split()[:3] == ["web-1", "Running", "1m"]
        assert "succeeded" in row
        history = (await run_cli("history", "-c", example.config, "--json")).json
        assert [run["outcome"] for run in history] == ["succeeded"]
        assert {path.name for path in (demo / "state").iterdir()} >= {"lock", "runs.jsonl", "schedules", "quarantine"}
        await daemon.stop()
