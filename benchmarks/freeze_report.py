"""What was measured, as a table for people and as a document for programs; and what it says of the goals."""

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from attrs import asdict, define, field, frozen

BARE, INTERNAL, BACKGROUND, VIRSH = "bare", "internal", "background", "virsh"
TITLES = {
    BARE: "bare snapshot-save",
    INTERNAL: "hypemand internal",
    BACKGROUND: "hypemand background",
    VIRSH: "virsh snapshot-create-as",
}
INTERNAL_TO_BARE = 1.05
BACKGROUND_MS = 30.0
BACKGROUND_TO_INTERNAL = 1 / 20
GOALS_MEMORY_MB = 512


@frozen
class Shot:
    """One snapshot, measured.

    Attributes:
        freeze_ms: How long the guest stood still, all times together.
        standstills: How many times it did.
        done_ms: From the call until the snapshot was complete.
        told_ms: The freeze by the way's own account, if it gave one.
        huge_mb: The guest's memory in huge pages, before it; None where that is not to be known.
    """

    freeze_ms: float
    standstills: int
    done_ms: float
    told_ms: float | None
    huge_mb: float | None


@define
class Row:
    """One way. *note* is what stands there instead of figures, where there are none."""

    way: str
    shots: list[Shot] = field(factory=list)
    note: str = ""
    failed: bool = False

    def fail(self, error: Exception) -> None:
        """Note that it failed, and why."""
        self.note = f"failed: {str(error) or type(error).__name__}"
        self.failed = True

    @property
    def measured(self) -> bool:
        """Whether it has figures to show; those from before a failure don't count."""
        return bool(self.shots) and not self.note

    @property
    def median_ms(self) -> float:
        """The median freeze."""
        return median(shot.freeze_ms for shot in self.shots)

    @property
    def max_ms(self) -> float:
        """The longest freeze."""
        return max(shot.freeze_ms for shot in self.shots)

    @property
    def huge_mb(self) -> float | None:
        """The median of the guest's memory in huge pages, before each."""
        known = [shot.huge_mb for shot in self.shots if shot.huge_mb is not None]
        return median(known) if known else None

    @property
    def disagreement_ms(self) -> float | None:
        """The most by which the way's own account of a freeze differs from QEMU's; None where it gives none."""
        apart = [abs(shot.freeze_ms - shot.told_ms) for shot in self.shots if shot.told_ms is not None]
        return max(apart, default=None)


@frozen
class Goal:
    """A goal and what came of it; *met* is None where it was not measured."""

    text: str
    found: str
    met: bool | None

    def __str__(self) -> str:
        return f"{self.text}: {self.found}{'' if self.met is None else ': met' if self.met else ': NOT met'}"


