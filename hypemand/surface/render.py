"""Reports for people: tables on a terminal, plain columns in a pipe."""

import sys
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta

from attrs import frozen

from hypemand.core.duration import format_duration
from hypemand.core.forecast import PlannedRun
from hypemand.core.model import InstanceId, RunFinished, Snapshot
from hypemand.core.size import format_size
from hypemand.surface.report import InstanceView, Overview, State

MOST_ROWS = 200


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
    lines = [table.headings, *([_one_line(text) for text in row] for row in table.rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.headings))]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def _one_line(text: str) -> str:
    """*text* as it can stand in a cell: what a hypervisor says may hold line ends and control characters."""
    return "".join(c if c.isprintable() else " " for c in text)


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
        cells = zip(table.headings, map(_one_line, row), strict=True)
        drawn.add_row(*(Text(text, style=_style(heading, text)) for heading, text in cells))
    if console.measure(drawn, options=console.options.update(width=10_000)).maximum <= console.width:
        console.print(drawn)
        return
    for row in table.rows:  # too narrow for columns
        console.print(Text(_one_line(row[0]), style="bold"))
        for heading, text in zip(table.headings[1:], map(_one_line, row[1:]), strict=True):
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


def status_table(overview: Overview, now: datetime) -> Table:
    """A row for each instance. On a terminal errors are in `status_notes` alone: they are too long for a column."""
    headings = ["INSTANCE", "STATE", "EVERY", "NEXT RUN", "LAST RUN", "LAST SNAPSHOT", "AGE", "KEPT", "SIZE"]
    headings += ["FREEZE", "LONGEST"]
    rows = [_status_row(view, now) for view in overview.instances]
    if not sys.stdout.isatty():
        headings.append("ERROR")
        for view, row in zip(overview.instances, rows, strict=True):
            row.append((view.schedule.last_error if view.schedule else None) or view.trouble or "")
    return Table(headings, rows)


def _status_row(view: InstanceView, now: datetime) -> list[str]:
    schedule, run = view.schedule, view.last_run
    last = view.snapshots[-1] if view.snapshots else None
    outcome = str(run.outcome) if run else ""
    if view.open_run:
        outcome = "under way" if view.under_way else "not settled"
    return [
        view.instance_id,
        view.state or "?",
        format_duration(schedule.interval) if schedule else "uncovered",
        _next_run(view, now),
        f"{outcome} {ago(run.started_at, now)}" if run and not view.open_run else outcome or "-",
        last.name if last else "-",
        ago(last.created_at, now).removesuffix(" ago") if last else "-",
        "?" if view.snapshots is None else str(len(view.snapshots)),
        "?" if view.snapshots is None else format_size(sum(s.size_bytes for s in view.snapshots)),
        seconds_short(run.freeze_s if run else None),
        _longest(view),
    ]


def _longest(view: InstanceView) -> str:
    """The longest freeze against its budget: ``1.2 s of 2m``."""
    if view.max_freeze is None:
        return seconds_short(view.longest.freeze_s) if view.longest else "-"
    longest = seconds_short(view.longest.freeze_s) if view.longest else "none"
    return f"{longest} of {format_duration(view.max_freeze)}"


def _next_run(view: InstanceView, now: datetime) -> str:
    if view.schedule is None:
        return "-"
    if not view.made:
        return "not begun"
    if not view.schedule.settings.enabled:
        return "disabled"
    return ago(view.schedule.next_run_at, now) if view.schedule.next_run_at > now else "overdue"


def snapshots_table(snapshots: Iterable[Snapshot], now: datetime) -> Table:
    """A row for each snapshot."""
    rows = [
        [
            s.instance_id,
            s.name,
            s.kind,
            f"{s.created_at:%Y-%m-%d %H:%M:%S}Z",
            ago(s.created_at, now),
            format_size(s.size_bytes),
            s.id,
        ]
        for s in snapshots
    ]
    return Table(("INSTANCE", "NAME", "KIND", "CREATED", "AGE", "SIZE", "ID"), rows)


def history_table(runs: Iterable[RunFinished]) -> Table:
    """A row for each run."""
    rows = [
        [
            _instant(run.started_at),
            run.instance_id,
            str(run.outcome),
            run.snapshot_name or "-",
            "-" if run.size_bytes is None else format_size(run.size_bytes),
            seconds_short(run.freeze_s),
            seconds_short(run.late_s),
            str(len(run.pruned)),
            run.error or "",
        ]
        for run in runs
    ]
    return Table(("STARTED", "INSTANCE", "OUTCOME", "SNAPSHOT", "SIZE", "FREEZE", "LATE", "PRUNED", "ERROR"), rows)


def plan_table(planned: Iterable[tuple[InstanceId, PlannedRun]]) -> Table:
    """A row for each run to come, and one for each snapshot that it will prune."""
    rows = []
    for instance, run in planned:
        rows.append([_instant(run.at), instance, "take", run.snapshot_name, ""])
        rows += [[_instant(run.at), instance, "prune", e.snapshot.name, "; ".join(e.reasons)] for e in run.prunes]
    return Table(("AT", "INSTANCE", "ACTION", "SNAPSHOT", "WHY"), rows)


def _owner_note(state: State) -> str:
    owner = state.owner
    if owner is None:
        return f"daemon: not running on the state in {state.state_dir}"
    return f"daemon: running (pid {owner.pid})" if owner.role == "daemon" else f"state: in use by {owner}"


def status_notes(overview: Overview, config_problems: Iterable[str]) -> list[str]:
    """What is to be said below the table of `status`; the daemon's state first."""
    state = overview.state
    notes = [_owner_note(state)]
    for view in overview.instances:
        error = view.schedule.last_error if view.schedule else None
        notes += [f"{view.instance_id}: last error: {_one_line(error)}"] if error else []
        notes += [f"{view.instance_id}: {_one_line(view.trouble)}"] if view.trouble and view.made else []
    to_come = [view.instance_id for view in overview.instances if not view.made]
    notes += [f"begins when the daemon takes up the config: {', '.join(to_come)}"] if to_come else []
    notes += [f"config invalid, a running daemon goes on with the one before: {p}" for p in config_problems]
    notes += [f"problem: {problem}" for problem in overview.problems]
    notes += [f"warning: {_one_line(warning)}" for warning in overview.warnings]
    notes += [f"state file unreadable or invalid: {trouble}" for trouble in state.trouble]
    notes += [f"in quarantine: {note} (see {state.state_dir}/quarantine)" for note in state.quarantine]
    notes += [f"run log damaged: {place}" for place in state.log.damaged]
    return notes
