"""The command `import-hypeman`, from a server and from its files, with a daemon and without one."""

import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, redirect_stderr, redirect_stdout
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path

import pytest
import trio
from attrs import evolve

from hypemand.cli import main
from hypemand.core.model import Schedule
from hypemand.engine.importing import Wish, replaced
from hypemand.state.codec import decode_schedule
from hypemand.surface.api.imports import wish_document, wish_of
from tests.hypeman_site import WEB, Site, running_server
from tests.processes import PATIENCE_S, Lab, Ran, instant, run_cli, running_daemon

OTHER, THIRD = "b2other", "c3third"
KEYS = ("interval", "retention", "next_run_at", "last_run_at", "last_snapshot_id", "last_error", "metadata")


@asynccontextmanager
async def moving(tmp_path: Path, more: str = "", **settings: str) -> AsyncIterator[tuple[Site, Lab]]:
    """A server with three guests, of which two have schedules, and a config for it."""
    async with running_server(tmp_path) as site:
        for instance in (OTHER, THIRD):
            site.add_guest(instance)
        site.add_schedule()
        site.add_schedule(OTHER, interval="1h0m0s", retention={"max_count": 3}, metadata=None, name_prefix=None)
        lab = Lab(tmp_path)
        own = {"url": site.url, "token_file": str(site.token_file), **settings}
        keys = "\n".join(f"{key} = {json.dumps(value)}" for key, value in own.items())
        lab.replace(f'state_dir = "state"\n[runs]\nguard = false\n[backends.cloud]\ntype = "hypeman"\n{keys}\n{more}')
        yield site, lab


async def bring(lab: Lab, *args: str | Path) -> Ran:
    """The command, in a thread of this process: to start another one takes much longer than all that it does."""
    out, err = StringIO(), StringIO()

    def run() -> int:
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
            main(["import-hypeman", "-c", str(lab.config), *map(str, args)])
        return int(str(ended.value.code))

    with trio.fail_after(PATIENCE_S):
        status = await trio.to_thread.run_sync(run)
    return Ran(status, out.getvalue(), err.getvalue())


def became(ran: Ran) -> dict[str, tuple[str, str]]:
    return {one["instance_id"]: (one["outcome"], one["reason"] or "") for one in ran.json["schedules"]}


IMPORTED = {WEB: ("imported", ""), OTHER: ("imported", "")}
UNCHANGED = {WEB: ("unchanged", ""), OTHER: ("unchanged", "")}


def assert_moved(site: Site, lab: Lab) -> None:
    """All that the server's schedules say, hypemand's say as well."""
    for instance in (WEB, OTHER):
        theirs = json.loads((site.directory / "snapshot-schedules" / f"{instance}.json").read_text())
        ours = lab.schedule(instance)
        expected = decode_schedule(json.dumps(theirs).encode(), ours["instance_id"])
        found = decode_schedule(json.dumps(ours).encode(), ours["instance_id"])
        assert (found.backend, found.managed_by) == ("cloud", "api")
        assert evolve(found, backend=None, retention=expected.retention, updated_at=expected.updated_at) == expected
        assert (found.retention.max_count, found.retention.max_age) == (
            expected.retention.max_count,
            expected.retention.max_age,
        )


async def test_the_schedules_of_a_server_are_imported_with_cadence_and_history(tmp_path: Path) -> None:
    async with moving(tmp_path) as (site, lab):
        ran = await run_cli("import-hypeman", "-c", lab.config, "--json")
        assert (ran.status, ran.stderr, became(ran)) == (0, "", IMPORTED)
        assert (ran.json["source"], ran.json["backend"], ran.json["dry_run"]) == (site.url, "cloud", False)
        assert_moved(site, lab)
        assert not lab.schedule_file(THIRD).exists()
        assert site.has_schedule()
        assert site.has_schedule(OTHER)


async def test_done_again_it_changes_nothing(tmp_path: Path) -> None:
    async with moving(tmp_path) as (_, lab):
        await bring(lab)
        before = {path: path.read_bytes() for path in lab.state.rglob("*.json")}
        ran = await bring(lab, "--json")
        assert (ran.status, became(ran)) == (0, UNCHANGED)
        assert {path: path.read_bytes() for path in lab.state.rglob("*.json")} == before


async def test_a_dry_run_tells_and_changes_nothing(tmp_path: Path) -> None:
    async with moving(tmp_path) as (site, lab):
        for again in (False, True):
            ran = await bring(lab, "--dry-run", "--take-over", "--json")
            assert (ran.status, became(ran)) == (0, UNCHANGED if again else IMPORTED)
            assert {one["taken_over"] for one in ran.json["schedules"]} == {True}
            assert site.has_schedule()
            assert site.requests("DELETE") == []
            if not again:
                assert not lab.state.exists()
                await bring(lab)
        told = await bring(lab, "--dry-run")
        assert "WOULD BE" in told.stdout
        assert "dry run: nothing was changed" in told.stderr


