"""Documents for people: tables on a terminal, plain columns in a pipe, and what is to be said below them."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from attrs import frozen

from hypemand.core.duration import format_duration
from hypemand.core.fields import check_instant
from hypemand.core.size import format_size

MOST_ROWS = 200
MOST_NAMED = 10
"""Instances below the table of which the same is said; of more, the first are named."""

Told = Mapping[str, Any]
"""A document, or a part of one."""


@frozen
class Table:
    """Headings and rows of text."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]

    def head(self, most: int) -> "Table":
        """The first *most* rows."""
        return Table(self.headings, self.rows[:most])


def show(table: Table) -> None:
    """Print *table* on stdout: framed and coloured on a terminal, columns two spaces apart otherwise."""
    if sys.stdout.isatty():
        _show_rich(table)
        return
    lines = [table.headings, *([one_line(text) for text in row] for row in table.rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.headings))]
    template = "  ".join(f"{{:{width}}}" for width in widths)
    print("\n".join(template.format(*line).rstrip() for line in lines))


def one_line(text: str) -> str:
    """*text* as it can stand in a cell: what a hypervisor says may hold line ends and control characters."""
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)


def _show_rich(table: Table) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console()
    drawn = RichTable(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in table.headings:
        drawn.add_column(heading, overflow="fold")
    for row in table.rows:
        cells = zip(table.headings, map(one_line, row), strict=True)
        drawn.add_row(*(Text(text, style=_style(heading, text)) for heading, text in cells))
    if console.measure(drawn, options=console.options.update(width=10_000)).maximum <= console.width:
        console.print(drawn)
        return
    for row in table.rows:  # too narrow for columns
        console.print(Text(one_line(row[0]), style="bold"))
        for heading, text in zip(table.headings[1:], map(one_line, row[1:]), strict=True):
            if text:
                console.print(Text.assemble((f"  {heading.lower():14} ", "dim"), (text, _style(heading, text))))


def _style(heading: str, text: str) -> str:
    if heading == "ERROR" or text == "overdue" or text.startswith(("failed", "interrupted")):
        return "red"
    return "yellow" if text.startswith(("skipped", "uncovered", "disabled", "not settled")) else ""


def ago(at: datetime | None, now: datetime) -> str:
    """How long *at* is ago, in one or two units: ``3h12m ago``."""
    if at is None:
        return "-"
    return f"{_coarse(now - at)} ago" if at <= now else f"in {_coarse(at - now)}"


def _coarse(span: timedelta) -> str:
    seconds = int(span.total_seconds())
    days, hours = divmod(seconds // 3600, 24)
    if days:
        return f"{days}d{hours}h" if hours else f"{days}d"
    unit = 60 if seconds >= 3600 else 1
    return format_duration(timedelta(seconds=seconds // unit * unit))


def _instant(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M:%S}Z"


def seconds_short(seconds: float | None) -> str:
    """A freeze for people: ``12 ms``, ``1.4 s``."""
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def status_table(status: Told) -> Table:
    """A row for each instance. On a terminal errors are in `status_notes` alone: they are too long for a column."""
    headings = ["INSTANCE", "STATE", "EVERY", "NEXT RUN", "LAST RUN", "LAST SNAPSHOT", "AGE", "KEPT", "SIZE"]
    headings += ["FREEZE", "LONGEST"]
    now, views = check_instant(status["at"]), status["instances"]
    rows = [_status_row(view, now) for view in views]
    if not sys.stdout.isatty():
        headings.append("ERROR")
        for view, row in zip(views, rows, strict=True):
            row.append(_last_error(view) or view["trouble"] or "")
    return Table(headings, rows)


def _last_error(view: Told) -> str:
    return (view["schedule"] or {}).get("last_error") or ""


def _status_row(view: Told, now: datetime) -> list[str]:
    schedule, run, last = view["schedule"], view["last_run"], view["last_snapshot"]
    kept, size = view["snapshots_kept"], view["snapshots_bytes"]
    return [
        view["instance_id"],
        view["state"] or "?",
        schedule["interval"] if schedule else "uncovered",
        _next_run(view, now),
        _last_run(view, now),
        last["name"] if last else "?" if kept is None else "-",
        ago(_at(view["last_good_at"]), now).removesuffix(" ago"),
        "?" if kept is None else str(kept),
        "?" if size is None else format_size(size),
        seconds_short(run["freeze_s"] if run else None),
        _longest(view["freeze"]),
    ]


def _at(instant: str | None) -> datetime | None:
    return None if instant is None else check_instant(instant)


def _last_run(view: Told, now: datetime) -> str:
    run = view["last_run"]
    if view["open_run"]:
        return "under way" if view["under_way"] else "not settled"
    return f"{run['outcome']} {ago(_at(run['started_at']), now)}" if run else "-"


def _longest(freeze: Told) -> str:
    """The longest freeze against its budget: ``1.2 s of 2m``."""
    longest, budget_s = freeze["longest_s"], freeze["budget_s"]
    if budget_s is None:
        return seconds_short(longest)
    told = "none" if longest is None else seconds_short(longest)
    return f"{told} of {format_duration(timedelta(seconds=budget_s))}"


def _next_run(view: Told, now: datetime) -> str:
    schedule = view["schedule"]
    if schedule is None:
        return "-"
    if not view["made"]:
        return "not begun"
    if not schedule["settings"].get("enabled", True):
        return "disabled"
    at = check_instant(schedule["next_run_at"])
    return ago(at, now) if at > now else "overdue"


def snapshots_table(document: Told) -> Table:
    """A row for each snapshot."""
    now = check_instant(document["at"])
    rows = []
    for told in document["snapshots"]:
        at = check_instant(told["created_at"])
        size = format_size(told["size_bytes"])
        rows.append([told["instance_id"], told["name"], told["kind"], _instant(at), ago(at, now), size, told["id"]])
    return Table(("INSTANCE", "NAME", "KIND", "CREATED", "AGE", "SIZE", "ID"), rows)


def history_table(runs: Iterable[Told]) -> Table:
    """A row for each run; one by hand says so."""
    rows = [
        [
            _instant(check_instant(run["started_at"])),
            run["instance_id"],
            run["outcome"] + (" (manual)" if run["trigger"] == "manual" else ""),
            run["snapshot_name"] or "-",
            "-" if run["size_bytes"] is None else format_size(run["size_bytes"]),
            seconds_short(run["freeze_s"]),
            seconds_short(run["late_s"]),
            str(len(run["pruned"])),
            run["error"] or "",
        ]
        for run in runs
    ]
    return Table(("STARTED", "INSTANCE", "OUTCOME", "SNAPSHOT", "SIZE", "FREEZE", "LATE", "PRUNED", "ERROR"), rows)


def plan_table(planned: Iterable[Told]) -> Table:
    """A row for each run to come, and one for each snapshot that it will prune."""
    rows = []
    for run in planned:
        at, instance = _instant(check_instant(run["at"])), run["instance_id"]
        rows.append([at, instance, "take", run["snapshot_name"], ""])
        rows += [[at, instance, "prune", gone["snapshot_name"], "; ".join(gone["reasons"])] for gone in run["prunes"]]
    return Table(("AT", "INSTANCE", "ACTION", "SNAPSHOT", "WHY"), rows)


def _owner_note(status: Told) -> str:
    lock = status["lock"]
    if lock is None:
        return f"daemon: not running on the state in {status['state_dir']}"
    if lock["role"] == "daemon":
        return f"daemon: running (pid {lock['pid']})"
    return f"state: in use by {lock['role']} (pid {lock['pid']})"


def status_notes(status: Told) -> list[str]:
    """What is to be said below the table of `status`; the daemon's state first."""
    views = status["instances"]
    notes = [_owner_note(status)]
    notes += _together(said for view in views for said in _said_of(view))
    to_come = [view["instance_id"] for view in views if not view["made"]]
    notes += [f"begins when the daemon takes up the config: {_some(to_come)}"] if to_come else []
    notes += [f"config invalid, a running daemon goes on with the one before: {p}" for p in status["config_problems"]]
    notes += [f"problem: {problem}" for problem in status["problems"]]
    notes += [f"warning: {one_line(warning)}" for warning in status["warnings"]]
    notes += [f"state file unreadable or invalid: {trouble}" for trouble in status["unreadable_state_files"]]
    notes += [f"in quarantine: {note} (see {status['state_dir']}/quarantine)" for note in status["quarantine"]]
    notes += [f"run log damaged: {place}" for place in status["damaged_log_lines"]]
    return notes


def _said_of(view: Told) -> Iterator[tuple[str, str]]:
    """An instance, and what is to be said of it."""
    instance, run = view["instance_id"], view["current_run"]
    error, over_budget = _last_error(view), view["freeze"]["over_budget"]
    if error and (over_budget is None or over_budget not in error):  # else it is told below
        yield instance, f"last error: {one_line(error)}"
    if view["trouble"] and view["made"]:
        yield instance, one_line(view["trouble"])
    if run is not None and run["error"] and not view["under_way"]:
        yield instance, f"run {run['run_id']} is not settled yet: {one_line(run['error'])}"


def _together(said: Iterable[tuple[str, str]]) -> list[str]:
    """A line for each, but one for all of many instances of which the same is said: a hypervisor that is down."""
    instances: dict[str, list[str]] = {}
    for instance, text in said:
        instances.setdefault(text, []).append(instance)
    lines = []
    for text, its in instances.items():
        lines += [f"{instance}: {text}" for instance in its] if len(its) <= MOST_NAMED else [f"{_some(its)}: {text}"]
    return lines


def _some(names: Sequence[str]) -> str:
    """*names*, where they are many the first of them and how many more."""
    if len(names) <= MOST_NAMED:
        return ", ".join(names)
    named = MOST_NAMED // 2
    return f"{', '.join(names[:named])} and {len(names) - named:,} more"
