"""Two questions at a time: two answers, or one error as it is."""

import pytest
import trio
from trio.testing import MockClock

from hypemand.backends.vmm.both import both


class FirstError(Exception):
    pass


class SecondError(Exception):
    pass


async def answer(value: str, after_s: float = 0.0, error: type[Exception] | None = None) -> str:
    await trio.sleep(after_s)
    if error is not None:
        raise error(value)
    return value


async def test_both_are_asked_at_once_and_answers_keep_their_places(autojump_clock: MockClock) -> None:
    began = trio.current_time()
    assert await both(lambda: answer("first", 3), lambda: answer("second", 2)) == ("first", "second")
    assert trio.current_time() - began == 3


async def test_an_error_of_the_first_is_raised_as_it_is_and_the_second_is_not_waited_for(
    autojump_clock: MockClock,
) -> None:
    with pytest.raises(FirstError, match="said"):
        await both(lambda: answer("said", 1, FirstError), lambda: answer("second", 100))
    assert trio.current_time() < 2


async def test_an_error_of_the_second_is_raised_as_it_is_and_the_first_is_not_waited_for(
    autojump_clock: MockClock,
) -> None:
    with pytest.raises(SecondError, match="said"):
        await both(lambda: answer("first", 100), lambda: answer("said", 1, SecondError))
    assert trio.current_time() < 2


async def test_of_two_errors_one_is_raised(autojump_clock: MockClock) -> None:
    with pytest.raises((FirstError, SecondError)):
        await both(lambda: answer("first", 1, FirstError), lambda: answer("second", 1, SecondError))


async def test_a_cancellation_ends_both(autojump_clock: MockClock) -> None:
    with trio.move_on_after(1) as limit:
        await both(lambda: answer("first", 100), lambda: answer("second", 100))
    assert limit.cancelled_caught
    assert trio.current_time() < 10
