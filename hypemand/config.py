"""The config file: TOML to a frozen `Config`, with every problem listed by its dotted path."""

import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from enum import StrEnum
from fnmatch import translate
from pathlib import Path
from typing import Any

from attrs import Factory, frozen

from hypemand.config_rules import api_problems, hook_problems, is_pattern, schedule_problems
from hypemand.core.errors import InvalidInput, Problem
from hypemand.core.model import (
    FirstRun,
    InstanceId,
    Interval,
    MaxAge,
    MaxCount,
    Metadata,
    NamePrefix,
    PositiveDuration,
    PositiveInt,
    Retention,
    Size,
)
from hypemand.core.structure import new_converter, resolve_paths, structure

_BACKEND_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,62}")
_OURS = frozenset({"type", "concurrency"})


class LogLevel(StrEnum):
    """Least severe level that is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogFormat(StrEnum):
    """How the log is written. Auto: for people on a terminal, JSON lines otherwise."""

    AUTO = "auto"
    CONSOLE = "console"
    JSON = "json"


@frozen
class LogConfig:
    """The table ``[log]``."""

    level: LogLevel = LogLevel.INFO
    format: LogFormat = LogFormat.AUTO


@frozen
class ApiConfig:
    """The table ``[api]``. Whether there are tokens for *listen* is checked where the environment is known."""

    socket: Path | None = None
    listen: str | None = None
    tokens_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None


@frozen
class RunsConfig:
    """The table ``[runs]``."""

    concurrency: PositiveInt = 4
    max_freeze: PositiveDuration = timedelta(minutes=2)
    capture_timeout: PositiveDuration = timedelta(hours=1)
    shutdown_grace: PositiveDuration = timedelta(seconds=30)
    min_free: Size = 1024**3
    guard: bool = True


@frozen
class HooksConfig:
    """The table ``[hooks]``: commands, without a shell; an empty one is none."""

    on_failure: tuple[str, ...] = ()
    on_success: tuple[str, ...] = ()
    timeout: PositiveDuration = timedelta(minutes=1)


@frozen
class BackendConfig:
    """One table below ``[backends]``; *settings* are those of its type."""

    type: str
    settings: Any
    concurrency: int | None = None


@frozen
class RetentionEntry:
    """The key ``retention`` of a schedule."""

    max_age: MaxAge | None = None
    max_count: MaxCount | None = None


@frozen(kw_only=True)
class ScheduleEntry:
    """One table of ``[[schedules]]``. *instance* is an id, or a pattern with ``*``, ``?`` or ``[...]``."""

    instance: str
    interval: Interval
    backend: str | None = None
    retention: RetentionEntry = RetentionEntry()
    name_prefix: NamePrefix | None = None
    metadata: Metadata = Factory(dict)
    first_run: FirstRun | None = None
    max_freeze: PositiveDuration | None = None
    enabled: bool = True

    @property
    def is_pattern(self) -> bool:
        """Whether it takes in every instance that matches."""
        return is_pattern(self.instance)

    def matches(self, instance: InstanceId) -> bool:
        """Whether *instance* is, or matches, the one named here."""
        return bool(self.matching([instance]))

    def matching(self, instances: Iterable[InstanceId]) -> list[InstanceId]:
        """Those of *instances* that are, or match, the one named here, in their order."""
        if not self.is_pattern:
            return [instance for instance in instances if instance == self.instance]
        match = re.compile(translate(self.instance)).match  # as `fnmatchcase` does
        return [instance for instance in instances if match(instance)]

    def kept(self) -> Retention:
        """The retention as schedules have it."""
        return Retention(self.retention.max_age, self.retention.max_count)


@frozen
class Config:
    """The whole file. Every path in it is absolute."""

    state_dir: Path
    log: LogConfig = LogConfig()
    api: ApiConfig = ApiConfig()
    runs: RunsConfig = RunsConfig()
    hooks: HooksConfig = HooksConfig()
    backends: Mapping[str, BackendConfig] = Factory(dict)
    schedules: tuple[ScheduleEntry, ...] = ()

    def backend_of(self, entry: ScheduleEntry) -> str:
        """Name of the backend of *entry*: its own, or the only one."""
        return entry.backend or next(iter(self.backends))


@frozen
class _Document:
    """The file's shape, before backends' settings are checked by their types."""

    state_dir: Path | None = None
    log: LogConfig = LogConfig()
    api: ApiConfig = ApiConfig()
    runs: RunsConfig = RunsConfig()
    hooks: HooksConfig = HooksConfig()
    backends: Mapping[str, Mapping[str, Any]] = Factory(dict)
    schedules: tuple[ScheduleEntry, ...] = ()


@frozen
class _BackendHead:
    """What every backend table has."""

    type: str
    concurrency: PositiveInt | None = None


_CONVERTER = new_converter(words=(LogLevel, LogFormat))

ParseSettings = Callable[[str, Mapping[str, Any]], Any]
"""Type name and table of a backend to its settings; raises InvalidInput with paths relative to the table."""


def parse_config(data: bytes, base: Path, state_dir: Path, parse_settings: ParseSettings) -> Config:
    """The config in *data*.

    Args:
        base: Relative paths are taken from this directory.
        state_dir: Where state lives when the config does not say.

    Raises:
        InvalidInput: With every problem found.
    """
    raw = _parse_toml(data)
    problems: list[Problem] = []
    document = _Document()
    try:
        document = structure(_CONVERTER, raw, _Document)
    except InvalidInput as error:
        problems += error.problems
    backends, backend_problems = _parse_backends(raw.get("backends"), base, parse_settings)
    problems += [
        *backend_problems,
        *schedule_problems(raw),
        *api_problems(raw.get("api")),
        *hook_problems(raw.get("hooks")),
    ]
    if problems:
        raise InvalidInput(dict.fromkeys(problems))
    return Config(
        state_dir=base / (document.state_dir or state_dir),
        log=document.log,
        api=resolve_paths(document.api, base),
        runs=document.runs,
        hooks=document.hooks,
        backends=backends,
        schedules=document.schedules,
    )


def _parse_toml(data: bytes) -> dict[str, Any]:
    try:
        raw = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput([Problem("", f"is not TOML: {error}")]) from None
    if not raw:
        raise InvalidInput([Problem("", "is empty: nothing is configured")])
    return raw


def _parse_backends(
    raw: object, base: Path, parse_settings: ParseSettings
) -> tuple[dict[str, BackendConfig], list[Problem]]:
    backends: dict[str, BackendConfig] = {}
    problems: list[Problem] = []
    for name, table in raw.items() if isinstance(raw, dict) else ():
        path = f"backends.{name}"
        if not _BACKEND_NAME.fullmatch(name):
            problems.append(Problem(path, "a backend's name must be 1 to 63 of A-Z a-z 0-9 . _ -, no leading dot"))
        if not isinstance(table, dict):
            continue  # the document's own problem
        try:
            head = structure(_CONVERTER, {key: table[key] for key in table.keys() & _OURS}, _BackendHead)
            own = {key: value for key, value in table.items() if key not in _OURS}
            settings = resolve_paths(parse_settings(head.type, own), base)
            backends[name] = BackendConfig(head.type, settings, head.concurrency)
        except InvalidInput as error:
            problems += [problem.under(path) for problem in error.problems]
    return backends, problems


GUARD_OFF = (
    "runs.guard is off: a guest that is frozen when hypemand is killed or hangs stays so until the next start,"
    " or `hypemand recover`"
)


def config_warnings(config: Config) -> list[str]:
    """What is allowed in *config*, but worth a second look."""
    warnings = [
        f"schedules[{index}].retention: {entry.instance!r} sets no limit: its snapshots are kept for ever"
        for index, entry in enumerate(config.schedules)
        if entry.kept().keeps_everything
    ]
    if not config.schedules:
        warnings.append("schedules: there are none")
    if not config.runs.guard:
        warnings.append(GUARD_OFF)
    return warnings
