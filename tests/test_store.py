"""The schedules' files: nothing valid is lost, nothing invalid is overwritten, one bad file stops no other."""

import errno
import os
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, TypeVarTuple

import orjson
import pytest
import trio
from attrs import evolve
from hypothesis import given

from hypemand.core.model import InstanceId, ManagedBy, Retention, Schedule, Settings
from hypemand.state.codec import NewerFormatError, encode_schedule
from hypemand.state.files import Disk
from hypemand.state.scan import quarantine_notes, scan_schedules
from hypemand.state.store import Store
from tests.disks import FaultyDisk, InlineDisk, LateDisk, UnsyncedDisk
from tests.strategies import NOW, WEB, schedules

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

HYPEMANS = b"""{
  "instance_id": "web-1",
  "interval": "24h0m0s",
  "retention": {"max_count": 7, "max_age": "168h0m0s"},
  "created_at": "2026-03-01T00:59:59.987654321Z",
  "updated_at": "2026-03-02T00:00:00Z",
  "next_run_at": "2026-03-09T01:00:00.123456789Z",
  "last_run_at": "2026-03-08T02:00:00.5+01:00",
  "last_snapshot_id": "abc123",
  "metadata": {"team": "backend"},
  "name_prefix": "nightly",
  "kind": "Standby"
}
"""
DB, MAIL = InstanceId("db"), InstanceId("mail")


def schedule(instance: str = WEB, **changes: Any) -> Schedule:
    made = Schedule(
        instance_id=InstanceId(instance),
        interval=timedelta(hours=24),
        retention=Retention(max_count=7),
        created_at=NOW,
        updated_at=NOW,
        next_run_at=NOW + timedelta(hours=1),
        backend="lab",
    )
    return evolve(made, **changes)


def new_store(state_dir: Path, disk: Disk | None = None) -> Store:
    return Store(state_dir, disk or InlineDisk(), lambda: NOW)


async def loaded(state_dir: Path, disk: Disk | None = None) -> Store:
    store = new_store(state_dir, disk)
    await store.load()
    return store


def write(state_dir: Path, name: str, content: bytes) -> Path:
    path = state_dir / "schedules" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def write_schedule(state_dir: Path, made: Schedule) -> Path:
    return write(state_dir, f"{made.instance_id}.json", encode_schedule(made))


def in_quarantine(state_dir: Path) -> dict[str, bytes]:
    """Content by the name that the file had."""
    kept = [path for path in (state_dir / "quarantine").iterdir() if path.suffix != ".note"]
    return {path.name.rpartition(".")[0]: path.read_bytes() for path in kept}


def tree(directory: Path) -> dict[str, tuple[int, int, bytes]]:
    """Everything below *directory* with its mode, time of change and content."""
    found = {}
    for path in [directory, *directory.rglob("*")]:
        status = path.stat()
        content = b"" if path.is_dir() else path.read_bytes()
        found[str(path)] = (status.st_mode, status.st_mtime_ns, content)
    return found


@given(schedules())
async def test_a_schedule_is_the_same_after_a_restart(made: Schedule) -> None:
    made = evolve(made, extra={key: value for key, value in made.extra.items() if key != "format"})
    with TemporaryDirectory() as state_dir:
        store = await loaded(Path(state_dir), UnsyncedDisk())
        await store.put(made)
        again = await loaded(Path(state_dir), UnsyncedDisk())
        assert again.schedules == {made.instance_id: made}
        assert not again.unsaved


async def test_unknown_keys_at_each_level_survive_a_rewrite(tmp_path: Path) -> None:
    document = orjson.loads(encode_schedule(schedule()))
    document["later"] = {"deep": [1, None, {"er": 1.5}]}
    document["retention"]["keep_weekly"] = 4
    document["settings"] = {"enabled": False, "priority": "high"}
    path = write(tmp_path, "web-1.json", orjson.dumps(document))
    store = await loaded(tmp_path)
    await store.put(evolve(store.schedules[WEB], last_error="disk full"))
    rewritten = orjson.loads(path.read_bytes())
    assert rewritten["last_error"] == "disk full"
    assert rewritten["later"] == {"deep": [1, None, {"er": 1.5}]}
    assert rewritten["retention"] == {"max_count": 7, "keep_weekly": 4}
    assert rewritten["settings"] == {"enabled": False, "priority": "high"}


