"""What a start loads is not looked through for garbage; Python looks again afterwards, also after an error."""

import gc
from collections.abc import Iterator

import pytest

from hypemand.garbage import lasting, look_seldom


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    threshold, frozen = gc.get_threshold(), gc.get_freeze_count()
    yield
    gc.set_threshold(*threshold)
    if gc.get_freeze_count() > frozen:
        gc.unfreeze()


def test_what_is_loaded_is_left_alone() -> None:
    before = gc.get_freeze_count()
    with lasting():
        assert not gc.isenabled()
        loaded = [[] for _ in range(1000)]  # type: ignore[var-annotated]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(loaded)


def test_after_a_start_that_failed_garbage_is_looked_for_again() -> None:
    with pytest.raises(ZeroDivisionError), lasting():
        raise ZeroDivisionError
    assert gc.isenabled()


def test_it_is_looked_for_seldom() -> None:
    look_seldom()
    assert gc.get_threshold()[0] >= 10_000
