"""What the hypeman backend lists and deletes, and the way back."""

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import evolve

from hypemand.backends.base import (
    BackendError,
    BackendUnavailable,
)
from hypemand.backends.hypeman.documents import kept_of
from hypemand.backends.hypeman.drafts import way_back
from hypemand.backends.hypeman.settings import HypemanSettings
from hypemand.core.model import SnapshotKind
from tests.hypeman_server.answers import TOKEN
from tests.hypeman_site import NAME, SNAPSHOTS, WEB, new_request, opened, settle, take
from tests.processes import ROOT, children_of, wait_until

# What is listed, and deleted.


async def test_a_snapshot_that_somebody_deleted_on_the_server_is_not_listed(tmp_path: Path) -> None:
    async with opened(tmp_path) as (site, backend):
        snapshot = await take(backend)
        for file in site.directory.glob("snapshots/*.json"):
            file.unlink()
        assert await backend.list_snapshots(WEB) == ()
        assert (await settle(backend, new_request())).snapshot is None
        await backend.delete_snapshot(snapshot)
        assert list(tmp_path.glob("catalog/*/[!.]*")) == []


async def test_manifests_of_snapshots_that_are_gone_for_sure_do_not_pile_up(tmp_path: Path) -> None:
    async with opened(tmp_path) as (site, backend):
        first, second, third = [await take(backend, f"run-{number}", f"nightly-{number}") for number in (1, 2, 3)]
        files = {json.loads(file.read_text())["name"]: file for file in site.directory.glob("snapshots/*.json")}
        kept = {name: file.read_text() for name, file in files.items()}
        catalog = tmp_path / "catalog" / WEB

        async def left() -> set[str]:
            await backend.prepare(WEB, SnapshotKind.STANDBY)
            return {path.name for path in catalog.iterdir()}

        files[first.name].unlink()
        gone = rf"GET /snapshots/{json.loads(kept[first.name])['id']}"
        for unsure in ({"status": 404}, {"status": 500}, {"cut": "before", "times": 2}):
            site.fault(gone, **unsure)
            assert await left() == {"run-1", "run-2", "run-3"}
        site.fault("GET /snapshots", status=200, body=[json.loads(kept[third.name])])  # it forgot to tell of one
        assert await left() == {"run-2", "run-3"}
        for name in (second.name, third.name):
            files[name].unlink()
        assert await left() == {"run-2", "run-3"}  # the server's own disk may be away
        for name, text in kept.items():
            files[name].write_text(text)
        listed = await backend.list_snapshots(WEB)
        assert {one.id: one.tags for one in listed} == {one.id: one.tags for one in (first, second, third)}


OLD = "2026-03-09T02:00:00.123456789+01:00"


async def test_what_the_servers_own_schedule_left_behind_is_listed_once_it_has_none(tmp_path: Path) -> None:
    async with opened(tmp_path) as (site, backend):
        old = site.add_snapshot("nightly-20260309-020000", at=OLD)
        site.add_snapshot("by-hand", at=OLD, tags={"team": "backend"})
        site.add_schedule()
        ours = await take(backend)
        assert await backend.list_snapshots(WEB) == (ours,)
        (site.directory / "snapshot-schedules" / f"{WEB}.json").unlink()
        adopted, listed = await backend.list_snapshots(WEB)
        assert listed == ours
        assert (adopted.id, adopted.name, adopted.created_at.isoformat()) == (
            *(old, "nightly-20260309-020000"),
            "2026-03-09T01:00:00.123456+00:00",
        )
        assert adopted.restore != ()
        await backend.delete_snapshot(adopted)
        assert {one["name"] for one in site.snapshots()} == {"by-hand", NAME}
        await backend.delete_snapshot(adopted)


async def test_nothing_that_is_not_ours_for_sure_is_listed_of_an_instance_that_is_gone(tmp_path: Path) -> None:
    async with opened(tmp_path) as (site, backend):
        site.add_snapshot("nightly-20260309-020000", at=OLD)
        ours = await take(backend)
        site.remove_guest()
        assert await backend.list_snapshots(WEB) == (ours,)


async def test_settling_clears_up_after_a_deletion_that_was_cut_short(tmp_path: Path) -> None:
    async with opened(tmp_path) as (_, backend):
        snapshot = await take(backend)
        (tmp_path / "catalog" / WEB / ".run-0.deleted").mkdir()
        assert (await settle(backend, new_request())).snapshot == snapshot
        assert [path.name for path in (tmp_path / "catalog" / WEB).iterdir()] == ["run-1"]