async def test_a_file_that_hypeman_wrote_loads_as_it_is(tmp_path: Path) -> None:
    path = write(tmp_path, "web-1.json", HYPEMANS)
    store = await loaded(tmp_path)
    assert path.read_bytes() == HYPEMANS
    assert store.schedules[WEB] == Schedule(
        instance_id=WEB,
        interval=timedelta(hours=24),
        retention=Retention(timedelta(hours=168), 7),
        created_at=datetime(2026, 3, 1, 0, 59, 59, 987654, UTC),
        updated_at=datetime(2026, 3, 2, tzinfo=UTC),
        next_run_at=datetime(2026, 3, 9, 1, 0, 0, 123456, UTC),
        last_run_at=datetime(2026, 3, 8, 1, 0, 0, 500000, UTC),
        last_snapshot_id="abc123",
        metadata={"team": "backend"},
        name_prefix="nightly",
        managed_by=ManagedBy.API,
        settings=Settings(),
        extra={"kind": "Standby"},
    )
    await store.put(store.schedules[WEB])
    assert orjson.loads(path.read_bytes())["kind"] == "Standby"
    assert (await loaded(tmp_path)).schedules == store.schedules


async def test_a_time_at_the_end_of_time_loads(tmp_path: Path) -> None:
    content = HYPEMANS.replace(b"2026-03-09T01:00:00.123456789Z", b"9999-12-31T23:59:59.999999999Z")
    write(tmp_path, "web-1.json", content)
    store = await loaded(tmp_path)
    assert store.schedules[WEB].next_run_at.year == 9999
    await store.put(store.schedules[WEB])
    assert (await loaded(tmp_path)).schedules == store.schedules


async def test_a_file_cut_off_at_any_byte_is_set_aside_whole_and_all_others_load(tmp_path: Path) -> None:
    whole = {}
    for cut in range(len(HYPEMANS)):
        content = HYPEMANS.replace(b"web-1", f"i{cut:04}".encode())
        whole[f"i{cut:04}.json"] = content
        write(tmp_path, f"i{cut:04}.json", content[:cut])
    write_schedule(tmp_path, schedule(DB))
    write(tmp_path, "web-1.json", HYPEMANS)
    store = await loaded(tmp_path, UnsyncedDisk())
    but_its_newline = InstanceId(f"i{len(HYPEMANS) - 1:04}")
    assert store.schedules.keys() == {WEB, DB, but_its_newline}
    aside = in_quarantine(tmp_path)
    del whole[f"{but_its_newline}.json"]
    assert aside == {name: content[: int(name[1:5])] for name, content in whole.items()}


def changed(**values: Any) -> bytes:
    return orjson.dumps({**orjson.loads(HYPEMANS), **values})


def without(key: str) -> bytes:
    return orjson.dumps({name: value for name, value in orjson.loads(HYPEMANS).items() if name != key})


BAD = {
    "empty": (b"", "is empty"),
    "blank": (b" \n\n", "is empty"),
    "zeros": (bytes(4096), "not JSON"),
    "no object": (b'["web-1"]', "JSON object"),
    "null": (b"null", "JSON object"),
    "not UTF-8": (HYPEMANS.replace(b"nightly", b"n\xffghtly"), "not JSON"),
    "half a surrogate": (HYPEMANS.replace(b"nightly", b"\\ud800"), "not JSON"),
    "two documents": (HYPEMANS + HYPEMANS, "not JSON"),
    "too deep": (b"[" * 100_000, "not JSON"),
    "another's": (changed(instance_id="web-2"), "web-2"),
    "a path as id": (changed(instance_id="../web-1"), "instance_id"),
    "interval too short": (changed(interval="59s"), "at least 1m"),
    "interval a number": (changed(interval=86400), "interval"),
    "retention a list": (changed(retention=[7]), "retention"),
    "max_count true": (changed(retention={"max_count": True}), "retention.max_count"),
    "no offset": (changed(next_run_at="2026-03-09T01:00:00"), "next_run_at"),
    "year 10000": (changed(next_run_at="10000-01-01T00:00:00Z"), "next_run_at"),
    "beyond year 9999 in UTC": (changed(next_run_at="9999-12-31T23:59:59-01:00"), "next_run_at"),
    "metadata a number": (changed(metadata={"team": 1}), "metadata.team"),
    "format a text": (changed(format="2"), "format"),
    "format true": (changed(format=True), "format"),
    "format null": (changed(format=None), "format"),
    "format zero": (changed(format=0), "format"),
    "managed_by unknown": (changed(managed_by="me"), "managed_by"),
    **{
        f"no {key}": (without(key), key)
        for key in ("instance_id", "interval", "retention", "created_at", "updated_at", "next_run_at")
    },
}


