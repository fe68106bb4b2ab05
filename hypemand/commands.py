"""What each command does. Each imports what it needs alone, so that none waits for another's libraries."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hypemand.config import Config
    from hypemand.core.errors import Problem
    from hypemand.surface.report import Overview, State

OK, FAILED, MISUSED, LOCKED, BAD_CONFIG = 0, 1, 2, os.EX_TEMPFAIL, os.EX_CONFIG

Command = Callable[[argparse.Namespace], int]
"""Takes the arguments, returns the exit status."""


class CommandError(Exception):
    """A command can't go on: one line for stderr that says what to do next, and an exit status."""

    def __init__(self, message: str, status: int = FAILED) -> None:
        self.status = status
        super().__init__(message)


def _load(options: argparse.Namespace) -> "tuple[Path, Config | None, list[Problem]]":
    """The config file, its content if it is valid, and its problems."""
    from hypemand.backends.registry import parse_settings
    from hypemand.config_files import find_config, load_config
    from hypemand.core.errors import InvalidInput

    path = find_config(options.config)
    try:
        return path, load_config(path, parse_settings), []
    except InvalidInput as error:
        return path, None, list(error.problems)
    except OSError as error:
        hint = (
            "; name one with --config, or copy config.example.toml there"
            if isinstance(error, FileNotFoundError)
            else ""
        )
        raise CommandError(f"config {path} can't be read: {error.strerror}{hint}", BAD_CONFIG) from None


def _tell_problems(path: Path, problems: "list[Problem]") -> int:
    for problem in problems:
        print(f"{path}: {problem}", file=sys.stderr)
    print(f"hypemand: {len(problems)} problem{'s' * (len(problems) != 1)} in {path}", file=sys.stderr)
    return BAD_CONFIG