@frozen(kw_only=True)
class Report:
    """Everything about one run of the benchmark.

    Attributes:
        rows: By way, in the order of the table.
        load: The load average of the machine before the first snapshot.
    """

    qemu_version: str
    memory_mb: int
    runs: int
    cpus: int
    load: float
    whole_pages: bool
    rows: Sequence[Row]

    def _row(self, way: str) -> Row | None:
        return next((row for row in self.rows if row.way == way and row.measured), None)

    def ratio(self, way: str, to: str) -> float | None:
        """The median freeze of *way* by that of *to*; None where either was not measured."""
        row, other = self._row(way), self._row(to)
        return row.median_ms / other.median_ms if row and other and other.median_ms else None

    @property
    def failed(self) -> bool:
        """Whether something could not be measured that should have been."""
        return any(row.failed for row in self.rows)

    def goals(self) -> tuple[Goal, ...]:
        """The goals, each with what was found."""
        size = "" if self.memory_mb == GOALS_MEMORY_MB else f" (set for {GOALS_MEMORY_MB} MB)"
        return (
            self._ratio_goal(INTERNAL, BARE, f"internal <= 1.05 x bare{size}", INTERNAL_TO_BARE),
            self._background_goal(f"background <= {BACKGROUND_MS:g} ms{size}"),
            self._ratio_goal(BACKGROUND, INTERNAL, f"background <= 1/20 of internal{size}", BACKGROUND_TO_INTERNAL),
        )

    def _ratio_goal(self, way: str, to: str, text: str, limit: float) -> Goal:
        ratio = self.ratio(way, to)
        if ratio is None:
            return Goal(text, "not measured", None)
        return Goal(text, f"1/{1 / ratio:.1f}" if 0 < ratio < 0.5 else f"{ratio:.3f}", ratio <= limit)

    def _background_goal(self, text: str) -> Goal:
        row = self._row(BACKGROUND)
        if row is None:
            return Goal(text, "not measured", None)
        return Goal(text, f"median {row.median_ms:.1f} ms, max {row.max_ms:.1f} ms", row.median_ms <= BACKGROUND_MS)

    def table(self) -> str:
        """All of it, to be read."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"How long a guest with {self.memory_mb} MB of non-zero RAM stands still for a snapshot: STOP to RESUME"
        yield (
            f"QEMU {self.qemu_version} -accel tcg, {self.cpus} CPUs, load {self.load:.2f} before,"
            f" {self.runs} round{'s' * (self.runs > 1)} after one to warm up{', --whole-pages' * self.whole_pages}"
        )
        yield ""
        yield (
            f"{'way':<26}{'runs':>4}{'min ms':>9}{'median ms':>11}{'max ms':>9}"
            f"{'x bare':>9}{'x internal':>12}{'done in ms':>12}{'huge MB':>9}"
        )
        for row in self.rows:
            yield self._line(row) if row.measured else f"{TITLES[row.way]:<26}{row.note}"
        yield ""
        yield from self._agreement()
        yield from (f"goal: {goal}" for goal in self.goals())

    def _line(self, row: Row) -> str:
        to_internal = self.ratio(row.way, INTERNAL) if row.way == BACKGROUND else None
        return (
            f"{TITLES[row.way]:<26}{len(row.shots):>4}{min(s.freeze_ms for s in row.shots):>9.1f}"
            f"{row.median_ms:>11.1f}{row.max_ms:>9.1f}{_factor(self.ratio(row.way, BARE)):>9}"
            f"{_factor(to_internal):>12}{median(s.done_ms for s in row.shots):>12.0f}"
            f"{'' if row.huge_mb is None else format(row.huge_mb, '.0f'):>9}"
        )

    def _agreement(self) -> Iterator[str]:
        for row in self.rows:
            if row.way in (INTERNAL, BACKGROUND) and row.measured:
                apart = row.disagreement_ms
                yield f"freeze that hypemand reports, {row.way}: " + (
                    "none" if apart is None else f"at most {apart:.3f} ms from the one measured here"
                )

    def document(self) -> dict[str, Any]:
        """All of it, every single snapshot included, as JSON values."""
        return {
            "qemu_version": self.qemu_version,
            "accelerator": "tcg",
            "memory_mb": self.memory_mb,
            "runs": self.runs,
            "cpus": self.cpus,
            "load_before": self.load,
            "whole_pages": self.whole_pages,
            "ways": [self._way(row) for row in self.rows],
            "goals": [asdict(goal) for goal in self.goals()],
        }

    def _way(self, row: Row) -> dict[str, Any]:
        head = {"way": row.way, "title": TITLES[row.way], "failed": row.failed, "note": row.note or None}
        if not row.measured:
            return head
        return {
            **head,
            "min_ms": min(shot.freeze_ms for shot in row.shots),
            "median_ms": row.median_ms,
            "max_ms": row.max_ms,
            "ratio_to_bare": self.ratio(row.way, BARE),
            "ratio_to_internal": self.ratio(row.way, INTERNAL),
            "disagreement_ms": row.disagreement_ms,
            "shots": [asdict(shot) for shot in row.shots],
        }


def _factor(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.3f}"