@pytest.mark.parametrize("case", BAD)
async def test_invalid_content_is_set_aside_byte_for_byte_with_the_reason(tmp_path: Path, case: str) -> None:
    content, reason = BAD[case]
    path = write(tmp_path, "web-1.json", content)
    write_schedule(tmp_path, schedule(DB))
    store = await loaded(tmp_path)
    assert store.schedules == {DB: schedule(DB)}
    assert not path.exists()
    assert in_quarantine(tmp_path) == {"web-1.json": content}
    [note] = quarantine_notes(tmp_path)
    assert note.startswith("web-1.json: ")
    assert reason in note
    assert store.set_aside == {WEB}
    assert not store.unreadable


@pytest.mark.parametrize(
    "name",
    [
        ".json.json",
        "with space.json",
        "schön.json",
        "a" * 129 + ".json",
        os.fsdecode(b"\xff.json"),
        "a\nb.json",
        "*.json",
    ],
)
async def test_a_file_with_a_bad_name_is_set_aside(tmp_path: Path, name: str) -> None:
    hidden = name.startswith(".")
    path = write(tmp_path, name, HYPEMANS)
    write_schedule(tmp_path, schedule(DB))
    store = await loaded(tmp_path)
    assert store.schedules.keys() == {DB}
    assert path.exists() == hidden
    assert in_quarantine(tmp_path) == ({} if hidden else {name: HYPEMANS})


async def test_the_longest_name_still_has_room_in_the_quarantine(tmp_path: Path) -> None:
    write(tmp_path, "i" * 128 + ".json", b"{")
    await loaded(tmp_path)
    assert in_quarantine(tmp_path) == {"i" * 128 + ".json": b"{"}


async def test_a_name_without_room_in_the_quarantine_stays_and_stops_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, "i" * 250 + ".json", b"{")
    write_schedule(tmp_path, schedule(DB))
    store = await loaded(tmp_path)
    assert store.schedules.keys() == {DB}
    assert path.read_bytes() == b"{"
    assert [bad.path for bad in store.unreadable] == [path]


async def test_other_files_in_the_directory_are_left_alone(tmp_path: Path) -> None:
    kept = [write(tmp_path, name, b"{") for name in ("README", "web-1.json.bak", "web-1.json~", ".hidden.json")]
    await loaded(tmp_path)
    assert all(path.read_bytes() == b"{" for path in kept)


async def test_a_file_that_cannot_be_read_stays_and_loads_once_it_can(tmp_path: Path) -> None:
    path = write(tmp_path, "web-1.json", HYPEMANS)
    write_schedule(tmp_path, schedule(DB))
    disk = FaultyDisk()
    disk.fail("read", errno.EIO, name="web-1.json")
    store = await loaded(tmp_path, disk)
    assert store.schedules.keys() == {DB}
    assert [bad.path for bad in store.unreadable] == [path]
    assert not in_quarantine(tmp_path)
    assert await store.reread() == frozenset()
    assert [bad.path for bad in store.unreadable] == [path]
    disk.heal("read")
    assert await store.reread() == {WEB}
    assert store.schedules[WEB].last_snapshot_id == "abc123"
    assert not store.unreadable
    assert path.read_bytes() == HYPEMANS


