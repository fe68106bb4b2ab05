"""The command `import-hypeman`: what a Hypeman server has scheduled so far becomes schedules of hypemand."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import evolve, frozen

from hypemand.commands import (
    FAILED,
    MISUSED,
    OK,
    CommandError,
    StateUnreadableError,
    daemon_may_run,
    first_error,
    load,
    log_trouble,
    print_json,
    tell_problems,
    warn,
)

if TYPE_CHECKING:
    from hypemand.backends.hypeman.schedules import Found
    from hypemand.backends.hypeman.settings import HypemanSettings
    from hypemand.config import Config
    from hypemand.engine.importing import Imported, Wish
    from hypemand.surface.import_report import Row

SCHEDULES_DIR = "snapshot-schedules"
"""Below Hypeman's data directory: one JSON file for each instance."""


@frozen
class Source:
    """Where schedules come from: a server, or a directory."""

    name: str
    server: "HypemanSettings | None" = None
    directory: Path | None = None


def import_hypeman(options: argparse.Namespace) -> int:
    """Take in the schedules of a Hypeman server, or of a directory of its files."""
    from hypemand.surface.import_report import import_document, import_notes, import_table, read_row
    from hypemand.surface.render import show

    path, config, problems = load(options)
    if config is None:
        return tell_problems(path, problems)
    backend = _backend(options, config)
    source = _source(options, config, backend)
    rows = [read_row(found, backend) for found in _found(source)]
    _bring_in(options, path, config, rows)
    if options.take_over:
        _take_over(source, rows, dry_run=options.dry_run)
    if options.json:
        print_json(import_document(rows, source=source.name, backend=backend, dry_run=options.dry_run))
    elif rows:
        show(import_table(rows, dry_run=options.dry_run))
        warn(import_notes(rows, dry_run=options.dry_run, from_server=source.server is not None))
    else:
        print(f"no schedules in {source.name}")
    return OK if all(row.is_done for row in rows) else FAILED


def _hypeman_backends(config: "Config") -> "dict[str, HypemanSettings]":
    return {name: one.settings.absolute() for name, one in config.backends.items() if one.type == "hypeman"}


def _backend(options: argparse.Namespace, config: "Config") -> str:
    """The backend that the schedules are to be on."""
    if options.backend is not None:
        if options.backend not in config.backends:
            names = ", ".join(config.backends) or "none"
            raise CommandError(f"--backend {options.backend!r} is not in the config (there: {names})", MISUSED)
        return str(options.backend)
    known = _hypeman_backends(config)
    if options.url is not None:
        from hypemand.backends.hypeman.settings import in_one_way

        known = {name: one for name, one in known.items() if one.url == in_one_way(options.url)}
    if len(known) != 1:
        what = f"for {options.url}" if options.url else "of type hypeman"
        there = ", ".join(known) or "none"
        raise CommandError(
            f"the config does not have just one backend {what} ({there}): name one by --backend", MISUSED
        )
    return next(iter(known))


def _source(options: argparse.Namespace, config: "Config", backend: str) -> Source:
    if options.dir is not None:
        if options.take_over or options.url is not None:
            raise CommandError("--dir reads files: --url and --take-over need the server itself", MISUSED)
        return Source(str(options.dir), directory=options.dir)
    own = _hypeman_backends(config).get(backend)
    if options.url is None and own is None:
        raise CommandError(f"backend {backend!r} is not of type hypeman: say where from, by --url or --dir", MISUSED)
    settings = _server_settings(options, own)
    return Source(settings.url, server=settings)


def _server_settings(options: argparse.Namespace, own: "HypemanSettings | None") -> "HypemanSettings":
    from hypemand.backends.hypeman.settings import HypemanSettings, in_one_way
    from hypemand.core.errors import RulesBroken

    files = {key: given for key in ("token_file", "ca_file") if (given := getattr(options, key)) is not None}
    try:
        if own is not None and (options.url is None or in_one_way(options.url) == own.url):
            return evolve(own, **files).absolute()
        return HypemanSettings(url=options.url, **files).absolute()
    except RulesBroken as error:
        told = "; ".join(f"--{one.subpath.replace('_', '-')} {one}" for one in error.broken)
        raise CommandError(told, MISUSED) from None


def _found(source: Source) -> "list[Found]":
    if source.directory is not None:
        return _found_in(source.directory)
    import trio

    from hypemand.backends.base import BackendError
    from hypemand.backends.hypeman.schedules import read_schedules

    assert source.server is not None
    found: list[Found] = []
    trouble = None
    try:
        found = trio.run(read_schedules, source.server)
    except* BackendError as errors:
        trouble = CommandError(f"the schedules can't be read: {first_error(errors)}")
    if trouble is not None:
        raise trouble  # raised in there, it would come out in a group
    return found


