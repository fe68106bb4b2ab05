"""What each command does. Each imports what it needs alone, so that none waits for another's libraries."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hypemand.config import Config
    from hypemand.core.errors import Problem
    from hypemand.surface.client import NoAnswerError
    from hypemand.surface.run_progress import Progress

OK, FAILED, MISUSED, LOCKED, BAD_CONFIG = 0, 1, 2, os.EX_TEMPFAIL, os.EX_CONFIG

Command = Callable[[argparse.Namespace], int]
"""Takes the arguments, returns the exit status."""


class CommandError(Exception):
    """A command can't go on: one line for stderr that says what to do next, and an exit status."""

    def __init__(self, message: str, status: int = FAILED) -> None:
        self.status = status
        super().__init__(message)


class StateUnreadableError(CommandError):
    """The state can't be read. *silent*: nor does a daemon answer."""

    def __init__(self, error: OSError, state_dir: Path, silent: "NoAnswerError | None" = None) -> None:
        self.silent = silent
        self.forbidden = isinstance(error, PermissionError)
        hint = (
            "run this as the user that the daemon runs as" if self.forbidden else f"is {state_dir} the right state_dir?"
        )
        nor = f"; nor does the daemon answer: {silent}" if silent else ""
        super().__init__(f"state can't be read: {error.filename or state_dir}: {error.strerror}; {hint}{nor}")


def load(options: argparse.Namespace) -> "tuple[Path, Config | None, list[Problem]]":
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


def tell_problems(path: Path, problems: "list[Problem]") -> int:
    """Tell *problems* of the config at *path* on stderr; the exit status for that."""
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
    path, config, problems = load(options)
    if config is None:
        return tell_problems(path, problems)
    import trio

    from hypemand.core.errors import InvalidInput
    from hypemand.daemon import StateUnusableError, run_daemon
    from hypemand.state.codec import NewerFormatError
    from hypemand.state.lock import LockHeldError
    from hypemand.surface.http.access import read_access
    from hypemand.surface.log import set_up_log

    try:
        access = read_access(config.api) if config.api.listen is not None else None
    except InvalidInput as error:
        return tell_problems(path, list(error.problems))
    set_up_log(config.log)
    trouble = None
    try:
        trio.run(run_daemon, path, version, config, access)
    except* LockHeldError as held:
        trouble = CommandError(f"{first_error(held)}; stop that one first", LOCKED)
    except* NewerFormatError as newer:
        trouble = _newer(newer)
    except* StateUnusableError as unusable:
        trouble = CommandError(f"{first_error(unusable)}; see state_dir in {path}")
    if trouble is not None:
        raise trouble  # raised in there, it would come out in a group
    return OK


def _newer(error: BaseException) -> CommandError:
    return CommandError(f"the state is that of a newer hypemand: {first_error(error)}", BAD_CONFIG)


def first_error(errors: BaseException) -> BaseException:
    """The first error in *errors*, out of all the nurseries that have wrapped it."""
    while isinstance(errors, BaseExceptionGroup):
        errors = errors.exceptions[0]
    return errors