async def test_what_cannot_be_read_is_not_overwritten_by_a_new_schedule_either(tmp_path: Path) -> None:
    path = write(tmp_path, "web-1.json", HYPEMANS)
    disk = FaultyDisk()
    disk.fail("read", errno.EIO, name="web-1.json")
    store = await loaded(tmp_path, disk)
    with pytest.raises(OSError, match="not overwritten"):
        await store.put(schedule())
    assert store.schedules == {WEB: schedule()}
    with pytest.raises(OSError, match="not overwritten"):
        await store.save_unsaved()
    assert path.read_bytes() == HYPEMANS
    disk.heal()
    assert await store.reread() == {WEB}
    assert store.schedules[WEB].last_snapshot_id == "abc123"
    assert not store.unsaved
    await store.put(evolve(store.schedules[WEB], last_error="x"))
    assert orjson.loads(path.read_bytes())["last_error"] == "x"


async def test_a_directory_in_the_place_of_a_file_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "schedules" / "web-1.json").mkdir(parents=True)
    write_schedule(tmp_path, schedule(DB))
    store = await loaded(tmp_path)
    assert store.schedules.keys() == {DB}
    assert (tmp_path / "schedules" / "web-1.json").is_dir()


async def test_an_invalid_file_that_cannot_be_set_aside_is_not_overwritten(tmp_path: Path) -> None:
    path = write(tmp_path, "web-1.json", b"{")
    disk = FaultyDisk()
    disk.fail("write", errno.ENOSPC)
    store = await loaded(tmp_path, disk)
    assert path.read_bytes() == b"{"
    assert not store.set_aside
    disk.heal("write")
    with pytest.raises(OSError, match="not overwritten"):
        await store.put(schedule())
    assert path.read_bytes() == b"{"
    assert await store.reread() == frozenset()
    assert in_quarantine(tmp_path) == {"web-1.json": b"{"}
    assert (await loaded(tmp_path)).schedules == {WEB: schedule()}


async def test_a_newer_format_is_refused_and_nothing_is_touched(tmp_path: Path) -> None:
    write(tmp_path, "web-1.json", changed(format=2, interval="whatever comes"))
    write(tmp_path, "db.json", b"{")
    write(tmp_path, ".db.json.tmp", b"half")
    write_schedule(tmp_path, schedule(MAIL))
    before = tree(tmp_path)
    with pytest.raises(NewerFormatError) as caught:
        await loaded(tmp_path)
    assert "web-1.json" in str(caught.value)
    assert "format 2" in str(caught.value)
    assert "use a newer hypemand" in str(caught.value)
    assert tree(tmp_path) == before


async def test_a_newer_format_that_appears_later_is_neither_loaded_nor_overwritten(tmp_path: Path) -> None:
    store = await loaded(tmp_path)
    await store.put(schedule())
    newer = changed(format=2)
    path = write(tmp_path, "web-1.json", newer)
    assert await store.reread() == frozenset()
    with pytest.raises(OSError, match="not overwritten"):
        await store.put(schedule(last_error="x"))
    assert path.read_bytes() == newer
    assert store.schedules[WEB].last_error == "x"


async def test_loading_makes_the_directories_and_removes_leftover_temporaries(tmp_path: Path) -> None:
    await loaded(tmp_path / "state")
    folders = {path.name: path for path in (tmp_path / "state").rglob("*")}
    assert folders.keys() == {"schedules", "retired", "quarantine"}
    leftovers = [folder / ".web-1.json.tmp" for folder in folders.values()]
    for leftover in leftovers:
        leftover.write_bytes(b"half")
    await loaded(tmp_path / "state")
    assert not any(leftover.exists() for leftover in leftovers)


async def test_a_directory_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    disk = FaultyDisk()
    disk.fail("make_directory", errno.EROFS)
    with pytest.raises(OSError, match="Read-only"):
        await loaded(tmp_path / "state", disk)


