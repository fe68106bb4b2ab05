"""The commands that tell: `status`, `plan`, `snapshots`, `history`."""

import argparse
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

from hypemand.asking import Answer, Asked, overview_from_files, state_from_files, tell_silence
from hypemand.commands import FAILED, MISUSED, OK, CommandError, StateUnreadableError, print_json, warn

if TYPE_CHECKING:
    from hypemand.surface.check import Verdict
    from hypemand.surface.documents import Document
    from hypemand.surface.plan import Plan
    from hypemand.surface.render import Table


def status(options: argparse.Namespace) -> int:
    """Show each instance, or judge them all for monitoring."""
    from hypemand.surface.render import show, status_notes

    if options.check:
        return _check(options)
    asked = Asked.by(options)
    answer = _status(asked)
    tell_silence(asked, answer.silent)
    if options.json:
        print_json(answer.content.document)
        return OK
    show(answer.content.table)
    for note in status_notes(answer.content.document):
        print(note, file=sys.stderr)
    return OK


class _Status(NamedTuple):
    """The status, and how it is shown."""

    document: "Document"
    table: "Table"


def _status(asked: Asked) -> "Answer[_Status]":
    """The status, with what only we can tell: the config's problems, and why the daemon did not answer."""
    from hypemand.surface.render import status_notes, status_table

    def read(told: "Document") -> _Status:
        told["config_problems"] = [*asked.problems]
        status_notes(told)  # that it can be shown
        return _Status(told, status_table(told))

    answer = asked.ask("status", read, _status_from_files)
    if asked.instance is not None and not answer.content.document["instances"]:
        raise asked.unknown("schedule and no backend knows")
    silent = answer.silent
    trouble = None if silent is None else {"why": silent.why.name.lower(), "message": str(silent)}
    answer.content.document["socket_trouble"] = trouble
    return answer


def _check(options: argparse.Namespace) -> int:
    from hypemand.surface.check import unknown

    try:
        verdict = _verdict(Asked.by(options))
    except StateUnreadableError as error:
        verdict = verdict_without_status(error)
    except CommandError as error:
        verdict = unknown(str(error))
    if options.json:
        findings = [{"level": finding.level.name, "text": finding.text} for finding in verdict.findings]
        print_json({"level": verdict.level.name, "summary": verdict.summary, "findings": findings})
    else:
        print(verdict.line)
    return int(verdict.level)


def _verdict(asked: Asked) -> "Verdict":
    from hypemand.core.fields import check_instant
    from hypemand.surface.check import judge

    status = _status(asked).content.document
    return judge(status, check_instant(status["at"]), asked.instance)


def verdict_without_status(error: StateUnreadableError) -> "Verdict":
    """A user who may not read the state can tell all the same that nobody listens."""
    from hypemand.surface.check import daemon_down, unknown
    from hypemand.surface.client import Silence

    if error.forbidden and error.silent is not None and error.silent.why in (Silence.ABSENT, Silence.HUNG):
        return daemon_down(str(error.silent))
    return unknown(str(error))


def plan(options: argparse.Namespace) -> int:
    """Show what will run and be pruned."""
    from hypemand.surface.plan import plan_runs, planned_document
    from hypemand.surface.render import MOST_ROWS, plan_table, show

    within = _within(options.within)
    asked = Asked.by(options)

    def read(told: "Document") -> "tuple[Document, Plan]":
        return told, plan_runs(told, within=within)

    answer = asked.ask("forecast", read, _forecast_from_files)
    told, planned = answer.content
    if asked.instance is not None and not told["instances"]:
        raise asked.unknown("schedule and no backend knows")
    tell_silence(asked, answer.silent)
    warn([*asked.problems, *told["notes"], *planned.notes])
    runs = [planned_document(instance, run) for instance, run in planned.runs]
    if options.json:
        print_json(runs)
        return OK
    table = plan_table(runs)
    more = len(table.rows) - MOST_ROWS if sys.stdout.isatty() else 0
    show(table.head(MOST_ROWS) if more > 0 else table)
    if more > 0:
        warn([f"{more} rows more; --for shows fewer, --json all"])
    return OK


def _within(text: str) -> timedelta:
    from hypemand.core.duration import parse_duration
    from hypemand.core.errors import RuleBroken

    try:
        within = parse_duration(text)
    except RuleBroken as error:
        raise CommandError(f"--for {error}", MISUSED) from None
    if within <= timedelta(0):
        raise CommandError(f"--for {text!r} must be more than zero", MISUSED)
    return within


def snapshots(options: argparse.Namespace) -> int:
    """List the snapshots kept."""
    from hypemand.surface.render import show, snapshots_table

    asked = Asked.by(options)

    def read(told: "Document") -> "tuple[Document, Table]":
        return told, snapshots_table(told)

    answer = asked.ask("snapshots", read, _snapshots_from_files)
    told, table = answer.content
    if asked.instance is not None and not told["instances"]:
        raise asked.unknown("schedule and no backend knows")
    tell_silence(asked, answer.silent)
    warn([*asked.problems, *told["problems"], *told["unlisted"]])
    if options.json:
        print_json(told["snapshots"])
    else:
        show(table)
        if options.instance and any(snapshot["restore"] for snapshot in told["snapshots"]) and sys.stderr.isatty():
            warn([f"the way back to each of them: hypemand snapshots {options.instance} --json"])
    return FAILED if told["unlisted"] and options.instance else OK


def history(options: argparse.Namespace) -> int:
    """List the runs."""
    from hypemand.surface.render import history_table, show

    asked = Asked.by(options)

    answer = asked.ask("history", _read_history, _history_from_files)
    told = answer.content
    if asked.instance is not None and not told["runs"] and not told["known"]:
        raise asked.unknown("run and no schedule of")
    tell_silence(asked, answer.silent)
    warn([*asked.problems, *told["damaged"]])
    if options.json:
        print_json(told["runs"])
    else:
        show(history_table(told["runs"]))
    return OK


def _status_from_files(asked: Asked) -> "Document":
    from hypemand.surface.documents import status_document

    return status_document(overview_from_files(asked))


def _forecast_from_files(asked: Asked) -> "Document":
    from hypemand.surface.documents import forecast_document

    return forecast_document(overview_from_files(asked))


def _snapshots_from_files(asked: Asked) -> "Document":
    from hypemand.surface.documents import snapshots_document

    return snapshots_document(overview_from_files(asked))


def _read_history(told: "Document") -> "Document":
    """Every run with every key, also those of lines that an earlier version wrote."""
    from hypemand.core.errors import InvalidInput
    from hypemand.state.codec import line_document, run_of

    runs, damaged = [], [*told["damaged"]]
    for line in told["runs"]:
        try:
            runs.append(line_document(run_of(line)))
        except InvalidInput as error:
            damaged.append(f"run {line.get('run_id')}: {error}")
    return {"runs": runs, "damaged": damaged, "known": told["known"]}


def _history_from_files(asked: Asked) -> "Document":
    import orjson

    from hypemand.core.model import InstanceId
    from hypemand.state.files import Disk
    from hypemand.state.history import read_history

    instance = None if asked.instance is None else InstanceId(asked.instance)
    known = instance is None or instance in state_from_files(asked).schedules
    history = read_history(asked.config.state_dir, Disk(), instance)
    return {"runs": [orjson.loads(line) for line in history.lines], "damaged": history.damaged, "known": known}
