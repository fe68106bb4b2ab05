"""A daemon seen from outside: /proc, and what its run log gets."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from attrs import define, field

from benchmarks.scale.machine import cpu_s, memory_mb
from benchmarks.scale.rows import Spread
from benchmarks.soak_report import Sample
from tests.processes import guards_of

_MOST_WRONG = 100


@define(eq=False)
class Tail:
    """The finished lines that a run log gets, each once, over its rotations. There may be no run log yet."""

    path: Path
    _file: IO[bytes] | None = field(init=False, default=None)
    _rest: bytes = field(init=False, default=b"")

    def new(self) -> Iterator[dict[str, Any]]:
        """Those since the last call."""
        while True:
            if self._file is None:
                if not self.path.exists():
                    return
                self._file, self._rest = self.path.open("rb"), b""
            rotated = self._is_rotated(self._file)  # before it is read: what is written after that is seen next time
            *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
            for line in lines:
                document = json.loads(line)
                if document["event"] == "finished":
                    yield document
            if not rotated:
                return
            self._file.close()
            self._file = None

    def _is_rotated(self, file: IO[bytes]) -> bool:
        try:
            return not os.path.samestat(self.path.stat(), os.fstat(file.fileno()))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


@define(eq=False)
class Watch:
    """Looks at the daemon *pid* with the state *state*.

    Attributes:
        wrong: The first runs that did not succeed, as the history has them.
    """

    pid: int
    state: Path
    began: float
    wrong: list[dict[str, Any]] = field(init=False, factory=list)
    _tail: Tail = field(init=False)
    _before: tuple[float, float] = field(init=False)

    @_tail.default
    def _new_tail(self) -> Tail:
        return Tail(self.state / "runs.jsonl")

    @_before.default
    def _now(self) -> tuple[float, float]:
        return time.time(), cpu_s(self.pid)

    def look(self) -> Sample:
        """What there is to be seen now."""
        (then, used_then), (now, used) = self._before, self._now()
        self._before = now, used
        ended = list(self._tail.new())
        wrong = [line for line in ended if line["outcome"] != "succeeded"]
        self.wrong += wrong[: max(0, _MOST_WRONG - len(self.wrong))]
        late = Spread.of([1000 * line["late_s"] for line in ended]) if ended else None
        guards = guards_of(self.pid)
        home = Path(f"/proc/{self.pid}")
        return Sample(
            at_s=round(now - self.began, 3),
            rss_mb=memory_mb(self.pid, "Rss"),
            guard_rss_mb=memory_mb(guards[0], "Rss") if guards else None,
            descriptors=len(os.listdir(home / "fd")),  # noqa: PTH208 - names are not needed
            threads=len(os.listdir(home / "task")),  # noqa: PTH208
            cpu_percent=100 * (used - used_then) / (now - then),
            runs=len(ended),
            wrong=len(wrong),
            runs_per_s=len(ended) / (now - then),
            late_p50_ms=None if late is None else late.p50,
            late_p99_ms=None if late is None else late.p99,
            late_max_ms=None if late is None else late.max,
        )

    def close(self) -> None:
        """Let go of the run log."""
        self._tail.close()
