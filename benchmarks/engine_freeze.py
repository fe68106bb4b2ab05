"""What hypemand's engine adds to a freeze: runs of a real daemon, and the bare calls for the same capture, in turns.

``python -m benchmarks.freeze --engine``. A freeze is what the hypervisor, or
what stands in for it, saw of it: hypemand's own account does not count. The
daemon has its guard and writes durably, as always.
"""

import json
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import httpx
import trio
from attrs import define, field, frozen

from benchmarks.engine_subjects import Subject
from benchmarks.freeze_rounds import tell
from benchmarks.ruler import RefusedError
from tests.processes import Lab, running_daemon

GOAL_MS = 5.0
RUN_LIMIT_S = 120.0


@define
class EngineRow:
    """What was measured of a backend, in milliseconds. *note* is what stands there where nothing was."""

    name: str
    who: str
    bare: list[float] = field(factory=list)
    engine: list[float] = field(factory=list)
    note: str = ""
    failed: bool = False

    @property
    def overhead_ms(self) -> float:
        """The median freeze under the engine, less that of the bare calls."""
        return median(self.engine) - median(self.bare)

    def line(self) -> str:
        """The row of the table."""
        if self.note or not self.engine:
            return f"{self.name:<18}{self.who:<12}{self.note or 'nothing was measured'}"
        figures = (median(self.bare), median(self.engine), max(self.bare), max(self.engine), self.overhead_ms)
        return f"{self.name:<18}{self.who:<12}{len(self.engine):>4}" + "".join(f"{ms:>12.2f}" for ms in figures)

    def document(self) -> dict[str, Any]:
        """All of it, as JSON values."""
        return {
            "backend": self.name,
            "who_freezes": self.who,
            "note": self.note or None,
            "failed": self.failed,
            "bare_ms": self.bare,
            "engine_ms": self.engine,
            "overhead_ms": self.overhead_ms if self.engine else None,
        }


@frozen
class EngineReport:
    """What was measured of all."""

    rows: Sequence[EngineRow]

    def lines(self) -> Iterator[str]:
        """A table for people."""
        yield f"{'backend':<18}{'who freezes':<12}{'runs':>4}" + "".join(
            f"{title:>12}" for title in ("bare ms", "engine ms", "bare max", "engine max", "overhead ms")
        )
        for row in self.rows:
            yield row.line()
        worst = max((row.overhead_ms for row in self.rows if row.engine and not row.note), default=None)
        if worst is not None:
            met = "met" if worst <= GOAL_MS else "NOT met"
            yield f"goal: at most {GOAL_MS:g} ms at the median: the most is {worst:.2f} ms: {met}"

    def table(self) -> str:
        """The lines as one text."""
        return "\n".join(self.lines())

    def document(self) -> dict[str, Any]:
        """All of it, every single freeze included, as JSON values."""
        return {"goal_ms": GOAL_MS, "backends": [row.document() for row in self.rows]}

    @property
    def failed(self) -> bool:
        """Whether something could not be measured that should have been."""
        return any(row.failed for row in self.rows)


@frozen
class EngineRounds:
    """The subjects by turns: each by the bare calls, and by a run of the daemon."""

    subjects: Sequence[Subject]
    runs: int

    async def measure(self, lab: Lab) -> EngineReport:
        """One round to warm up, and those that count. A subject that fails is left out from then on."""
        rows = [EngineRow(subject.name, subject.who) for subject in self.subjects]
        lab.replace(self._config())
        async with running_daemon(lab.config) as daemon:
            await daemon.wait_for("API serves")
            transport = httpx.AsyncHTTPTransport(uds=str(lab.state / "api.sock"))
            async with httpx.AsyncClient(transport=transport, timeout=RUN_LIMIT_S, base_url="http://hypemand") as api:
                for number in range(self.runs + 1):
                    for subject, row in zip(self.subjects, rows, strict=True):
                        await self._round(api, subject, row, number)
            await daemon.stop()
        return EngineReport(rows)

    def _config(self) -> str:
        tables = [f'[backends."{subject.name}"]\n{subject.settings}' for subject in self.subjects]
        schedules = [
            f'[[schedules]]\ninstance = "{subject.instance}"\nbackend = "{subject.name}"\n'
            f'interval = "24h"\nretention = {{ max_count = 1 }}\n'
            for subject in self.subjects
        ]
        runs = 'state_dir = "state"\n[runs]\nmin_free = "1MiB"\n'
        return "\n".join([runs, *tables, *schedules])

    async def _round(self, api: httpx.AsyncClient, subject: Subject, row: EngineRow, number: int) -> None:
        if row.failed:
            return
        ways = [("bare", row.bare), ("engine", row.engine)]
        try:
            for way, freezes in ways if number % 2 else ways[::-1]:
                await trio.sleep(0.2)  # what the one before left to be done must not be in the way of this one
                async with subject.watched() as freeze:
                    await (subject.bare(f"bare-{number}") if way == "bare" else self._run(api, subject))
                    freeze_ms = 1000 * await freeze()
                await subject.tidy()
                if number:
                    freezes.append(freeze_ms)
                tell(f"round {number} of {self.runs}: {subject.name}: {way}: {freeze_ms:.2f} ms")
        except Exception as error:  # noqa: BLE001 - one that breaks leaves the others to be measured
            row.note, row.failed = f"failed: {str(error) or type(error).__name__}", True
            tell(f"{subject.name}: {row.note}")

    async def _run(self, api: httpx.AsyncClient, subject: Subject) -> None:
        answer = await api.post(f"/instances/{subject.instance}/snapshot-schedule/run")
        run = answer.json()
        if answer.status_code != 200 or run["outcome"] != "succeeded":
            raise RefusedError(json.dumps(run))