def check_config(options: argparse.Namespace) -> int:
    """Check the config and its backends."""
    path, config, problems = load(options)
    log_trouble()
    warnings: list[str] = []
    if config is not None:
        import trio

        from hypemand.config import config_warnings
        from hypemand.surface.checks import check_backends

        found = trio.run(partial(check_backends, config, instances=not options.no_instances))
        problems, warnings = found.problems, [*config_warnings(config), *found.warnings]
    if options.json:
        print_json(
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
        return tell_problems(path, problems)
    print(f"{path}: valid; backends: {len(config.backends)}, schedules: {len(config.schedules)}")
    return OK


def log_trouble() -> None:
    """Have what is wrong told on stderr: stdout is for the report."""
    from hypemand.config import LogConfig, LogFormat, LogLevel
    from hypemand.surface.log import set_up_log

    set_up_log(LogConfig(LogLevel.WARNING, LogFormat.CONSOLE))


def run_now(options: argparse.Namespace) -> int:
    """Have the daemon do a run at once, and tell of it as it goes on."""
    from hypemand.surface.run_progress import Progress

    progress = Progress(options.instance)
    try:
        _follow_run(options, progress)
    except KeyboardInterrupt:
        warn([progress.left_alone])
        raise
    run = progress.run
    if run is None:
        raise CommandError(progress.no_end)
    if options.json:
        print_json(run)
    elif run["snapshot_id"]:
        print(run["snapshot_id"])
    if run["outcome"] != "succeeded":
        raise CommandError(f"{options.instance}: the run {run['outcome']}: {run['error']}")
    return OK


def _follow_run(options: argparse.Namespace, progress: "Progress") -> None:
    from hypemand.config_files import guess_config
    from hypemand.surface.client import Client, NoAnswerError, RefusedError, find_socket

    path, config, problems = load(options)
    warn(f"{path}: {problem}" for problem in problems)
    client = Client(find_socket(path, config or guess_config(path.read_bytes(), path.absolute().parent)))
    try:
        for told in client.run_now(options.instance):
            for line in progress.take(told):
                print(line, file=sys.stderr, flush=True)
    except RefusedError as error:
        raise CommandError(f"{options.instance}: {error}; see: hypemand status {options.instance}") from None
    except NoAnswerError as error:
        raise CommandError(progress.cut_short(error) or _no_daemon(error, path)) from None


def _no_daemon(error: "NoAnswerError", config_path: Path) -> str:
    from hypemand.surface.client import Silence

    if error.why is Silence.ABSENT:
        return f"run-now needs a running daemon; start it: hypemand run -c {config_path} ({error})"
    return f"the daemon can't be asked: {error}"


def recover(options: argparse.Namespace) -> int:
    """Settle open runs, or have a daemon do it."""
    import trio

    from hypemand.engine.offline import recover
    from hypemand.state.codec import NewerFormatError
    from hypemand.surface.hooks.hooks import run_hooks
    from hypemand.surface.log import set_up_log

    config_path, config = _config_or_guess(options)
    asked = _ask_to_recover(config_path, config) if daemon_may_run(config.state_dir) else None
    if asked is not None:
        return asked
    set_up_log(config.log)
    trouble, result = None, None
    try:
        result = trio.run(recover, config)
    except* NewerFormatError as newer:
        trouble = _newer(newer)
    except* OSError as errors:
        error = first_error(errors)
        assert isinstance(error, OSError)
        trouble = StateUnreadableError(error, config.state_dir)
    if trouble is not None:
        raise trouble  # raised in there, it would come out in a group
    assert result is not None
    trio.run(run_hooks, config.hooks, result.ended, config.hooks.timeout.total_seconds())
    return _tell_recovered(result.summary, result.left)


def daemon_may_run(state_dir: Path) -> bool:
    """Whether a daemon may have *state_dir*, or another one that we don't know of.

    Who holds the lock tells. A socket that the service manager keeps open
    does not: there nobody would answer, while guests stand still.
    """
    from hypemand.state.lock import lock_owner

    try:
        owner = lock_owner(state_dir)
        return not (state_dir / "lock").exists() or (owner is not None and owner.role not in ("guard", "recover"))
    except OSError:
        return True


def _ask_to_recover(config_path: Path, config: "Config") -> int | None:
    """Have the daemon settle what is open; None where none can be asked."""
    from hypemand.surface.client import Client, NoAnswerError, find_socket

    try:
        told = Client(find_socket(config_path, config)).post("/control/recover")
        under_way, left, pid = told["under_way"], told["left"], told["pid"]
    except (NoAnswerError, KeyError):
        return None
    going_on = f"; under way there: {', '.join(under_way)}" if under_way else ""
    return _tell_recovered(f"left to hypemand daemon (pid {pid}), which settles open runs itself{going_on}", left)


def _tell_recovered(summary: str, left: Iterable[str]) -> int:
    left = list(left)
    for line in left:
        print(f"hypemand: still open: {line}", file=sys.stderr)
    print(summary)
    return FAILED if left else OK


def _config_or_guess(options: argparse.Namespace) -> "tuple[Path, Config]":
    """The config, or at least where state lives: guests may be frozen, and the run log has all that is needed."""
    from hypemand.config import Config
    from hypemand.config_files import default_state_dir, find_config, guess_config

    try:
        path, config, problems = load(options)
    except CommandError as error:
        state_dir = default_state_dir()
        if not state_dir.exists() and (options.config or os.environ.get("HYPEMAND_CONFIG")):
            raise  # "nothing to recover" would be said of another state than the one that was meant
        warn([f"{error}; going on with the state in {state_dir}"])
        return find_config(options.config), Config(state_dir)
    if config is not None:
        return path, config
    tell_problems(path, problems)
    return path, guess_config(path.read_bytes(), path.absolute().parent)


def warn(lines: Iterable[str]) -> None:
    """Tell *lines* on stderr."""
    for line in lines:
        print(f"hypemand: {line}", file=sys.stderr)


def print_json(document: Any) -> None:
    """*document* on stdout, for programs."""
    import orjson

    from hypemand.state.codec import to_json

    print(to_json(document, orjson.OPT_INDENT_2).decode())
