"""The command line: arguments, help, streams and exit status. What the commands do is in `commands`."""

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hypemand import __version__, commands, importing, reports
from hypemand.commands import FAILED, OK, CommandError
from hypemand.garbage import look_seldom

_ABOUT = """\
Periodic snapshots of virtual machines that never leave a guest frozen.

hypemand reads schedules from its config and its state directory, pauses,
captures and resumes each instance on time, and prunes by age and count.
"""
_EPILOG = """\
To begin: copy config.example.toml, then run
  hypemand check-config -c FILE     what is wrong with it, all of it
  hypemand run -c FILE              the daemon, in the foreground
  hypemand status -c FILE           what it does, and what it did
  hypemand run-now -c FILE INSTANCE a snapshot at once

With a daemon running, status, plan, snapshots, history and recover ask it
over its socket ([api] socket): its owner and group may, without access to the
state. Without one they work from the files and the hypervisors; run-now needs
the daemon. `status --check` is for monitoring.

The config is found at --config, $HYPEMAND_CONFIG, /etc/hypemand/config.toml,
or ~/.config/hypemand/config.toml. Send the daemon SIGHUP to have edits taken
up at once; otherwise that takes a few seconds. SIGTERM or SIGINT ends it.

exit status: 0 done; 1 failed; 2 wrong arguments; 75 another daemon holds the
state; 78 bad config, or the state of a newer hypemand; `status --check` has
0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN
"""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command, and exit."""
    _open_missing_streams()
    look_seldom()
    status = 128 + signal.SIGINT
    try:
        status = _run_command(arguments)
    except* KeyboardInterrupt:
        pass
    sys.exit(status)


def _run_command(arguments: Sequence[str] | None) -> int:
    try:
        try:
            options = _parser().parse_args(arguments)
            _import_structlog()
            status: int = options.command(options)
        finally:
            sys.stdout.flush()
    except CommandError as error:
        print(f"hypemand: {error}", file=sys.stderr)
        return error.status
    except BrokenPipeError:  # the reader of a pipe has seen enough
        _drop_stdout()
        return OK
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise
        _drop_stdout()
        print(f"hypemand: output can't be written: {error.strerror}", file=sys.stderr)
        return FAILED
    return status


def _import_structlog() -> None:
    """Without rich, which it takes where there is one, for tracebacks of a kind that is not printed here.

    That would be a sixth of the time of a command, and as much memory as hundreds of schedules.
    """
    if "structlog" not in sys.modules and "rich" not in sys.modules:
        sys.modules["rich"] = None  # type: ignore[assignment] # by Python's rules: it can't be imported
        try:
            import structlog  # noqa: F401
        finally:
            del sys.modules["rich"]


def _open_missing_streams() -> None:
    """Where a stream was closed by who started us: else the next file that is opened would take its place."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            while (opened := os.open(os.devnull, os.O_RDWR)) < descriptor:
                pass
            os.set_inheritable(opened, True)  # else the first file of a child would take its place there
            setattr(sys, name, os.fdopen(opened, "r" if name == "stdin" else "w"))


def _drop_stdout() -> None:
    """Have what is still in its buffer written to nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _add_import(add: Callable[..., Any]) -> None:
    sub = add(
        "import-hypeman",
        importing.import_hypeman,
        "take over the snapshot schedules of a Hypeman server",
        "They keep their cadence, retention, metadata and last run. From the server of the config's backend of type"
        " hypeman, from --url, or from a directory of Hypeman's files (in its data directory: snapshot-schedules)."
        " Works with the running daemon, and without one. Done again, it changes nothing. Begin with --dry-run."
        " Exit status: 0 all done, 1 some not.",
    )
    sub.add_argument("--url", metavar="URL", help="the server, where it is not the backend's own")
    sub.add_argument("--token-file", type=Path, metavar="FILE", help="holds its token; mode 0600")
    sub.add_argument("--ca-file", type=Path, metavar="FILE", help="certificates to trust instead of the system's")
    sub.add_argument("--dir", type=Path, metavar="DIR", help="read files instead of a server")
    sub.add_argument("--backend", metavar="NAME", help="the backend that has the instances here")
    sub.add_argument("--replace", action="store_true", help="replace schedules that are there already and differ")
    sub.add_argument(
        "--take-over",
        action="store_true",
        help="have the server delete its own schedule of each instance, once hypemand has it safely",
    )
    sub.add_argument("--dry-run", action="store_true", help="change nothing; tell what would be done")
    sub.add_argument("--json", action="store_true", help="one JSON document on stdout, for programs")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hypemand",
        description=_ABOUT,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hypemand {__version__}")
    parser.add_argument("-c", "--config", metavar="FILE", help="the config file")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, command: commands.Command, about: str, more: str = "") -> Any:
        sub = subparsers.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}. {more}".strip())
        # Here and above, so that it may stand on either side of the command.
        sub.add_argument("-c", "--config", metavar="FILE", default=argparse.SUPPRESS, help="the config file")
        sub.set_defaults(command=command)
        return sub

    add("run", commands.run, "run the daemon in the foreground", "The log goes to stderr.")
    check = add(
        "check-config",
        commands.check_config,
        "check the config and its backends, and list every problem",
        "Each scheduled instance is asked for its state, and whether it could be captured now; nothing is changed.",
    )
    check.add_argument("--no-instances", action="store_true", help="do not ask the instances one by one")
    status = add(
        "status",
        reports.status,
        "show each instance: state, next and last run, snapshots kept, errors",
        "FREEZE is how long the guest stood still in the last run, LONGEST the record against its budget. Instances"
        " that no schedule covers are shown as uncovered. Says when the daemon is down, and answers all the same.",
    )
    plan = add(
        "plan",
        reports.plan,
        "show what will run and what will be pruned, and why",
        "Worked out from the schedules and snapshots as they are now, as if every run succeeded.",
    )
    snapshots = add(
        "snapshots",
        reports.snapshots,
        "list the scheduled snapshots that are kept",
        "With --json, each has the commands that bring it back.",
    )
    history = add("history", reports.history, "list the runs, newest last", "Those by run-now are marked as manual.")
    run_now = add(
        "run-now",
        commands.run_now,
        "have a snapshot taken at once, by the running daemon, and wait for it",
        "Tells of each step on stderr, and ends with the snapshot's id on stdout. Retention prunes after it as after"
        " any other run; the schedule's next run stays where it is. Ctrl-C leaves the run going. Exit status: 0"
        " taken, 1 failed or refused.",
    )
    run_now.add_argument("instance", metavar="INSTANCE", help="an instance with a schedule")
    run_now.add_argument("--json", action="store_true", help="the run's line of the history on stdout, for programs")
    add(
        "recover",
        commands.recover,
        "settle runs that a crash left open, so that every guest runs",
        "Beside a living daemon it has that one try again at once, and waits a few seconds.",
    )
    _add_import(add)
    for sub in (check, status, plan, snapshots, history):
        sub.add_argument("--json", action="store_true", help="one JSON document on stdout, for programs")
    for sub in (status, plan, snapshots, history):
        sub.add_argument("instance", nargs="?", metavar="INSTANCE", help="this instance alone")
    status.add_argument(
        "--check",
        action="store_true",
        help="one line for monitoring: no good snapshot for two intervals, failing runs, frozen guests, a daemon"
        " that is down are critical; exit status 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN",
    )
    plan.add_argument(
        "--for", dest="within", default="24h", metavar="DURATION", help="how far to look ahead, like 12h or 168h (24h)"
    )
    return parser