@pytest.mark.parametrize("step", ["write", "sync", "rename", "sync_directory", "replace"])
async def test_a_put_that_fails_is_in_force_and_written_later(tmp_path: Path, step: str) -> None:
    disk = FaultyDisk()
    store = await loaded(tmp_path, disk)
    await store.put(schedule())
    disk.fail(step, errno.ENOSPC, after=10)
    with pytest.raises(OSError, match="No space left"):
        await store.put(schedule(last_error="new"))
    assert store.schedules[WEB].last_error == "new"
    assert store.unsaved == {WEB}
    on_disk = await loaded(tmp_path)
    assert on_disk.schedules[WEB].last_error == ("new" if step == "sync_directory" else None)
    assert not on_disk.set_aside
    with pytest.raises(OSError, match="No space left"):
        await store.save_unsaved()
    disk.heal()
    await store.save_unsaved()
    assert not store.unsaved
    assert (await loaded(tmp_path)).schedules[WEB].last_error == "new"
    assert await store.reread() == frozenset()


async def test_one_schedule_that_cannot_be_written_keeps_no_other_from_being_written(tmp_path: Path) -> None:
    disk = FaultyDisk()
    store = await loaded(tmp_path, disk)
    for name in (DB, MAIL, WEB):
        store.hold(schedule(name))
    disk.fail("replace", errno.ENOSPC, name="db.json")
    with pytest.raises(OSError, match="No space left"):
        await store.save_unsaved()
    assert store.unsaved == {DB}
    assert (await loaded(tmp_path)).schedules.keys() == {MAIL, WEB}


async def test_what_is_held_is_in_force_at_once_and_written_by_save_unsaved(tmp_path: Path) -> None:
    disk = FaultyDisk()
    store = await loaded(tmp_path, disk)
    store.hold(schedule())
    assert store.schedules == {WEB: schedule()}
    assert disk.calls["replace"] == 0
    await store.save_unsaved()
    await store.save_unsaved()
    assert disk.calls["replace"] == 1
    assert (await loaded(tmp_path)).schedules == {WEB: schedule()}


async def test_concurrent_puts_of_one_instance_end_with_the_last(tmp_path: Path) -> None:
    store = await loaded(tmp_path, Disk())
    versions = [schedule(last_error=f"version {number}") for number in range(30)]
    last: list[Schedule] = []

    async def put(version: Schedule) -> None:
        last[:] = [version]
        await store.put(version)

    async with trio.open_nursery() as nursery:
        for version in versions:
            nursery.start_soon(put, version)
            nursery.start_soon(store.put, schedule(DB))
    assert store.schedules[WEB] == last[0]
    assert not store.unsaved
    assert (await loaded(tmp_path)).schedules == {WEB: last[0], DB: schedule(DB)}


async def test_a_put_overtaken_by_a_later_one_is_durable_when_it_returns(tmp_path: Path) -> None:
    disk = LateDisk()
    store = await loaded(tmp_path, disk)
    disk.gate = gate = trio.Event()
    returned: list[str | None] = []

    async def put(version: Schedule) -> None:
        await store.put(version)
        returned.append(orjson.loads((store.directory / "web-1.json").read_bytes()).get("last_error"))

    async with trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(put, schedule(last_error=f"version {number}"))
            await trio.testing.wait_all_tasks_blocked()
        gate.set()
    assert returned in (["version 2"] * 3, ["version 0", "version 2", "version 2"])


async def test_a_cancelled_put_is_written_later(tmp_path: Path) -> None:
    store = await loaded(tmp_path)
    with trio.CancelScope() as scope:
        scope.cancel()
        await store.put(schedule())
    assert scope.cancelled_caught
    assert store.schedules == {WEB: schedule()}
    await store.save_unsaved()
    assert (await loaded(tmp_path)).schedules == {WEB: schedule()}


@pytest.mark.parametrize("instance", ["../x", "a/b", ".hidden", "", "i" * 129, "a\0b"])
async def test_an_id_that_is_no_file_name_is_refused_before_it_becomes_a_path(tmp_path: Path, instance: str) -> None:
    store = await loaded(tmp_path / "state")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="1 to 128"):
        await store.put(schedule(instance))
    with pytest.raises(ValueError, match="1 to 128"):
        await store.read_retired(InstanceId(instance))
    assert not store.schedules
    assert tree(tmp_path) == before


async def test_a_schedule_that_is_removed_is_gone_with_its_file(tmp_path: Path) -> None:
    store = await loaded(tmp_path)
    await store.put(schedule())
    await store.remove(WEB)
    await store.remove(WEB)
    assert not store.schedules
    assert not (await loaded(tmp_path)).schedules