async def test_a_running_daemon_takes_them_in_and_runs_them(tmp_path: Path) -> None:
    async with moving(tmp_path) as (site, lab):
        async with running_daemon(lab.config) as daemon:
            await daemon.wait_for("API serves")
            ran = await bring(lab, "--dry-run", "--json")
            assert (ran.status, became(ran), lab.schedule_file(WEB).exists()) == (0, IMPORTED, False)
            ran = await bring(lab, "--json")
            assert (ran.status, became(ran)) == (0, IMPORTED)
            assert_moved(site, lab)
            listed = await run_cli("status", WEB, "--json", "-c", lab.config)
            assert listed.json["instances"][0]["schedule"]["metadata"] == {"team": "backend"}
            assert became(await bring(lab, "--json")) == UNCHANGED
            taken = await run_cli("run-now", WEB, "-c", lab.config)
            assert taken.status == 0, taken.stderr
            await daemon.stop()
        assert (site.state(), len(site.snapshots())) == ("Running", 1)


async def test_a_daemon_started_after_an_import_has_the_backend_ready(tmp_path: Path) -> None:
    """The schedule names a last snapshot, by which the backend counts as used."""
    async with moving(tmp_path) as (site, lab):
        await bring(lab, "--take-over")
        async with running_daemon(lab.config) as daemon:
            await daemon.wait_for("API serves")
            taken = await run_cli("run-now", WEB, "-c", lab.config)
            assert taken.status == 0, taken.stderr
            assert daemon.logged("backend not ready; trying again") == []
            assert [line for line in daemon.lines() if "the clock" in line["event"]] == []
            await daemon.stop()
        assert len(site.snapshots()) == 1


async def test_taken_over_the_servers_own_schedules_are_gone_and_their_snapshots_hypemands(tmp_path: Path) -> None:
    async with moving(tmp_path) as (site, lab):
        old = site.add_snapshot("nightly-20260309-020000", at="2026-03-09T02:00:00Z")
        ran = await bring(lab, "--take-over", "--json")
        assert (ran.status, became(ran)) == (0, IMPORTED)
        assert {one["taken_over"] for one in ran.json["schedules"]} == {True}
        assert (site.has_schedule(), site.has_schedule(OTHER)) == (False, False)
        assert [one["id"] for one in site.snapshots()] == [old]
        listed = await run_cli("snapshots", WEB, "--json", "-c", lab.config)
        assert [one["id"] for one in listed.json] == [old]
        again = await bring(lab, "--take-over")
        assert (again.status, again.stdout) == (0, f"no schedules in {site.url}\n")


async def test_a_schedule_is_only_deleted_once_hypemand_has_it(tmp_path: Path) -> None:
    config = f'[[schedules]]\ninstance = "{OTHER}"\ninterval = "1h"\n'
    async with moving(tmp_path, config) as (site, lab):
        ran = await bring(lab, "--take-over", "--json")
        assert ran.status == 1
        assert became(ran)[WEB] == ("imported", "")
        assert became(ran)[OTHER] == (
            "refused",
            f"the schedule of '{OTHER}' is managed by the config file: change it there",
        )
        assert (site.has_schedule(), site.has_schedule(OTHER)) == (False, True)
        assert len(site.requests("DELETE")) == 1


async def test_a_schedule_that_hypemand_can_not_write_is_not_deleted_however_often_that_is_asked_for(
    tmp_path: Path,
) -> None:
    async with moving(tmp_path) as (site, lab), running_daemon(lab.config) as daemon:
        await daemon.wait_for("API serves")
        lab.schedule_file(WEB).mkdir(parents=True)
        (lab.schedule_file(WEB) / "in-the-way").touch()
        for _ in range(2):
            ran = await bring(lab, "--take-over", "--json")
            assert (ran.status, became(ran)[WEB][0], site.has_schedule()) == (1, "refused", True)
        (lab.schedule_file(WEB) / "in-the-way").unlink()
        lab.schedule_file(WEB).rmdir()
        ran = await bring(lab, "--take-over", "--json")
        assert (ran.status, became(ran), site.has_schedule()) == (0, {WEB: ("unchanged", "")}, False)
        assert lab.schedule_file(WEB).is_file()
        await daemon.stop()


