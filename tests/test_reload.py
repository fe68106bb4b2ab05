"""Noticing edits: one call for each, once it is over. Real files and real time, at a quick tempo."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from hypemand.engine.reload import Tempo, watch_file
from hypemand.state.files import Signature

QUICK = Tempo(poll_s=0.01, quiet_s=0.1, longest_s=30)
PATIENT = Tempo(poll_s=0.01, quiet_s=1.0, longest_s=30)
Seen = list[str | None]


@asynccontextmanager
async def watching(path: Path, tempo: Tempo = QUICK) -> AsyncIterator[Seen]:
    """Watch *path*; what is given fills with its content at each call."""
    seen: Seen = []

    async def on_edit() -> None:
        seen.append(path.read_text() if path.exists() else None)

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch_file, path, on_edit, tempo)
            await trio.sleep(0.15)  # it has looked once by then
            yield seen
            nursery.cancel_scope.cancel()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await trio.sleep(0.01)


async def settle() -> None:
    """Long enough for a call too many."""
    await trio.sleep(0.4)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "config.toml"
    made.write_text("first")
    return made


async def test_a_file_that_is_not_edited_gives_no_call(path: Path) -> None:
    async with watching(path) as seen:
        path.read_text()
        await settle()
        assert seen == []


async def test_each_edit_gives_one_call(path: Path) -> None:
    async with watching(path) as seen:
        path.write_text("second")
        await until(lambda: bool(seen))
        await settle()
        assert seen == ["second"]
        path.write_text("third!")  # as long as the one before
        await until(lambda: len(seen) == 2)
        await settle()
        assert seen == ["second", "third!"]


async def test_a_file_emptied_and_then_rewritten_gives_one_call_after_the_final_content(path: Path) -> None:
    async with watching(path, PATIENT) as seen:
        path.write_text("")
        await trio.sleep(0.1)
        path.write_text("ha")
        await trio.sleep(0.1)
        path.write_text("half and half")
        await until(lambda: bool(seen))
        await settle()
        assert seen == ["half and half"]


async def test_an_edit_that_takes_longer_than_the_quiet_time_gives_one_call_after_its_end(path: Path) -> None:
    async with watching(path, PATIENT) as seen:
        for number in range(8):
            path.write_text(f"part {number}")
            await trio.sleep(0.2)
        await until(lambda: bool(seen))
        assert seen == ["part 7"]


async def test_a_file_that_never_comes_to_rest_gives_a_call_all_the_same(path: Path) -> None:
    edits = 0
    async with watching(path, Tempo(poll_s=0.01, quiet_s=20, longest_s=0.4)) as seen:
        while len(seen) < 2:
            edits += 1
            path.write_text(f"edit {edits}")
            await trio.sleep(0.01)
    assert edits > 2 * len(seen)


async def test_a_file_replaced_by_rename_gives_one_call(path: Path) -> None:
    async with watching(path) as seen:
        new = path.with_name("new")
        new.write_text("other")
        new.replace(path)
        await until(lambda: bool(seen))
        await settle()
        assert seen == ["other"]


async def test_a_file_deleted_and_made_again_within_the_quiet_time_gives_one_call(path: Path) -> None:
    async with watching(path, PATIENT) as seen:
        path.unlink()
        await trio.sleep(0.1)
        path.write_text("again")
        await until(lambda: bool(seen))
        await settle()
        assert seen == ["again"]


async def test_a_file_that_is_deleted_gives_a_call_and_one_more_when_it_is_back(path: Path) -> None:
    async with watching(path) as seen:
        path.unlink()
        await until(lambda: bool(seen))
        path.write_text("back")
        await until(lambda: len(seen) == 2)
        await settle()
        assert seen == [None, "back"]


async def test_a_file_that_appears_gives_a_call(tmp_path: Path) -> None:
    path = tmp_path / "made" / "later.toml"
    async with watching(path) as seen:
        path.parent.mkdir()
        path.write_text("new")
        await until(lambda: bool(seen))
        assert seen == ["new"]


async def test_a_link_that_is_turned_to_another_file_gives_a_call(path: Path, tmp_path: Path) -> None:
    other, link = tmp_path / "other", tmp_path / "link"
    other.write_text("other")
    link.symlink_to(path)
    async with watching(link) as seen:
        turned = tmp_path / "turned"
        turned.symlink_to(other)
        turned.replace(link)
        await until(lambda: bool(seen))
        assert seen == ["other"]


async def test_an_edit_during_the_call_gives_another_call(path: Path) -> None:
    seen: Seen = []

    async def on_edit() -> None:
        seen.append(path.read_text())
        if len(seen) == 1:
            path.write_text("third, while the second is taken up")
            await trio.sleep(0.3)

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch_file, path, on_edit, QUICK)
            await trio.sleep(0.15)
            path.write_text("second")
            await until(lambda: len(seen) == 2)
            nursery.cancel_scope.cancel()
    assert seen == ["second", "third, while the second is taken up"]


async def test_an_edit_between_the_reading_and_the_watching_gives_a_call(path: Path) -> None:
    read = Signature.of(path.stat())
    path.write_text("edited since")
    seen: Seen = []

    async def on_edit() -> None:
        seen.append(path.read_text())

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch_file, path, on_edit, QUICK, read)
            await until(lambda: bool(seen))
            nursery.cancel_scope.cancel()
    assert seen == ["edited since"]


async def test_an_error_of_the_call_is_not_swallowed(path: Path) -> None:
    async def on_edit() -> None:
        raise ZeroDivisionError

    with trio.fail_after(30), pytest.raises(ExceptionGroup) as caught:  # noqa: PT012 - the edit has to come after
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch_file, path, on_edit, QUICK)
            await trio.sleep(0.15)
            path.write_text("second")
            await trio.sleep_forever()
    assert caught.group_contains(ZeroDivisionError)


def test_the_tempo_is_that_of_the_design() -> None:
    assert (Tempo().quiet_s, Tempo().longest_s) == (2.0, 10.0)