async def test_a_lost_catalog_takes_no_snapshot_along(tmp_path: Path) -> None:
    async with opened(tmp_path) as (site, backend):
        made = await take(backend)
        subprocess.run(["rm", "-r", tmp_path / "catalog" / WEB], check=True)
        (found,) = await backend.list_snapshots(WEB)
        (kept,) = site.snapshots()
        assert (found.id, found.name, found.tags, found.restore) == (made.id, made.name, made.tags, made.restore)
        await backend.delete_snapshot(found)
        assert (kept["id"], site.snapshots()) == (kept["id"], [])


async def test_a_snapshot_that_lost_its_tags_is_not_deleted(tmp_path: Path) -> None:
    async with opened(tmp_path) as (site, backend):
        snapshot = await take(backend)
        (file,) = site.directory.glob("snapshots/*.json")
        file.write_text(json.dumps({**json.loads(file.read_text()), "tags": {"team": "backend"}}))
        with pytest.raises(BackendError, match="not tagged as a schedule's"):
            await backend.delete_snapshot(snapshot)
        assert await backend.list_snapshots(WEB) == (snapshot,)


@pytest.mark.parametrize("tag", ["{precious}", ".", "..", "../../precious", ".run-1.partial", "x" * 250, ""])
async def test_a_tag_leads_nowhere_in_the_catalog(tmp_path: Path, tag: str) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    async with opened(tmp_path) as (site, backend):
        ours = await take(backend)
        tags = {**ours.tags, "hypemand.run_id": tag.format(precious=precious)}
        odd = site.add_snapshot("nightly-1", at=OLD, tags=tags)
        by_id = {one.id: one for one in await backend.list_snapshots(WEB)}
        assert by_id == {"run-1": ours, odd: by_id[odd]}
        await backend.delete_snapshot(by_id[odd])
        assert await backend.list_snapshots(WEB) == (ours,)
        for name in (str(precious), "..", "."):
            with pytest.raises(BackendError, match="can't name anything"):
                await backend.delete_snapshot(evolve(ours, id=name))
        assert precious.is_dir()
        assert await backend.list_snapshots(WEB) == (ours,)


async def test_a_snapshot_whose_own_id_is_a_path_is_left_alone(tmp_path: Path) -> None:
    async with opened(tmp_path) as (site, backend):
        ours = await take(backend)
        body = [*site.snapshots(), {**site.snapshots()[0], "id": "../instances/x", "tags": ours.tags}]
        site.fault("GET /snapshots", status=200, body=body, times=2)
        assert await backend.list_snapshots(WEB) == (ours,)
        assert len((await backend.prepare(WEB, SnapshotKind.STANDBY)).taken_names) == 1


async def test_a_deletion_that_fails_leaves_the_snapshot_listed(tmp_path: Path) -> None:
    async with opened(tmp_path) as (site, backend):
        snapshot = await take(backend)
        for fault in ({"status": 500, "body": {"code": "internal_error", "message": "busy"}}, {"status": 404}):
            site.fault("DELETE /snapshots/.*", **fault)
            with pytest.raises(BackendUnavailable):
                await backend.delete_snapshot(snapshot)
            assert await backend.list_snapshots(WEB) == (snapshot,)
        site.fault("DELETE /snapshots/.*", cut="after")  # asked again, it is gone
        await backend.delete_snapshot(snapshot)
        assert (await backend.list_snapshots(WEB), site.snapshots()) == ((), [])


async def test_a_schedule_of_the_servers_own_is_warned_of_before_the_capture(tmp_path: Path) -> None:
    async with opened(tmp_path) as (site, backend):
        site.add_snapshot("by-hand", at=OLD, tags={})
        ready = await backend.prepare(WEB, SnapshotKind.STANDBY)
        assert (ready.warnings, set(ready.taken_names), ready.rooms) == ((), {"by-hand"}, ())
        site.add_schedule()
        (warning,) = (await backend.prepare(WEB, SnapshotKind.STANDBY)).warnings
        assert "hypemand import-hypeman --take-over" in warning


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"status": 404, "body": "404 page not found\n"}, []),
        ({"status": 404, "body": {"code": "Not Found", "message": "no matching operation was found"}}, []),
        ({"status": 500, "body": {"code": "internal_error", "message": "torn file"}}, ["can't be told: .*torn file"]),
    ],
    ids=["no-page", "no-operation", "failed"],
)
async def test_a_server_that_tells_nothing_of_schedules_is_captured_nevertheless(
    tmp_path: Path, answer: dict[str, Any], said: list[str]
) -> None:
    async with opened(tmp_path) as (site, backend):
        old = site.add_snapshot("nightly-20260309-020000", at=OLD)
        site.fault(f"GET /instances/{WEB}/snapshot-schedule", times=2, **answer)
        warnings = (await backend.prepare(WEB, SnapshotKind.STANDBY)).warnings
        assert [bool(re.search(*pair)) for pair in zip(said, warnings, strict=True)] == [True] * len(said)
        with pytest.raises(BackendUnavailable):  # but nothing is taken for left behind then
            await backend.list_snapshots(WEB)
        assert [one.id for one in await backend.list_snapshots(WEB)] == [old]