async def test_a_server_that_keeps_its_schedule_is_told(tmp_path: Path) -> None:
    async with moving(tmp_path) as (site, lab):
        site.fault(
            f"DELETE /instances/{OTHER}/snapshot-schedule", status=500, body={"code": "x", "message": "disk full"}
        )
        ran = await bring(lab, "--take-over")
        assert ran.status == 1
        assert "the server's own schedule is not deleted: disk full" in ran.stdout
        ran = await bring(lab, "--take-over", "--json")
        assert (ran.status, became(ran)) == (0, {OTHER: ("unchanged", "")})


async def test_without_take_over_the_two_schedulers_are_warned_of(tmp_path: Path) -> None:
    async with moving(tmp_path) as (_, lab):
        ran = await bring(lab)
        assert ran.status == 0
        assert ran.stdout.split()[:4] == ["INSTANCE", "INTERVAL", "NEXT", "RUN"]
        assert "--take-over has the server's deleted" in ran.stderr
        assert "2 imported" in ran.stderr


# What is there already.


async def test_a_schedule_that_differs_is_left_alone_until_it_may_be_replaced(tmp_path: Path) -> None:
    async with moving(tmp_path) as (site, lab):
        await bring(lab)
        due = instant(datetime.now(UTC) + timedelta(hours=3))
        site.add_schedule(interval="12h0m0s", retention={"max_count": 2}, next_run_at=due)
        before = lab.schedule(WEB)
        ran = await bring(lab, "--take-over", "--json")
        assert (ran.status, lab.schedule(WEB)) == (1, before)
        assert became(ran)[WEB] == ("differs", "the schedule that is there has another interval, retention")
        assert (site.has_schedule(), site.has_schedule(OTHER)) == (True, False)
        ran = await bring(lab, "--replace", "--dry-run", "--json")
        assert (became(ran)[WEB], lab.schedule(WEB)) == (("replaced", ""), before)
        ran = await bring(lab, "--replace", "--json")
        assert (ran.status, became(ran)[WEB]) == (0, ("replaced", ""))
        after = lab.schedule(WEB)
        assert (after["interval"], after["retention"], after["next_run_at"]) == (
            *("12h", {"max_count": 2}),
            due,
        )
        assert after["last_run_at"] == before["last_run_at"]


def test_a_replaced_schedule_keeps_its_cadence_where_the_interval_is_the_same() -> None:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    document = {"instance_id": "a", "interval": "1h", "retention": {}}
    times = dict.fromkeys(("created_at", "updated_at", "next_run_at"), "2026-01-01T00:00:00Z")
    present = decode_schedule(json.dumps({**document, **times}).encode(), "a")  # type: ignore[arg-type]
    wanted = evolve(present, metadata={"a": "b"}, next_run_at=at.replace(year=2027), last_error="theirs")
    assert replaced(present, wanted) == evolve(present, metadata={"a": "b"})
    assert replaced(present, evolve(wanted, interval=2 * present.interval)).next_run_at.year == 2027


async def test_one_that_a_pattern_of_the_config_takes_in_is_refused(tmp_path: Path) -> None:
    async with moving(tmp_path, '[[schedules]]\ninstance = "b2*"\ninterval = "1h"\n') as (_, lab):
        ran = await bring(lab, "--json")
        assert (ran.status, became(ran)[WEB]) == (1, ("imported", ""))
        assert became(ran)[OTHER] == ("refused", f"the pattern 'b2*' in the config file takes in '{OTHER}'")


# What is no good.


async def test_each_schedule_that_is_no_good_is_told_with_its_reason_and_the_others_are_imported(
    tmp_path: Path,
) -> None:
    async with moving(tmp_path) as (site, lab):
        site.add_schedule(OTHER, interval="30s")
        site.add_schedule(THIRD, metadata={f"key-{number}": "x" for number in range(48)})
        ran = await bring(lab, "--json")
        assert (ran.status, became(ran)[WEB]) == (1, ("imported", ""))
        assert became(ran)[OTHER][0] == "refused"
        assert "interval: '30s' is too short" in became(ran)[OTHER][1]
        assert "its metadata has 48 tags; with 47 at most" in became(ran)[THIRD][1]
        assert {path.stem for path in lab.state.glob("schedules/*.json")} == {WEB}
        site.fault(f"GET /instances/{OTHER}/snapshot-schedule", status=500, body={"code": "x", "message": "torn file"})
        ran = await bring(lab)
        assert ran.status == 1
        assert "torn file (500 x)" in ran.stdout


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--backend", "nowhere"), "--backend 'nowhere' is not in the config (there: cloud)"),
        (("--url", "http://127.0.0.1:1"), "does not have just one backend for http://127.0.0.1:1 (none)"),
        (("--url", "http://h.example.org", "--backend", "cloud"), "--url 'http://h.example.org' would have the token"),
        (("--dir", "x", "--take-over"), "--url and --take-over need the server itself"),
    ],
)
async def test_arguments_that_make_no_sense_are_told(tmp_path: Path, args: tuple[str, ...], said: str) -> None:
    async with moving(tmp_path) as (_, lab):
        ran = await bring(lab, *args)
        assert (ran.status, ran.stdout) == (2, "")
        assert said in ran.stderr
        assert not lab.state.exists()