def _found_in(directory: Path) -> "list[Found]":
    """The schedules in the files of *directory*, which may be Hypeman's data directory, too."""
    import orjson

    from hypemand.backends.hypeman.schedules import Found

    found = []
    try:
        home = directory / SCHEDULES_DIR if (directory / SCHEDULES_DIR).is_dir() else directory
        for path in sorted(home.iterdir()):
            if path.suffix != ".json" or path.name.startswith("."):
                continue
            try:
                found.append(Found(path.stem, orjson.loads(path.read_bytes())))
            except orjson.JSONDecodeError as error:
                found.append(Found(path.stem, problem=f"{path} is not JSON: {error}"))
    except OSError as error:
        raise CommandError(f"the schedules can't be read: {error.filename}: {error.strerror}") from None
    return found


def _bring_in(options: argparse.Namespace, path: Path, config: "Config", rows: "Sequence[Row]") -> None:
    """Have the daemon take the schedules in, or do it in its files."""
    from hypemand.engine.importing import Wish

    good = [row for row in rows if row.schedule is not None]
    wishes = [
        Wish(schedule=row.schedule, replace=options.replace, dry_run=options.dry_run)
        for row in good
        if row.schedule is not None
    ]
    if not wishes:
        return
    became = _ask_daemon(path, config, wishes) if daemon_may_run(config.state_dir) else None
    if became is None:
        became = _work_in_files(config, wishes, dry_run=options.dry_run)
    for row, one in zip(good, became, strict=True):
        row.became = one


def _ask_daemon(path: Path, config: "Config", wishes: "Sequence[Wish]") -> "list[Imported] | None":
    """What the daemon makes of *wishes*; None where there is none."""
    from hypemand.engine.importing import Imported, Outcome
    from hypemand.state.codec import to_json
    from hypemand.surface.api.imports import IMPORT, wish_document
    from hypemand.surface.client import Client, NoAnswerError, Silence, find_socket

    client = Client(find_socket(path, config))
    became: list[Imported] = []
    try:
        for wish in wishes:
            told = client.post(IMPORT, to_json(wish_document(wish)))
            became.append(Imported(Outcome(told["outcome"]), str(told["reason"])))
    except NoAnswerError as error:
        if not became and error.why is Silence.ABSENT:
            return None
        # The one that it was asked for last it may have; the next time that is seen.
        left = len(wishes) - len(became)
        became += [Imported(Outcome.REFUSED, f"the daemon gives no answer: {error}")] * left
    return became


def _work_in_files(config: "Config", wishes: "Sequence[Wish]", *, dry_run: bool) -> "list[Imported]":
    import trio

    from hypemand.engine.offline_import import import_offline
    from hypemand.state.codec import NewerFormatError
    from hypemand.state.lock import LockHeldError

    if not dry_run:
        _refuse_to_write_for_another(config.state_dir)
    log_trouble()
    became: list[Imported] = []
    trouble: CommandError | None = None
    try:
        became = trio.run(import_offline, config, wishes, dry_run)
    except* LockHeldError as held:
        trouble = CommandError(f"{first_error(held)}, which gives no answer over its socket; nothing was imported")
    except* NewerFormatError as newer:
        trouble = CommandError(f"the state is that of a newer hypemand: {first_error(newer)}")
    except* OSError as errors:
        error = first_error(errors)
        assert isinstance(error, OSError)
        trouble = StateUnreadableError(error, config.state_dir)
    if trouble is not None:
        raise trouble
    return became


def _refuse_to_write_for_another(state_dir: Path) -> None:
    """Directories that root makes here could not be opened by the user whom the daemon runs as."""
    try:
        owner = state_dir.stat().st_uid
    except OSError:
        return
    if owner != os.geteuid():
        raise CommandError(f"{state_dir} belongs to another user, as whom hypemand runs: start it, then do this again")


def _take_over(source: Source, rows: "Sequence[Row]", *, dry_run: bool) -> None:
    """Have the server delete its own schedules that hypemand has by now, durably."""
    import trio

    from hypemand.backends.hypeman.schedules import delete_schedules
    from hypemand.engine.importing import Imported

    assert source.server is not None
    ours = {row.instance_id: row for row in rows if row.is_ours}
    problems = {} if dry_run else trio.run(delete_schedules, source.server, [*ours])
    for instance, row in ours.items():
        row.taken_over = instance not in problems
        if instance in problems:
            why = f"the server's own schedule is not deleted: {problems[instance]}"
            row.became = Imported(row.became.outcome, why)