def run(options: argparse.Namespace) -> int:
    """Run the daemon."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # who started us may ignore it, and children would vanish unseen
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the daemon listens, which reads the config anyway

    from hypemand.config_files import find_config
    from hypemand.engine.reload import file_version

    version = file_version(find_config(options.config))  # before it is read: what is edited after counts as edited
    path, config, problems = _load(options)
    if config is None:
        return _tell_problems(path, problems)
    import trio

    from hypemand.core.errors import InvalidInput
    from hypemand.daemon import StateUnusableError, run_daemon
    from hypemand.state.codec import NewerFormatError
    from hypemand.state.lock import LockHeldError
    from hypemand.surface.access import read_access
    from hypemand.surface.log import set_up_log

    try:
        access = read_access(config.api) if config.api.listen is not None else None
    except InvalidInput as error:
        return _tell_problems(path, list(error.problems))
    set_up_log(config.log)
    trouble = None
    try:
        trio.run(run_daemon, path, version, config, access)
    except* LockHeldError as held:
        trouble = CommandError(f"{_first(held)}; stop that one first", LOCKED)
    except* NewerFormatError as newer:
        trouble = _newer(newer)
    except* StateUnusableError as unusable:
        trouble = CommandError(f"{_first(unusable)}; see state_dir in {path}")
    if trouble is not None:
        raise trouble  # raised in there, it would come out in a group
    return OK


def _newer(error: BaseException) -> CommandError:
    return CommandError(f"the state is that of a newer hypemand: {_first(error)}", BAD_CONFIG)


def _first(errors: BaseException) -> BaseException:
    """The first error in *errors*, out of all the nurseries that have wrapped it."""
    while isinstance(errors, BaseExceptionGroup):
        errors = errors.exceptions[0]
    return errors


def check_config(options: argparse.Namespace) -> int:
    """Check the config and its backends."""
    path, config, problems = _load(options)
    _log_trouble()
    warnings: list[str] = []
    if config is not None:
        import trio

        from hypemand.config import config_warnings
        from hypemand.surface.checks import check_backends

        found = trio.run(check_backends, config)
        problems, warnings = found.problems, [*config_warnings(config), *found.warnings]
    if options.json:
        _print_json(
            {
                "config": str(path),
                "problems": [{"path": p.path, "message": p.message} for p in problems],
                "warnings": warnings,
            }
        )
        return BAD_CONFIG if problems else OK
    for warning in warnings:
        print(f"{path}: warning: {warning}", file=sys.stderr)
    if problems or config is None:
        return _tell_problems(path, problems)
    print(f"{path}: valid; backends: {len(config.backends)}, schedules: {len(config.schedules)}")
    return OK


def _state(options: argparse.Namespace) -> "tuple[Path, Config | None, list[Problem], State]":
    from hypemand.config_files import guess_state_dir
    from hypemand.surface.report import read_state

    path, config, problems = _load(options)
    state_dir = config.state_dir if config else guess_state_dir(path.read_bytes(), path.absolute().parent)
    if config is None:
        _warn([f"{path} is invalid; this is the state in {state_dir}"])
    _log_trouble()
    try:
        return path, config, problems, read_state(state_dir)
    except OSError as error:
        raise _state_unreadable(error, state_dir) from None


def _state_unreadable(error: OSError, state_dir: Path) -> CommandError:
    hint = (
        "run this as the user that the daemon runs as"
        if isinstance(error, PermissionError)
        else f"is {state_dir} the right state_dir?"
    )
    return CommandError(f"state can't be read: {error.filename or state_dir}: {error.strerror}; {hint}")


def _log_trouble() -> None:
    """Have what is wrong told on stderr: stdout is for the report."""
    from hypemand.config import LogConfig, LogFormat, LogLevel
    from hypemand.surface.log import set_up_log

    set_up_log(LogConfig(LogLevel.WARNING, LogFormat.CONSOLE))


def _look(options: argparse.Namespace) -> "tuple[Overview, list[str]]":
    """Everything about the instances, and the config's problems."""
    import trio

    from hypemand.surface.report import look_offline

    path, config, problems, state = _state(options)
    overview = trio.run(look_offline, state, config, options.instance)
    if options.instance is not None and not overview.instances:
        raise CommandError(f"no schedule and no backend knows an instance {options.instance!r}; see: hypemand status")
    return overview, [f"{path}: {problem}" for problem in problems]


def status(options: argparse.Namespace) -> int:
    """Show each instance."""
    from hypemand.engine.clock import SystemClock
    from hypemand.surface.documents import overview_document
    from hypemand.surface.render import show, status_notes, status_table

    overview, config_problems = _look(options)
    now = SystemClock().now()
    if options.json:
        _print_json(overview_document(overview, config_problems, now))
        return OK
    show(status_table(overview, now))
    for note in status_notes(overview, config_problems):
        print(note, file=sys.stderr)
    return OK


def plan(options: argparse.Namespace) -> int:
    """Show what will run and be pruned."""
    from datetime import timedelta

    from hypemand.core.duration import parse_duration
    from hypemand.core.errors import RuleBroken
    from hypemand.engine.clock import SystemClock
    from hypemand.surface.documents import planned_document
    from hypemand.surface.plan import MOST_RUNS, plan_runs
    from hypemand.surface.render import MOST_ROWS, plan_table, show

    try:
        within = parse_duration(options.within)
    except RuleBroken as error:
        raise CommandError(f"--for {error}", MISUSED) from None
    if within <= timedelta(0):
        raise CommandError(f"--for {options.within!r} must be more than zero", MISUSED)
    overview, config_problems = _look(options)
    planned = plan_runs(overview, now=SystemClock().now(), within=within)
    cut = [f"only the next {MOST_RUNS} runs of {instance} are shown" for instance in planned.cut]
    _warn([*config_problems, *overview.problems, *overview.warnings, *cut])
    if options.json:
        _print_json([planned_document(instance, run) for instance, run in planned.runs])
        return OK
    table = plan_table(planned.runs)
    more = len(table.rows) - MOST_ROWS if sys.stdout.isatty() else 0
    show(table.head(MOST_ROWS) if more > 0 else table)
    if more > 0:
        _warn([f"{more} rows more; --for shows fewer, --json all"])
    return OK


