"""The run log: what was acknowledged is there, whatever is cut, full, failing or killed."""

import errno
import os
from datetime import timedelta
from pathlib import Path

import orjson
import pytest
import trio
import trio.lowlevel
from attrs import evolve

from hypemand.core.model import Freezer, InstanceId, InstanceState, Outcome, RunFinished, RunStarted, Trigger
from hypemand.core.model import SnapshotKind as Kind
from hypemand.state.codec import Line, encode_line
from hypemand.state.files import Disk
from hypemand.state.runlog import RunLog
from hypemand.state.segments import OLD_SEGMENTS, read_log, segments
from tests.disks import Crash, FaultyDisk, InlineDisk, UnsyncedDisk
from tests.strategies import NOW, WEB

NEWER = orjson.dumps({"event": "paused", "run_id": "run-1", "since": 4}) + b"\n"


def started(number: int, instance: str = WEB) -> RunStarted:
    return RunStarted(
        run_id=f"run-{number}",
        instance_id=InstanceId(instance),
        backend="lab",
        trigger=Trigger.SCHEDULE,
        kind=Kind.STANDBY,
        state_before=InstanceState.RUNNING,
        due_at=NOW,
        next_run_at=NOW + timedelta(hours=1),
        started_at=NOW,
        snapshot_name="scheduled",
        tags={},
        max_freeze_s=30,
        freezes=Freezer.ENGINE,
        boot_id="boot",
        connection={"type": "embedded"},
    )


def finished(number: int, instance: str = WEB) -> RunFinished:
    return RunFinished(
        run_id=f"run-{number}",
        instance_id=InstanceId(instance),
        due_at=NOW,
        started_at=NOW,
        finished_at=NOW + timedelta(minutes=1),
        outcome=Outcome.FAILED,
        error="größer",
    )


def current(state_dir: Path) -> Path:
    return state_dir / "runs.jsonl"


async def opened(state_dir: Path, disk: Disk | None = None, rotate_bytes: int = 1 << 20) -> RunLog:
    log = RunLog(state_dir, disk or InlineDisk(), rotate_bytes=rotate_bytes)
    await log.open()
    return log


def stored(state_dir: Path) -> list[Line]:
    return read_log(state_dir, Disk()).lines


def write(state_dir: Path, *pieces: Line | bytes) -> None:
    data = [piece if isinstance(piece, bytes) else encode_line(piece) for piece in pieces]
    current(state_dir).write_bytes(b"".join(data))


async def test_what_was_appended_is_there_after_a_restart_in_order(tmp_path: Path) -> None:
    log = await opened(tmp_path)
    lines: list[Line] = [started(1), finished(1), started(2, "db"), finished(3)]
    for line in lines:
        await log.append(line)
    assert log.open_runs == (started(2, "db"),)
    log.close()
    again = RunLog(tmp_path, InlineDisk())
    content = await again.open()
    assert content.lines == lines
    assert content.started() == [started(1), started(2, "db")]
    assert content.finished() == [finished(1), finished(3)]
    assert content.finished(InstanceId("db")) == []
    assert content.open_runs() == {"run-2": started(2, "db")}
    assert again.open_runs == (started(2, "db"),)
    assert again.open_run_of(InstanceId("db")) == started(2, "db")
    assert again.open_run_of(WEB) is None
    again.close()


async def test_an_append_is_synced_when_it_returns(tmp_path: Path) -> None:
    disk = FaultyDisk()
    log = await opened(tmp_path, disk)
    for number in range(3):
        disk.forget()
        await log.append(started(number))
        assert disk.order[-1] == ("sync", current(tmp_path).stat().st_size)
        assert stored(tmp_path)[-1] == started(number)
    log.close()


async def test_a_new_log_is_durable_in_its_directory(tmp_path: Path) -> None:
    disk = FaultyDisk()
    log = await opened(tmp_path, disk)
    assert ("sync_directory", tmp_path) in disk.order
    assert current(tmp_path).stat().st_mode & 0o777 == 0o600
    log.close()