async def test_a_schedule_removed_while_it_is_written_stays_removed(tmp_path: Path) -> None:
    disk = LateDisk()
    store = await loaded(tmp_path, disk)
    disk.gate = gate = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.put, schedule())
        await trio.testing.wait_all_tasks_blocked()
        disk.gate = None
        nursery.start_soon(store.remove, WEB)
        await trio.testing.wait_all_tasks_blocked()
        gate.set()
    assert not store.schedules
    assert not list(store.directory.glob("*.json"))
    await store.save_unsaved()
    assert await store.reread() == frozenset()
    assert not list(store.directory.glob("*.json"))


async def test_a_retired_schedule_is_out_of_force_and_can_be_read(tmp_path: Path) -> None:
    store = await loaded(tmp_path)
    await store.put(schedule(last_error="x"))
    await store.retire(WEB)
    assert not store.schedules
    again = await loaded(tmp_path)
    assert not again.schedules
    assert await again.read_retired(WEB) == schedule(last_error="x")
    assert await again.all_retired() == [schedule(last_error="x")]
    await again.forget_retired(WEB)
    assert await again.read_retired(WEB) is None
    assert await again.all_retired() == []
    await again.forget_retired(WEB)


async def test_a_schedule_retired_while_it_is_written_is_in_force_again_once_its_file_is_moved_back(
    tmp_path: Path,
) -> None:
    disk = LateDisk()
    store = await loaded(tmp_path, disk)
    disk.gate = gate = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.put, schedule())
        await trio.testing.wait_all_tasks_blocked()
        disk.gate = None
        nursery.start_soon(store.retire, WEB)
        await trio.testing.wait_all_tasks_blocked()
        gate.set()
    assert not store.schedules
    (store.retired_directory / "web-1.json").rename(store.directory / "web-1.json")
    assert await store.reread() == {WEB}
    assert store.schedules == {WEB: schedule()}


async def test_retiring_keeps_also_what_could_not_be_written_before(tmp_path: Path) -> None:
    disk = FaultyDisk()
    store = await loaded(tmp_path, disk)
    await store.put(schedule())
    disk.fail("write", errno.ENOSPC)
    with pytest.raises(OSError, match="No space left"):
        await store.put(schedule(last_error="new"))
    with pytest.raises(OSError, match="No space left"):
        await store.put(schedule(DB))
    disk.heal()
    await store.retire(WEB)
    await store.retire(DB)
    again = await loaded(tmp_path)
    assert not again.schedules
    assert await again.all_retired() == [schedule(DB), schedule(last_error="new")]


@pytest.mark.parametrize("content", [b"{", changed(format=2), changed(instance_id="db")])
async def test_a_retired_file_that_cannot_be_read_starts_anew_and_is_never_overwritten(
    tmp_path: Path, content: bytes
) -> None:
    path = write(tmp_path, "retired/web-1.json", content)
    store = await loaded(tmp_path)
    assert await store.read_retired(WEB) is None
    assert await store.all_retired() == []
    assert path.read_bytes() == content
    await store.put(schedule())
    await store.retire(WEB)
    assert await store.read_retired(WEB) == schedule()
    assert in_quarantine(tmp_path) == {"web-1.json": content}


async def test_an_edit_by_hand_is_taken_in(tmp_path: Path) -> None:
    store = await loaded(tmp_path)
    for name in (WEB, DB):
        await store.put(schedule(name))
    write_schedule(tmp_path, schedule(interval=timedelta(hours=2)))
    assert await store.reread() == {WEB}
    assert store.schedules[WEB].interval == timedelta(hours=2)
    assert await store.reread() == frozenset()


async def test_a_new_file_appears_and_a_removed_one_takes_its_schedule_along(tmp_path: Path) -> None:
    store = await loaded(tmp_path)
    await store.put(schedule())
    await store.put(schedule(DB))
    (store.directory / "db.json").unlink()
    write_schedule(tmp_path, schedule(MAIL))
    assert await store.reread() == {DB, MAIL}
    assert store.schedules.keys() == {WEB, MAIL}
    await store.save_unsaved()
    assert not (store.directory / "db.json").exists()