# The way back.

STAND_IN = f"""#!{sys.executable} -E
import argparse, ssl, sys, urllib.error, urllib.request
parser = argparse.ArgumentParser()
parser.add_argument("-sS", dest="quiet", action="store_true")
parser.add_argument("--fail-with-body", action="store_true")
parser.add_argument("--cacert")
parser.add_argument("-H", action="append")
parser.add_argument("-d", type=str.encode)
parser.add_argument("url")
given = parser.parse_args()
lines = [sys.stdin.read() if line == "@-" else line for line in given.H]
headers = dict(line.split(": ", 1) for line in lines)
trust = ssl.create_default_context(cafile=given.cacert) if given.cacert else None
try:
    print(urllib.request.urlopen(urllib.request.Request(given.url, given.d, headers), context=trust).read().decode())
except urllib.error.HTTPError as error:
    print(error.read().decode())
    sys.exit(22)
"""
"""Where curl is not installed: it knows the options of the way back, and no others."""


@pytest.fixture
def curl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("curl") is None:
        (tmp_path / "curl").write_text(STAND_IN)
        (tmp_path / "curl").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


async def test_the_way_back_works_word_for_word(tmp_path: Path, curl: None) -> None:
    async with opened(tmp_path) as (site, backend):
        running = await take(backend)
        site.set_state("Stopped")
        stopped = await take(backend, "run-2", "nightly-20261123-010000", kind=SnapshotKind.STOPPED, freezes=None)
        ids = {one["name"]: one["id"] for one in site.snapshots()}
        for snapshot, state in ((running, "Running"), (stopped, "Stopped")):
            site.set_state("Stopped")
            (step,) = snapshot.restore
            done = subprocess.run(step.command, shell=True, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done
            assert (site.state(), site.guest()["went_back_to"]) == (state, ids[snapshot.name])
            assert TOKEN not in step.command
        site.set_state("Running")
        refused = subprocess.run(running.restore[0].command, shell=True, capture_output=True, text=True, check=False)
        assert refused.returncode != 0
        assert "cannot restore snapshot while source is Running" in refused.stdout


async def test_the_way_back_is_that_of_the_docs(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "restore.md").read_text()
    (line,) = re.findall(r"<!-- hypeman -->\n```sh\n(.*?)\n```", page, re.DOTALL)
    async with opened(tmp_path) as (site, backend):
        snapshot = await take(backend)
        (kept,) = site.snapshots()
        for theirs, ours in (
            *(("https://hypeman.example.org", site.url), ("/etc/hypemand/hypeman-token", str(site.token_file))),
            *(("$ID", WEB), ("$SNAPSHOT", kept["id"])),
        ):
            line = line.replace(theirs, ours)
        assert snapshot.restore[0].command == f"{line} # {snapshot.name}"


async def test_the_way_back_over_tls_trusts_whom_the_backend_trusts(tmp_path: Path, curl: None) -> None:
    async with opened(tmp_path, "https") as (site, backend):
        snapshot = await take(backend)
        site.set_state("Stopped")
        done = subprocess.run(snapshot.restore[0].command, shell=True, capture_output=True, text=True, check=False)
        assert (done.returncode, site.state()) == (0, "Running"), done


def test_a_name_that_the_server_made_up_is_harmless_in_a_shell() -> None:
    told = {"id": "a'b", "source_instance_id": WEB, "name": "x\ntouch /tmp/y", "kind": "Standby"}
    (step,) = way_back(kept_of(told), HypemanSettings(url="http://localhost:1"))
    assert "touch" not in step.command
    assert "'\"'\"'" in step.command


async def test_a_connection_that_is_made_anew_is_held_anew(tmp_path: Path) -> None:
    """The first one ends with the answer that the token is no good."""
    async with opened(tmp_path) as (site, backend):
        others = children_of(os.getpid())
        site.fault(SNAPSHOTS, status=401, body={"code": "Unauthorized", "message": "invalid token"}, cut="then")
        site.fault(SNAPSHOTS, takes_s=1.5)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(backend.capture, WEB, new_request())
            await wait_until(lambda: site.state() == "Standby", "the capture")
            (holder,) = {*children_of(os.getpid())} - {*others}
            held = Path(f"/proc/{holder}/fd/3").stat().st_ino
            assert held in sockets_of(os.getpid())
        assert children_of(os.getpid()) == others


def sockets_of(pid: int) -> set[int]:
    found = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            found.add(path.stat().st_ino)
    return found