def snapshots(options: argparse.Namespace) -> int:
    """List the snapshots kept."""
    from hypemand.engine.clock import SystemClock
    from hypemand.surface.documents import snapshot_document
    from hypemand.surface.render import show, snapshots_table

    overview, config_problems = _look(options)
    unknown = [
        f"{v.instance_id}: snapshots can't be listed: {v.trouble}" for v in overview.instances if v.snapshots is None
    ]
    _warn([*config_problems, *overview.problems, *unknown])
    listed = [snapshot for view in overview.instances for snapshot in (*(view.snapshots or ()), *view.future)]
    if options.json:
        _print_json([snapshot_document(snapshot) for snapshot in listed])
    else:
        show(snapshots_table(listed, SystemClock().now()))
        if options.instance and any(snapshot.restore for snapshot in listed) and sys.stderr.isatty():
            _warn([f"the way back to each of them: hypemand snapshots {options.instance} --json"])
    return FAILED if unknown and options.instance else OK


def history(options: argparse.Namespace) -> int:
    """List the runs."""
    from hypemand.surface.documents import run_document
    from hypemand.surface.render import history_table, show

    path, _, problems, state = _state(options)
    runs = state.log.finished(options.instance)
    if options.instance and not runs and options.instance not in state.schedules:
        raise CommandError(f"no run and no schedule of an instance {options.instance!r}; see: hypemand status")
    _warn([*(f"{path}: {problem}" for problem in problems), *state.log.damaged])
    if options.json:
        _print_json([run_document(run) for run in runs])
    else:
        show(history_table(runs))
    return OK


def recover(options: argparse.Namespace) -> int:
    """Settle open runs."""
    import trio

    from hypemand.engine.offline import recover
    from hypemand.state.codec import NewerFormatError
    from hypemand.surface.hooks import run_hooks
    from hypemand.surface.log import set_up_log

    config = _config_or_state_dir(options)
    set_up_log(config.log)
    trouble, result = None, None
    try:
        result = trio.run(recover, config)
    except* NewerFormatError as newer:
        trouble = _newer(newer)
    except* OSError as errors:
        error = _first(errors)
        assert isinstance(error, OSError)
        trouble = _state_unreadable(error, config.state_dir)
    if trouble is not None:
        raise trouble  # raised in there, it would come out in a group
    assert result is not None
    trio.run(run_hooks, config.hooks, result.ended, config.hooks.timeout.total_seconds())
    for line in result.left:
        print(f"hypemand: still open: {line}", file=sys.stderr)
    print(result.summary)
    return FAILED if result.left else OK


def _config_or_state_dir(options: argparse.Namespace) -> "Config":
    """The config, or at least a state directory: guests may be frozen, and the run log has all that is needed."""
    from hypemand.config import Config
    from hypemand.config_files import default_state_dir, guess_state_dir

    try:
        path, config, problems = _load(options)
    except CommandError as error:
        state_dir = default_state_dir()
        if not state_dir.exists() and (options.config or os.environ.get("HYPEMAND_CONFIG")):
            raise  # "nothing to recover" would be said of another state than the one that was meant
        _warn([f"{error}; going on with the state in {state_dir}"])
        return Config(state_dir)
    if config is not None:
        return config
    _tell_problems(path, problems)
    return Config(guess_state_dir(path.read_bytes(), path.absolute().parent))


def _warn(lines: Iterable[str]) -> None:
    for line in lines:
        print(f"hypemand: {line}", file=sys.stderr)


def _print_json(document: Any) -> None:
    import orjson

    print(orjson.dumps(document, option=orjson.OPT_INDENT_2).decode())
