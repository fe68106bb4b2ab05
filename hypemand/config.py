"""The config file: TOML to a frozen `Config`, with every problem listed by its dotted path."""

import ipaddress
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from attrs import Factory, frozen

from hypemand.core.errors import InvalidInput, Problem, RuleBroken
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
from hypemand.core.naming import check_instance_id
from hypemand.core.structure import new_converter, resolve_paths, structure

_PATTERN = re.compile(r"[A-Za-z0-9_*?\[\]!-][A-Za-z0-9._*?\[\]!-]{0,127}")
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
        return fnmatchcase(instance, self.instance) if self.is_pattern else instance == self.instance

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


def is_pattern(instance: str) -> bool:
    """Whether *instance* of a schedule entry is a pattern, not an id."""
    return any(character in instance for character in "*?[")


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
        *_schedule_problems(raw),
        *_api_problems(raw.get("api")),
        *_hook_problems(raw.get("hooks")),
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


def _schedule_problems(raw: Mapping[str, Any]) -> Iterator[Problem]:
    entries = raw.get("schedules")
    tables = [entry if isinstance(entry, dict) else {} for entry in entries] if isinstance(entries, list) else []
    backends = raw.get("backends")
    known = list(backends) if isinstance(backends, dict) else []
    seen: Counter[str] = Counter()
    for index, table in enumerate(tables):
        path = f"schedules[{index}]"
        instance, backend = table.get("instance"), table.get("backend")
        if isinstance(instance, str):
            yield from _instance_problems(f"{path}.instance", instance, seen)
        if backend is None and len(known) != 1:
            several = "several backends: " + ", ".join(known) if known else "no backend"
            yield Problem(f"{path}.backend", f"is missing; the config has {several}")
        if isinstance(backend, str) and backend not in known:
            yield Problem(f"{path}.backend", f"{backend!r} is not a backend here; known: {', '.join(known) or 'none'}")


def _instance_problems(path: str, instance: str, seen: Counter[str]) -> Iterator[Problem]:
    seen[instance] += 1
    if seen[instance] == 2:
        yield Problem(path, f"{instance!r} has a schedule already: one for each instance")
    if is_pattern(instance):
        if not _PATTERN.fullmatch(instance):
            yield Problem(path, f"{instance!r} must be a pattern of A-Z a-z 0-9 . _ - * ? [ ] without a leading dot")
        return
    try:
        check_instance_id(instance)
    except RuleBroken as error:
        yield Problem(path, str(error))


def _api_problems(raw: object) -> Iterator[Problem]:
    listen = raw.get("listen") if isinstance(raw, dict) else None
    if not isinstance(raw, dict) or not isinstance(listen, str):
        return
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        yield Problem("api.listen", f'{listen!r} must be an address and a port, like "127.0.0.1:8080"')
        return
    for key in ("tls_cert", "tls_key"):
        if key not in raw and not _is_loopback(host.strip("[]")):
            yield Problem(f"api.{key}", f"is missing; {host} can be reached from other machines, so it needs TLS")


def _hook_problems(raw: object) -> Iterator[Problem]:
    for key in ("on_failure", "on_success"):
        words = raw.get(key) if isinstance(raw, dict) else None
        if not isinstance(words, list) or not words:
            continue
        if any(isinstance(word, str) and "\0" in word for word in words):
            yield Problem(f"hooks.{key}", "has a NUL, which no command can be given")
        if isinstance(words[0], str) and not words[0].startswith("/"):
            why = "a service is started with a PATH, and in a directory, other than yours"
            yield Problem(f"hooks.{key}[0]", f"{words[0]!r} must be an absolute path: {why}")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


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
