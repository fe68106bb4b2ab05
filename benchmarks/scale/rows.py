"""One line of the table: what hypemand does, what stands beside it, and what was wanted. Pure."""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from math import ceil
from typing import Any

from attrs import Factory, frozen


class Better(StrEnum):
    """Which way a value is good."""

    LESS = "less"
    MORE = "more"


class Of(StrEnum):
    """What a goal is about: hypemand's own value, or its ratio to the one beside it."""

    VALUE = "value"
    RATIO = "ratio"


@frozen
class Goal:
    """A limit, in the row's own unit where it is one of the value."""

    limit: float
    of: Of = Of.VALUE


@frozen(kw_only=True)
class Row:
    """A figure beside its peer. Where something could not be measured, its value is None and *note* says why.

    Attributes:
        figure: The name that ``--only`` takes.
        key: Names the row for good, so that ratios can be kept.
        peer: What it is measured against; empty where there is nothing.
        ours_text, theirs_text: Shown in place of the values, where one number does not say it.
        checked: Whether the ratio is steady enough to be compared with a kept one.
        luck_below: A ratio below this is luck, and kept as this.
        failed: Something that should have been measured was not.
        detail: Everything that was measured, for the JSON document.
    """

    figure: str
    key: str
    title: str
    unit: str
    better: Better = Better.LESS
    ours: float | None = None
    peer: str = ""
    theirs: float | None = None
    ours_text: str = ""
    theirs_text: str = ""
    goal: Goal | None = None
    checked: bool = False
    luck_below: float = 0.0
    note: str = ""
    failed: bool = False
    detail: Mapping[str, Any] = Factory(dict)

    @property
    def ratio(self) -> float | None:
        """Hypemand's value by the peer's."""
        if self.ours is None or not self.theirs:
            return None
        return self.ours / self.theirs

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None where there is none, or nothing to hold against it."""
        if self.goal is None:
            return None
        value = self.ours if self.goal.of is Of.VALUE else self.ratio
        if value is None:
            return None
        return value <= self.goal.limit if self.better is Better.LESS else value >= self.goal.limit

    def document(self) -> dict[str, Any]:
        """All of it as JSON values."""
        goal = None if self.goal is None else {"limit": self.goal.limit, "of": str(self.goal.of)}
        return {
            "figure": self.figure,
            "key": self.key,
            "title": self.title,
            "unit": self.unit,
            "better": str(self.better),
            "hypemand": self.ours,
            "hypemand_text": self.ours_text,
            "peer": self.peer,
            "peer_value": self.theirs,
            "peer_text": self.theirs_text,
            "ratio": self.ratio,
            "goal": goal,
            "met": self.met,
            "checked": self.checked,
            "luck_below": self.luck_below,
            "note": self.note,
            "failed": self.failed,
            "detail": dict(self.detail),
        }


def row_of(document: Mapping[str, Any]) -> Row:
    """The row that `Row.document` was made of."""
    goal = document["goal"]
    return Row(
        figure=document["figure"],
        key=document["key"],
        title=document["title"],
        unit=document["unit"],
        better=Better(document["better"]),
        ours=document["hypemand"],
        peer=document["peer"],
        theirs=document["peer_value"],
        ours_text=document["hypemand_text"],
        theirs_text=document["peer_text"],
        goal=None if goal is None else Goal(goal["limit"], Of(goal["of"])),
        checked=document["checked"],
        luck_below=document["luck_below"],
        note=document["note"],
        failed=document["failed"],
        detail=document["detail"],
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest of *values*, which are not empty, that *percent* of them do not exceed (nearest rank)."""
    rank = max(1, ceil(len(values) * percent / 100))
    return sorted(values)[rank - 1]


@frozen
class Spread:
    """Half of the values, 99 of 100, and all of them are not above these."""

    p50: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """That of *values*, which are not empty."""
        return cls(percentile(values, 50), percentile(values, 99), max(values))

    @classmethod
    def middle(cls, rounds: Sequence["Spread"]) -> "Spread":
        """Of several rounds, which are not none: the median of each part, the largest of all as the maximum."""
        p50, p99 = (percentile([getattr(one, name) for one in rounds], 50) for name in ("p50", "p99"))
        return cls(p50, p99, max(one.max for one in rounds))

    def text(self) -> str:
        """For the table."""
        return " / ".join(short(value) for value in (self.p50, self.p99, self.max))


def late_row(
    *,
    figure: str,
    key: str,
    title: str,
    ours: Sequence[Sequence[float]],
    peer: str = "",
    theirs: Sequence[Sequence[float]] = (),
    goal: Goal | None = None,
    checked: bool = False,
    luck_below: float = 0.0,
    note: str = "",
) -> Row:
    """How late something was, in ms; given in seconds, by rounds. The value is the p99: in the median of the rounds."""
    mine, others = [_ms(one) for one in ours], [_ms(one) for one in theirs]
    middle, beside = Spread.middle(mine), Spread.middle(others) if others else None
    return Row(
        figure=figure,
        key=f"{figure}/{key}",
        title=f"{title}: p50 / p99 / max",
        unit="ms",
        ours=middle.p99,
        ours_text=middle.text(),
        peer=peer,
        theirs=None if beside is None else beside.p99,
        theirs_text="" if beside is None else beside.text(),
        goal=goal,
        checked=checked,
        luck_below=luck_below,
        note=note,
        detail={
            "hypemand": [one.text() for one in mine],
            "peer": [one.text() for one in others],
            "hypemand_ms": _rounded(ours),
            "peer_ms": _rounded(theirs),
        },
    )


def _rounded(rounds: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[round(1000 * late, 2) for late in one] for one in rounds]


def _ms(late_s: Sequence[float]) -> Spread:
    return Spread.of([1000 * late for late in late_s])


def short(value: float) -> str:
    """*value* with three digits that count, without an exponent."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}"