async def test_many_appends_at_once_share_their_syncs_and_keep_their_order(tmp_path: Path) -> None:
    disk = FaultyDisk()
    log = await opened(tmp_path, disk)
    disk.forget()
    asked: list[Line] = []

    async def append(number: int) -> None:
        asked.append(finished(number))
        await log.append(finished(number))

    async with trio.open_nursery() as nursery:
        for number in range(100):
            nursery.start_soon(append, number)
    assert stored(tmp_path) == asked
    assert len(asked) == 100
    assert 1 <= disk.calls["sync"] <= 5
    log.close()


async def test_appends_that_wait_are_let_go_together_however_many(tmp_path: Path) -> None:
    log = await opened(tmp_path)
    turns = 0
    async with trio.open_nursery() as watching:

        async def count() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        async with trio.open_nursery() as appending:
            for number in range(200):
                appending.start_soon(log.append, started(number))
            watching.start_soon(count)
        watching.cancel_scope.cancel()
    assert len(log.open_runs) == 200
    assert 0 < turns < 20
    log.close()


async def test_a_bug_in_a_write_fails_every_append_of_its_batch_and_no_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = await opened(tmp_path)
    told: list[str] = []

    async def append(number: int) -> None:
        try:
            await log.append(started(number))
        except (OSError, RuntimeError) as error:
            told.append(type(error).__name__)

    def buggy(data: bytes) -> None:
        raise RuntimeError(data)

    monkeypatch.setattr(log, "_write", buggy)
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(append, number)
    monkeypatch.undo()
    await log.append(started(7))
    assert sorted(told) == ["OSError", "OSError", "RuntimeError"]
    assert stored(tmp_path) == [started(7)]
    log.close()


async def test_appends_from_many_tasks_on_a_real_disk_are_all_there(tmp_path: Path) -> None:
    log = await opened(tmp_path, Disk(), rotate_bytes=20_000)
    async with trio.open_nursery() as nursery:
        for number in range(100):
            nursery.start_soon(log.append, finished(number))
    log.close()
    assert {line.run_id for line in stored(tmp_path)} == {f"run-{number}" for number in range(100)}


async def test_a_torn_end_is_cut_at_whatever_byte_and_everything_acknowledged_survives(tmp_path: Path) -> None:
    acknowledged: list[Line] = [started(1), finished(1), started(2)]
    last_write: list[Line] = [finished(2), started(3, "db"), finished(4)]
    whole = b"".join(map(encode_line, acknowledged))
    batch = b"".join(map(encode_line, last_write))
    for cut in range(len(batch)):
        write(tmp_path, whole, batch[:cut])
        log = RunLog(tmp_path, UnsyncedDisk())
        content = await log.open()
        ends = [line for number, line in enumerate(last_write, 1) if batch[:cut].count(b"\n") >= number]
        assert content.lines == acknowledged + ends
        assert not content.damaged
        await log.append(finished(9))
        assert stored(tmp_path) == [*acknowledged, *ends, finished(9)]
        log.close()


@pytest.mark.parametrize(
    "tail", [bytes(1), bytes(4096), b"\n", bytes(10) + b"\n" + bytes(10), b'{"event"\n', b"\xff\n"]
)
async def test_a_tail_that_never_reached_the_disk_is_cut(tmp_path: Path, tail: bytes) -> None:
    write(tmp_path, started(1), tail)
    log = RunLog(tmp_path, InlineDisk())
    content = await log.open()
    assert content.torn_bytes == len(tail)
    assert content.lines == [started(1)]
    await log.append(finished(1))
    assert current(tmp_path).read_bytes() == encode_line(started(1)) + encode_line(finished(1))
    log.close()


@pytest.mark.parametrize("content", [b"", b"\n", bytes(100), b"{"])
async def test_a_log_without_a_whole_line_is_an_empty_one(tmp_path: Path, content: bytes) -> None:
    write(tmp_path, content)
    log = await opened(tmp_path)
    await log.append(started(1))
    assert stored(tmp_path) == [started(1)]
    log.close()


async def test_reading_changes_nothing(tmp_path: Path) -> None:
    write(tmp_path, started(1), b"torn")
    before = current(tmp_path).read_bytes()
    assert read_log(tmp_path, Disk()).torn_bytes == 4
    assert current(tmp_path).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["runs.jsonl"]
    assert read_log(tmp_path / "nowhere", Disk()).lines == []