async def test_a_server_that_can_not_be_asked_is_told(tmp_path: Path) -> None:
    async with moving(tmp_path) as (site, lab):
        site.write_token("wrong")
        ran = await bring(lab)
        assert (ran.status, ran.stdout) == (1, "")
        assert f"invalid token (401 Unauthorized); see token_file {site.token_file}" in ran.stderr
        own = tmp_path / "my-token"
        own.write_text("My API Key\n")
        own.chmod(0o600)
        ran = await bring(lab, "--token-file", own, "--dry-run")
        assert ran.status == 1  # the backend's own token is still wrong
        assert "whether there is an instance" in ran.stdout
        await site.kill()
        ran = await bring(lab)
        assert "can't be reached" in ran.stderr
        await site.start()


async def test_a_config_that_is_invalid_is_told_as_by_any_command(tmp_path: Path) -> None:
    async with moving(tmp_path, "colour = 1\n") as (_, lab):
        ran = await bring(lab)
        assert (ran.status, ran.stdout) == (78, "")
        assert "colour" in ran.stderr


# From files.


@pytest.mark.parametrize("at", ["", "snapshot-schedules"])
async def test_files_are_imported_as_hypeman_wrote_them(tmp_path: Path, at: str) -> None:
    async with moving(tmp_path) as (site, lab):
        ran = await bring(lab, "--dir", site.directory / at, "--json")
        assert (ran.status, became(ran)) == (0, IMPORTED)
        assert_moved(site, lab)


async def test_files_that_are_no_good_are_told(tmp_path: Path) -> None:
    async with moving(tmp_path) as (site, lab):
        home = site.directory / "snapshot-schedules"
        (home / f"{THIRD}.json").write_text('{"instance_id": "c3th')  # torn
        (home / "deleted.json").write_text((home / f"{WEB}.json").read_text().replace(WEB, "deleted"))
        (home / "copy.json").write_text((home / f"{WEB}.json").read_text())
        ran = await bring(lab, "--dir", home, "--json")
        told = became(ran)
        assert ran.status == 1
        assert {instance for instance, (outcome, _) in told.items() if outcome == "imported"} == {WEB, OTHER}
        assert "is not JSON" in told[THIRD][1]
        assert told["deleted"] == ("refused", "no backend knows an instance 'deleted'")
        assert "but the file is that of 'copy'" in told["copy"][1]
        ran = await bring(lab, "--dir", tmp_path / "nowhere")
        assert (ran.status, ran.stdout) == (1, "")
        assert "nowhere: No such file" in ran.stderr


# The state.


async def test_a_state_that_is_not_ours_is_not_written_to(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.fail("the tests run as root, who alone can give a directory away")
    async with moving(tmp_path) as (_, lab):
        lab.state.mkdir()
        os.chown(lab.state, 12345, 12345)
        ran = await bring(lab)
        assert (ran.status, ran.stdout) == (1, "")
        assert "belongs to another user" in ran.stderr
        assert [*lab.state.iterdir()] == []
        assert (await bring(lab, "--dry-run")).status == 0


async def test_nothing_is_done_behind_the_back_of_a_daemon_that_does_not_answer(tmp_path: Path) -> None:
    async with moving(tmp_path) as (site, lab), running_daemon(lab.config) as daemon:
        await daemon.wait_for("API serves")
        daemon.send(signal.SIGSTOP)
        ran = await bring(lab, "--take-over", "--json")
        assert ran.status == 1
        assert {outcome for outcome, _ in became(ran).values()} == {"refused"}
        assert all("the daemon gives no answer" in reason for _, reason in became(ran).values())
        assert [*lab.state.glob("schedules/*.json")] == []
        assert site.has_schedule()


def test_a_wish_is_told_to_the_daemon_as_it_is() -> None:
    document = {"instance_id": "a", "interval": "1h", "retention": {"max_count": 0}, "unknown": {"kept": 1}}
    times = dict.fromkeys(("created_at", "updated_at", "next_run_at"), "2026-01-01T00:00:00Z")
    schedule: Schedule = decode_schedule(json.dumps({**document, **times}).encode(), "a")  # type: ignore[arg-type]
    wish = Wish(schedule=evolve(schedule, backend="cloud"), replace=True)
    assert wish_of(json.loads(json.dumps(wish_document(wish)))) == wish