async def test_an_invalid_edit_is_set_aside_and_the_schedule_in_force_written_again(tmp_path: Path) -> None:
    store = await loaded(tmp_path)
    await store.put(schedule())
    path = write(tmp_path, "web-1.json", b'{"interval": "1d"}')
    assert await store.reread() == frozenset()
    assert in_quarantine(tmp_path) == {"web-1.json": b'{"interval": "1d"}'}
    assert path.read_bytes() == encode_schedule(schedule())
    assert store.schedules == {WEB: schedule()}
    assert not store.unsaved


async def test_an_invalid_edit_on_a_full_disk_is_not_overwritten_and_set_aside_later(tmp_path: Path) -> None:
    disk = FaultyDisk()
    store = await loaded(tmp_path, disk)
    await store.put(schedule())
    path = write(tmp_path, "web-1.json", b"my edit")
    disk.fail("write", errno.ENOSPC)
    assert await store.reread() == frozenset()
    assert path.read_bytes() == b"my edit"
    assert store.schedules == {WEB: schedule()}
    disk.heal()
    assert [bad.path for bad in store.unreadable] == [path]
    assert await store.reread() == frozenset()
    assert in_quarantine(tmp_path) == {"web-1.json": b"my edit"}
    assert path.read_bytes() == encode_schedule(schedule())


async def test_our_own_writes_are_not_read_again(tmp_path: Path) -> None:
    disk = FaultyDisk()
    store = await loaded(tmp_path, disk)
    for number in range(3):
        await store.put(schedule(last_error=str(number)))
    await store.put(schedule(DB))
    disk.forget()
    assert await store.reread() == frozenset()
    assert disk.calls["read"] == 0


Change = Callable[[Store], Awaitable[None]]


async def _put_twice(store: Store) -> None:
    await store.put(schedule(last_error="second"))
    await store.put(schedule(last_error="third"))


async def _remove(store: Store) -> None:
    await store.put(schedule(last_error="second"))
    await store.remove(WEB)


async def _retire(store: Store) -> None:
    await store.put(schedule(last_error="second"))
    await store.retire(WEB)


@pytest.mark.parametrize("change", [_put_twice, _remove, _retire])
@pytest.mark.parametrize("on_disk", [encode_schedule(schedule(last_error="edit")), b"{", None])
async def test_what_changes_while_files_are_read_again_is_newer_than_what_was_read(
    tmp_path: Path, change: Change, on_disk: bytes | None
) -> None:
    disk = LateDisk()
    store = await loaded(tmp_path, disk)
    await store.put(schedule())
    if on_disk is None:
        (store.directory / "web-1.json").unlink()
    else:
        write(tmp_path, "web-1.json", on_disk)
    disk.gate = gate = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.reread)
        await trio.testing.wait_all_tasks_blocked()  # it has read, and has not heard of it yet
        disk.gate = None
        await change(store)
        in_force = dict(store.schedules)
        gate.set()
    assert dict(store.schedules) == in_force
    assert (await loaded(tmp_path)).schedules == in_force
    assert not store.unreadable
    assert not in_quarantine(tmp_path)


async def test_what_is_made_and_removed_while_files_are_read_again_stays_removed(tmp_path: Path) -> None:
    disk = LateDisk()
    store = await loaded(tmp_path, disk)
    disk.begins, disk.gate = begins, gate = trio.Event(), trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.reread)  # it knows what was there
        await trio.testing.wait_all_tasks_blocked()
        disk.begins = disk.gate = None
        await store.put(schedule())
        begins.set()
        await trio.testing.wait_all_tasks_blocked()  # now it has read
        await store.remove(WEB)
        gate.set()
    assert not store.schedules
    assert not (store.directory / "web-1.json").exists()


async def test_a_write_under_way_is_not_taken_for_an_edit(tmp_path: Path) -> None:
    disk = LateDisk()
    store = await loaded(tmp_path, disk)
    await store.put(schedule())
    disk.gate = gate = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.put, schedule(last_error="second"))
        await trio.testing.wait_all_tasks_blocked()  # on disk already, and not known to be
        store.hold(schedule(last_error="third"))
        disk.gate = None
        nursery.start_soon(store.reread)
        await trio.testing.wait_all_tasks_blocked()
        gate.set()
    assert store.schedules[WEB].last_error == "third"
    await store.save_unsaved()
    assert (await loaded(tmp_path)).schedules[WEB].last_error == "third"