DAMAGED = [bytes(50) + b"\n", b"\n", b"garbage\n", encode_line(started(7))[20:], b'{"event":"started"}\n', b"[1]\n"]


@pytest.mark.parametrize("damaged", DAMAGED)
async def test_a_damaged_line_in_the_middle_is_passed_over_reported_and_kept(tmp_path: Path, damaged: bytes) -> None:
    write(tmp_path, started(1), damaged, finished(1))
    before = current(tmp_path).read_bytes()
    log = RunLog(tmp_path, InlineDisk())
    content = await log.open()
    assert content.lines == [started(1), finished(1)]
    assert content.torn_bytes == 0
    [place] = content.damaged
    assert place.startswith("runs.jsonl:2: ")
    await log.append(started(2))
    assert current(tmp_path).read_bytes() == before + encode_line(started(2))
    log.close()


async def test_a_line_of_a_newer_version_is_not_cut_also_at_the_end(tmp_path: Path) -> None:
    write(tmp_path, started(1), NEWER)
    log = RunLog(tmp_path, InlineDisk())
    content = await log.open()
    assert content.torn_bytes == 0
    assert len(content.damaged) == 1
    await log.append(finished(1))
    assert current(tmp_path).read_bytes() == encode_line(started(1)) + NEWER + encode_line(finished(1))
    log.close()


async def test_an_unreadable_segment_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    write(tmp_path, started(1), b"torn")
    before = current(tmp_path).read_bytes()
    disk = FaultyDisk()
    disk.fail("read")
    with pytest.raises(OSError, match="Input/output"):
        await opened(tmp_path, disk)
    assert current(tmp_path).read_bytes() == before


@pytest.mark.trio
async def test_a_line_whose_sync_failed_in_another_process_is_written_again(tmp_path: Path) -> None:
    """After a failed sync the kernel calls the pages clean: a later one would succeed without them."""
    log = await opened(tmp_path)
    await log.append(started(1))
    log.close()
    whole = current(tmp_path).read_bytes()
    disk = FaultyDisk()
    disk.fail("sync")
    with pytest.raises(OSError, match="Input/output"):
        await opened(tmp_path, disk)
    disk.heal()
    disk.forget()
    log = await opened(tmp_path, disk)
    log.close()
    steps = [step for step, _ in disk.order]
    assert steps.index("write_again") < steps.index("sync")
    assert disk.order[-1] == ("sync", len(whole))
    assert current(tmp_path).read_bytes() == whole


