"""The rounds of the freeze benchmark: every way once in each, by turns."""

import os
import sys
import time
from collections.abc import Sequence
from functools import cache

import trio
from attrs import frozen

from benchmarks.freeze_options import Options
from benchmarks.freeze_report import TITLES, Row, Shot
from benchmarks.huge_pages import huge_mb, make_whole
from benchmarks.ruler import NotMeasuredError, RefusedError, Stage, Way

_SHOT_LIMIT_S = 300.0


@frozen
class Turn:
    """A way that is taken in each round, and where its figures go."""

    way: Way
    row: Row


@frozen
class Rounds:
    """All rounds."""

    turns: Sequence[Turn]
    options: Options

    async def all(self) -> None:
        """One round to warm up, and those that are measured. A way that fails is left out from then on."""
        for number in range(self.options.runs + 1):
            what = f"round {number} of {self.options.runs}" if number else "round to warm up"
            for turn in self._order(number):
                if not turn.row.note:
                    tell(f"{what}: {TITLES[turn.row.way]}: {await self._take(turn, number)}")

    def _order(self, number: int) -> Sequence[Turn]:
        """Turned by one each round and every other round backwards: nobody is always first, or behind the same one."""
        first = number % len(self.turns) if self.turns else 0
        turned = [*self.turns[first:], *self.turns[:first]]
        return turned[::-1] if number % 2 else turned

    async def _take(self, turn: Turn, number: int) -> str:
        """Measure once, and say in a few words what came of it."""
        try:
            with trio.fail_after(_SHOT_LIMIT_S):
                shot = await self._shot(turn.way, f"freeze-{turn.row.way}-{number}")
        except NotMeasuredError as error:
            turn.row.note = str(error)
        except Exception as error:  # noqa: BLE001 - the boundary of a way: one that breaks leaves the others to be measured
            turn.row.fail(error)
        else:
            if number > 0:
                turn.row.shots.append(shot)
            return f"{shot.freeze_ms:.1f} ms"
        return turn.row.note

    async def _shot(self, way: Way, tag: str) -> Shot:
        await self._give_the_stage_to(way.stage)
        huge = huge_mb(way.stage.pid)
        first_event = len(way.stage.monitor.events)
        began = time.perf_counter()
        told_s = await way.take(tag)
        done_s = time.perf_counter() - began
        standstills = await way.stage.standstills_since(first_event)
        await way.remove()
        if not standstills:
            raise RefusedError("QEMU told of no STOP, so nothing was measured")
        return Shot(
            freeze_ms=1000 * sum(standstills),
            standstills=len(standstills),
            done_ms=1000 * done_s,
            told_ms=None if told_s is None else 1000 * told_s,
            huge_mb=huge,
        )

    async def _give_the_stage_to(self, stage: Stage) -> None:
        for turn in self.turns:
            if turn.way.stage is not stage and not turn.row.failed:
                await turn.way.stage.rest()
        await stage.wake()
        if self.options.whole_pages:
            try:
                await trio.to_thread.run_sync(make_whole, stage.pid, self.options.memory_mb, abandon_on_cancel=True)
            except OSError as error:
                _tell_once(f"huge pages are not made whole: {error.strerror}")
        # What an earlier snapshot left to be written, the next one would have to wait for.
        await trio.to_thread.run_sync(os.sync, abandon_on_cancel=True)


@cache
def _tell_once(text: str) -> None:
    tell(text)


def tell(text: str) -> None:
    """Tell of the progress, where it is in nobody's way."""
    print(text, file=sys.stderr, flush=True)
