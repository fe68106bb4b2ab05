"""Many small questions at once are answered in few threads, each to whoever asked it."""

import threading
from pathlib import Path

import pytest
import trio

from hypemand.backends.questions import AT_ONCE, Questions


async def test_each_gets_its_own_answer_or_error(tmp_path: Path) -> None:
    questions = Questions()
    answers: dict[int, object] = {}

    async def ask(number: int) -> None:
        try:
            answers[number] = await questions.ask(divmod, 1000, number)
        except ZeroDivisionError as error:
            answers[number] = error

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            for number in range(500):
                nursery.start_soon(ask, number)
    assert isinstance(answers.pop(0), ZeroDivisionError)
    assert answers == {number: divmod(1000, number) for number in range(1, 500)}


async def test_they_share_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    hops = 0
    run_sync = trio.to_thread.run_sync

    async def counted(*args: object, **options: object) -> object:
        nonlocal hops
        hops += 1
        return await run_sync(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(trio.to_thread, "run_sync", counted)
    questions = Questions()
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            for number in range(10 * AT_ONCE):
                nursery.start_soon(questions.ask, abs, number)
    assert 10 <= hops <= 20


async def test_a_question_that_hangs_holds_up_those_in_its_thread_alone() -> None:
    questions, go_on = Questions(threads=2), threading.Event()
    try:
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(questions.ask, go_on.wait, 30)
                await trio.sleep(0.05)
                assert await questions.ask(abs, -7) == 7
                nursery.cancel_scope.cancel()
    finally:
        go_on.set()


async def test_who_gives_up_waiting_takes_nobody_elses_answer_along() -> None:
    questions, go_on = Questions(threads=1), threading.Event()
    told: list[int] = []

    async def ask(number: int) -> None:
        told.append(await questions.ask(abs, number))

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            with trio.move_on_after(0.05):
                nursery.start_soon(ask, 7)
                await questions.ask(go_on.wait, 30)
            nursery.start_soon(ask, 8)
            go_on.set()
    assert sorted(told) == [7, 8]


async def test_what_nobody_waits_for_any_more_is_not_asked_once_a_thread_is_free_again() -> None:
    questions, go_on = Questions(threads=1), threading.Event()
    asked: list[int] = []
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(questions.ask, go_on.wait, 30)
            await trio.sleep(0.05)
            with trio.move_on_after(0.05):
                async with trio.open_nursery() as impatient:
                    for number in range(3 * AT_ONCE):
                        impatient.start_soon(questions.ask, asked.append, number)
            go_on.set()
            await questions.ask(asked.append, -1)
    assert asked == [-1]


async def test_where_no_thread_can_be_had_whoever_asks_is_told_and_the_next_one_is_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def refuse(*args: object, **options: object) -> object:
        raise RuntimeError("can't start new thread")

    questions = Questions()
    with trio.fail_after(30):
        with monkeypatch.context() as patched:
            patched.setattr(trio.to_thread, "run_sync", refuse)
            with pytest.raises(RuntimeError, match="thread"):
                await questions.ask(abs, 1)
        assert await questions.ask(abs, -2) == 2