async def test_an_invalid_edit_while_our_own_write_is_under_way_is_set_aside_all_the_same(tmp_path: Path) -> None:
    disk = LateDisk()
    store = await loaded(tmp_path, disk)
    await store.put(schedule())
    disk.gate = gate = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.put, schedule(last_error="second"))
        await trio.testing.wait_all_tasks_blocked()  # on disk already, and not known to be
        write(tmp_path, "web-1.json", b"{")
        disk.gate = None
        nursery.start_soon(store.reread)
        await trio.testing.wait_all_tasks_blocked()
        gate.set()
    assert store.schedules[WEB].last_error == "second"
    assert (await loaded(tmp_path)).schedules == store.schedules
    assert in_quarantine(tmp_path)


async def test_a_directory_that_is_gone_or_cannot_be_listed_drops_no_schedule(tmp_path: Path) -> None:
    store = await loaded(tmp_path)
    await store.put(schedule())
    store.directory.rename(tmp_path / "elsewhere")
    assert await store.reread() == frozenset()
    store.directory.write_bytes(b"no directory")
    assert await store.reread() == frozenset()
    assert store.schedules == {WEB: schedule()}
    store.directory.unlink()
    (tmp_path / "elsewhere").rename(store.directory)
    assert await store.reread() == frozenset()
    assert store.schedules == {WEB: schedule()}


def test_a_scan_changes_nothing(tmp_path: Path) -> None:
    write(tmp_path, "web-1.json", b"{")
    write(tmp_path, "db.json", changed(format=2))
    write(tmp_path, ".x.tmp", b"")
    write_schedule(tmp_path, schedule(MAIL))
    before = tree(tmp_path)
    scan = scan_schedules(tmp_path / "schedules", Disk())
    assert scan.schedules.keys() == {MAIL}
    assert [bad.path.name for bad in scan.invalid] == ["web-1.json"]
    assert [bad.path.name for bad in scan.newer] == ["db.json"]
    assert tree(tmp_path) == before
    assert not scan_schedules(tmp_path / "nowhere", Disk()).schedules


def test_without_a_quarantine_there_are_no_notes(tmp_path: Path) -> None:
    assert list(quarantine_notes(tmp_path)) == []


async def test_an_edit_right_behind_our_own_write_is_seen(tmp_path: Path) -> None:
    """The new file has its name, but the write is not over: its directory is still to be synced."""

    class Busy(InlineDisk):
        async def call(self, work: Callable[[*Ts], T], *args: *Ts) -> T:
            result = await super().call(work, *args)
            if work.__name__ == "replace_all":
                written.set()
                await go_on.wait()
            return result

    written, go_on = trio.Event(), trio.Event()
    go_on.set()
    store = await loaded(tmp_path, Busy())
    await store.put(schedule(name_prefix="before"))
    written, go_on = trio.Event(), trio.Event()
    path = tmp_path / "schedules" / f"{WEB}.json"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.put, schedule(name_prefix="ours"))
        await written.wait()
        path.write_bytes(path.read_bytes().replace(b"ours", b"edit"))
        nursery.start_soon(store.reread)
        await trio.testing.wait_all_tasks_blocked()
        go_on.set()
    assert store.schedules[WEB].name_prefix == "edit"


async def test_our_own_write_has_a_stamp_of_its_own(tmp_path: Path) -> None:
    """The kernel stamps what is written in one tick alike; an edit then must not look like our write."""
    store = await loaded(tmp_path)
    ticks = set()
    for number in range(20):
        await store.put(schedule(name_prefix=f"ours-{number}"))
        path = tmp_path / "schedules" / f"{WEB}.json"
        ours = path.stat().st_mtime_ns
        path.write_bytes(path.read_bytes())
        ticks.add(ours != path.stat().st_mtime_ns)
    assert ticks == {True}