@pytest.mark.trio
async def test_a_full_disk_that_copies_on_write_does_not_keep_the_log_shut(tmp_path: Path) -> None:
    log = await opened(tmp_path)
    await log.append(started(1))
    log.close()
    disk = FaultyDisk()
    disk.fail("write_again", errno.ENOSPC)
    log = await opened(tmp_path, disk)
    assert [run.run_id for run in log.open_runs] == ["run-1"]
    log.close()
    disk.fail("write_again", errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        await opened(tmp_path, disk)


@pytest.mark.parametrize("step", ["write", "sync"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("after", [0, 1, 100])
@pytest.mark.parametrize("cannot_cut", [False, True])
async def test_a_failed_append_is_cut_off_again_and_the_next_one_works(
    tmp_path: Path,
    step: str,
    error: int,
    after: int,
    cannot_cut: bool,
) -> None:
    disk = FaultyDisk()
    log = await opened(tmp_path, disk)
    await log.append(started(1))
    disk.fail(step, error, after=after)
    if cannot_cut:
        disk.fail("truncate")
    for _ in range(2):
        with pytest.raises(OSError, match=os.strerror(error)) as caught:
            await log.append(finished(1))
        assert caught.value.errno in (error, errno.EIO)
        if not cannot_cut:
            assert current(tmp_path).read_bytes() == encode_line(started(1))
        disk.heal("truncate")
        disk.fail(step, error, after=after)
    assert log.open_runs == (started(1),)
    disk.heal()
    await log.append(started(2))
    assert current(tmp_path).read_bytes() == encode_line(started(1)) + encode_line(started(2))
    log.close()


async def test_every_append_of_a_failed_batch_gets_the_error_and_later_ones_do_not(tmp_path: Path) -> None:
    disk = FaultyDisk()
    log = await opened(tmp_path, disk)
    errors: list[OSError] = []
    written: list[Line] = []

    async def append(number: int) -> None:
        try:
            await log.append(finished(number))
        except OSError as error:
            errors.append(error)
        else:
            written.append(finished(number))

    disk.fail("write", errno.ENOSPC, once=True, after=300)
    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(append, number)
    assert len(errors) >= 2
    assert len({id(error) for error in errors}) == len(errors)
    assert all(error.errno == errno.ENOSPC for error in errors)
    assert len(errors) + len(written) == 20
    assert {line.run_id for line in stored(tmp_path)} == {line.run_id for line in written}
    await log.append(started(1))
    assert stored(tmp_path)[-1] == started(1)
    log.close()


async def test_a_cancelled_append_is_still_written(tmp_path: Path) -> None:
    log = await opened(tmp_path)
    with trio.CancelScope() as scope:
        scope.cancel()
        await log.append(started(1))
    assert stored(tmp_path) == [started(1)]
    assert log.open_runs == (started(1),)
    log.close()


async def test_appends_waiting_for_their_turn_are_written_when_they_are_cancelled(tmp_path: Path) -> None:
    log = await opened(tmp_path, Disk())
    async with trio.open_nursery() as nursery:
        for number in range(10):
            nursery.start_soon(log.append, finished(number))
        await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert len(stored(tmp_path)) == 10
    log.close()


async def test_texts_that_are_not_utf_8_do_not_keep_a_line_out(tmp_path: Path) -> None:
    log = await opened(tmp_path)
    await log.append(evolve(finished(1), error="a/\udcff"))
    [line] = read_log(tmp_path, Disk()).finished()
    assert line.error == "a/\\udcff"
    log.close()


async def test_an_append_after_close_works(tmp_path: Path) -> None:
    log = await opened(tmp_path)
    await log.append(started(1))
    log.close()
    log.close()
    await log.append(finished(1))
    assert not read_log(tmp_path, Disk()).open_runs()
    log.close()


@pytest.mark.parametrize("size", [0, 1, 200])
async def test_a_log_that_somebody_emptied_goes_on_without_a_gap(tmp_path: Path, size: int) -> None:
    log = await opened(tmp_path)
    for number in range(3):
        await log.append(finished(number))
    os.truncate(current(tmp_path), size)
    await log.append(finished(9))
    assert b"\0" not in current(tmp_path).read_bytes()
    if size == 0:
        assert stored(tmp_path) == [finished(9)]
    log.close()


async def test_a_log_that_somebody_moved_away_begins_anew_with_its_open_runs(tmp_path: Path) -> None:
    log = await opened(tmp_path)
    await log.append(started(1))
    await log.append(finished(2))
    current(tmp_path).rename(tmp_path / "moved")
    await log.append(finished(3))
    assert stored(tmp_path) == [started(1), finished(3)]
    current(tmp_path).unlink()
    await log.append(finished(1))
    assert not read_log(tmp_path, Disk()).open_runs()
    log.close()


async def test_rotation_carries_open_runs_over_and_keeps_so_many_segments(tmp_path: Path) -> None:
    log = await opened(tmp_path, UnsyncedDisk(), rotate_bytes=3000)
    await log.append(started(1000, "db"))
    for number in range(100):
        await log.append(started(number))
        await log.append(finished(number))
    log.close()
    content = read_log(tmp_path, Disk())
    assert not content.damaged
    assert content.open_runs() == {"run-1000": started(1000, "db")}
    assert all(path.exists() for path in segments(tmp_path))
    assert len(list(tmp_path.iterdir())) == OLD_SEGMENTS + 1
    pairs = [line for number in range(100) for line in (started(number), finished(number))]
    runs = [line for line in content.lines if line.run_id != "run-1000"]
    if isinstance(runs[0], RunFinished):
        pairs = [line for line in pairs if line.run_id != runs[0].run_id or isinstance(line, RunFinished)]
    assert 10 < len(runs) < 200
    assert runs == pairs[-len(runs) :]
    assert content.lines.count(started(1000, "db")) == 1


async def test_a_rotation_lasts(tmp_path: Path) -> None:
    disk = FaultyDisk()
    log = await opened(tmp_path, disk, rotate_bytes=1)
    disk.forget()
    await log.append(started(1))
    assert (tmp_path / "runs.jsonl.1").exists()
    after_the_last_rename = disk.order[max(n for n, (what, _) in enumerate(disk.order) if what == "rename") :]
    assert ("sync_directory", tmp_path) in after_the_last_rename
    log.close()


STEPS = ["replace", "write", "sync", "rename", "sync_directory", "open_append"]


def check_kept(state_dir: Path, acknowledged: list[Line], open_ids: set[str]) -> None:
    content = read_log(state_dir, Disk())
    assert not content.damaged
    missing = [line for line in acknowledged if line not in content.lines]
    assert missing == []
    assert content.open_runs().keys() >= open_ids
    assert len(content.lines) == len({encode_line(line) for line in content.lines})


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("once", [True, False])
async def test_a_rotation_that_fails_at_any_step_loses_nothing_and_the_log_grows_on(
    tmp_path: Path,
    step: str,
    once: bool,
) -> None:
    for skip in range(8):
        state_dir = tmp_path / str(skip)
        state_dir.mkdir()
        disk = FaultyDisk()
        log = await opened(state_dir, disk, rotate_bytes=2000)
        acknowledged: list[Line] = []
        await log.append(started(0, "db"))
        acknowledged.append(started(0, "db"))
        disk.fail(step, errno.EIO, once=once, skip=skip)
        for number in range(1, 14):
            try:
                await log.append(finished(number))
            except OSError:
                continue
            acknowledged.append(finished(number))
        check_kept(state_dir, acknowledged, {"run-0"})
        disk.heal()
        await log.append(finished(99))
        check_kept(state_dir, [*acknowledged, finished(99)], {"run-0"})
        log.close()
        again = await opened(state_dir)
        assert again.open_runs == (started(0, "db"),)
        again.close()
        if step in ("replace", "rename", "open_append"):
            assert len(acknowledged) == 14  # a rotation that can't be done is nobody's failed append


@pytest.mark.parametrize("step", STEPS)
async def test_a_death_at_any_step_of_a_rotation_loses_nothing(tmp_path: Path, step: str) -> None:
    died = 0
    for skip in range(40):
        state_dir = tmp_path / str(skip)
        state_dir.mkdir()
        disk = FaultyDisk()
        log = await opened(state_dir, disk, rotate_bytes=2000)
        acknowledged: list[Line] = []
        disk.fail(step, Crash(), skip=skip)
        try:
            for number in range(8):
                line = finished(number) if number else started(0, "db")
                await log.append(line)
                acknowledged.append(line)
        except Crash:
            died += 1
        log.close()
        check_kept(state_dir, acknowledged, {"run-0"} if acknowledged else set())
        again = await opened(state_dir, rotate_bytes=2000)
        for number in range(20, 26):
            await again.append(finished(number))
            acknowledged.append(finished(number))
        check_kept(state_dir, acknowledged, {"run-0"} if acknowledged[0] == started(0, "db") else set())
        again.close()
    assert died


async def test_a_crash_between_the_renames_loses_no_open_run(tmp_path: Path) -> None:
    write(tmp_path, started(1), started(2, "db"), finished(1))
    current(tmp_path).rename(tmp_path / "runs.jsonl.1")
    (tmp_path / "runs.jsonl.new").write_bytes(encode_line(started(2, "db")))
    log = await opened(tmp_path, rotate_bytes=700)
    assert log.open_runs == (started(2, "db"),)
    await log.append(started(3))
    for number in range(10, 20):
        await log.append(finished(number))
    log.close()
    assert read_log(tmp_path, Disk()).open_runs().keys() == {"run-2", "run-3"}
