"""Schedules to be imported: read from what another scheduler has, and told of to people and programs."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import orjson
from attrs import define, evolve

from hypemand.backends.hypeman.schedules import MOST_METADATA, Found
from hypemand.core.duration import format_duration
from hypemand.core.errors import InvalidInput, RuleBroken
from hypemand.core.fields import format_instant
from hypemand.core.model import Schedule
from hypemand.core.naming import check_instance_id
from hypemand.engine.importing import DONE, Imported, Outcome, as_ours
from hypemand.state.codec import NewerFormatError, decode_schedule
from hypemand.surface.render import Table


@define
class Row:
    """One schedule, and what became of it.

    Attributes:
        schedule: None where what was found is none.
        taken_over: Whether the other scheduler has it no more; None: it was not asked for that.
    """

    instance_id: str
    schedule: Schedule | None
    became: Imported
    taken_over: bool | None = None

    @property
    def is_ours(self) -> bool:
        """Whether hypemand has the schedule."""
        return self.became.outcome in DONE

    @property
    def is_done(self) -> bool:
        """Whether all that was asked for is."""
        return self.is_ours and self.taken_over is not False


def read_row(found: Found, backend: str) -> Row:
    """What is in *found*, as a schedule on *backend*; refused until somebody has taken it in."""

    def refused(reason: str) -> Row:
        return Row(found.instance_id, None, Imported(Outcome.REFUSED, reason))

    if found.problem:
        return refused(found.problem)
    try:
        schedule = decode_schedule(orjson.dumps(found.document), check_instance_id(found.instance_id))
    except (InvalidInput, NewerFormatError, RuleBroken) as error:
        return refused(str(error))
    tags = len(schedule.metadata)
    if tags > MOST_METADATA:
        return refused(f"its metadata has {tags} tags; with {MOST_METADATA} at most there is room for hypemand's")
    return Row(found.instance_id, as_ours(evolve(schedule, backend=backend)), Imported(Outcome.REFUSED, "not tried"))


def import_document(rows: Iterable[Row], **about: Any) -> dict[str, Any]:
    """What became of *rows*, for programs."""
    schedules = [
        {
            "instance_id": row.instance_id,
            "outcome": row.became.outcome.value,
            "reason": row.became.reason or None,
            "taken_over": bool(row.taken_over),
        }
        for row in rows
    ]
    return {**about, "schedules": schedules}


def import_table(rows: Iterable[Row], *, dry_run: bool) -> Table:
    """The same for people."""
    lines = []
    for row in rows:
        interval = "" if row.schedule is None else format_duration(row.schedule.interval)
        due = "" if row.schedule is None else format_instant(row.schedule.next_run_at)
        over = {None: "", True: "yes", False: "no"}[row.taken_over]
        instance, reason = _harmless(row.instance_id), _harmless(row.became.reason)
        lines.append((instance, interval, due, row.became.outcome.value, over, reason))
    outcome = "WOULD BE" if dry_run else "IS"
    return Table(("INSTANCE", "INTERVAL", "NEXT RUN", outcome, "TAKEN OVER", "ERROR"), lines)


def _harmless(text: str) -> str:
    """*text*, which somebody else wrote, without what a terminal would obey."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def import_notes(rows: Iterable[Row], *, dry_run: bool, from_server: bool) -> list[str]:
    """What is to be said below the table."""
    rows = list(rows)
    counts = Counter(row.became.outcome.value for row in rows)
    told = ", ".join(f"{number} {outcome}" for outcome, number in counts.items())
    notes = [f"{told}; dry run: nothing was changed" if dry_run else told]
    if counts[Outcome.DIFFERS.value]:
        notes.append("--replace has schedules that differ replaced")
    left = [row for row in rows if row.is_ours and row.taken_over is None]
    if from_server and left:
        notes.append(
            f"the server keeps its own schedules beside hypemand, {len(left)} of these: both take snapshots, and each"
            " prunes the other's; --take-over has the server's deleted"
        )
    return notes
