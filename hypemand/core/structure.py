"""Documents to values and back, strictly: nothing is coerced, every problem is listed with its dotted path.

One cattrs converter serves the config, the state files and the API, so a
rule about a field is written once, in `RULES`.
"""

from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_origin

from attrs import evolve, fields_dict, has
from cattrs import BaseValidationError, ClassValidationError, Converter, IterableValidationError
from cattrs.cols import list_structure_factory
from cattrs.errors import ForbiddenExtraKeysError
from cattrs.gen import (
    make_dict_structure_fn,
    make_dict_unstructure_fn,
    make_mapping_structure_fn,
    override,
)

from hypemand.core.cadence import MIN_INTERVAL, check_first_run
from hypemand.core.duration import format_duration, parse_duration
from hypemand.core.errors import InvalidInput, Problem, RuleBroken, RulesBroken, join_path
from hypemand.core.model import Freezer, InstanceId, InstanceState, ManagedBy, Outcome, SnapshotKind, Trigger
from hypemand.core.naming import check_instance_id, check_metadata, check_prefix
from hypemand.core.size import parse_size

T = TypeVar("T")


def check_duration(value: object) -> timedelta:
    """*value*, a string holding a Go duration.

    Raises:
        RuleBroken: Anything else, a number included.
    """
    if not isinstance(value, str):
        raise RuleBroken(f'{value!r} must be a string holding a duration, like "90s", "15m" or "24h"')
    return parse_duration(value)


def check_interval(value: object) -> timedelta:
    """*value*, a duration of at least a minute.

    Raises:
        RuleBroken: Not a duration, or shorter.
    """
    interval = check_duration(value)
    if interval < MIN_INTERVAL:
        raise RuleBroken(f"{value!r} is too short: the interval must be at least 1m")
    return interval


def check_positive_duration(value: object) -> timedelta:
    """*value*, a duration above zero.

    Raises:
        RuleBroken: Not a duration, zero or negative.
    """
    duration = check_duration(value)
    if duration <= timedelta(0):
        raise RuleBroken(f"{value!r} must be more than zero")
    return duration


def check_max_age(value: object) -> timedelta:
    """*value*, a duration that is not negative; zero is no limit.

    Raises:
        RuleBroken: Not a duration, or negative.
    """
    age = check_duration(value)
    if age < timedelta(0):
        raise RuleBroken(f"{value!r} must not be negative; leave max_age out for no limit by age")
    return age


def check_max_count(value: object) -> int:
    """*value*, a whole number of 0 or more; zero is no limit.

    Raises:
        RuleBroken: Anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise RuleBroken(f"{value!r} must be a whole number of 0 or more (0 is no limit by count)")
    return value


def check_positive_int(value: object) -> int:
    """*value*, a whole number of at least one.

    Raises:
        RuleBroken: Anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise RuleBroken(f"{value!r} must be a whole number of 1 or more")
    return value


def check_instant(value: object) -> datetime:
    """*value*, an RFC 3339 time with its offset, as aware UTC; parts finer than a microsecond are cut off.

    Raises:
        RuleBroken: Not a time, no offset, or outside the years 1 to 9999.
    """
    try:
        instant = datetime.fromisoformat(value) if isinstance(value, str) else None
        if instant is not None and instant.tzinfo is not None:
            return instant.astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    raise RuleBroken(f'{value!r} must be a time with its offset, like "2026-03-09T01:00:00Z"')


def format_instant(instant: datetime) -> str:
    """RFC 3339 in UTC with ``Z``."""
    return instant.astimezone(UTC).isoformat().replace("+00:00", "Z")


def _exactly(wanted: type, word: str) -> Callable[[object], Any]:
    def check(value: object) -> Any:
        if type(value) is wanted:
            return value
        raise RuleBroken(f"{value!r} must be {word}")

    return check


def check_path(value: object) -> Path:
    """*value*, a file name; ``~`` stands for the home directory.

    Raises:
        RuleBroken: Not a string, empty, with a NUL, or in the home directory of nobody.
    """
    if not isinstance(value, str) or not value or "\0" in value:
        raise RuleBroken(f"{value!r} must be a path")
    try:
        return Path(value).expanduser()
    except RuntimeError:
        raise RuleBroken(f"{value!r} must be a path, but there is no such home directory") from None


def _check_number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RuleBroken(f"{value!r} must be a number")
    return float(value)


RULES: dict[Any, Callable[[object], Any]] = {
    bool: _exactly(bool, "true or false"),
    int: _exactly(int, "a whole number"),
    str: _exactly(str, "a string"),
    float: _check_number,
    timedelta: check_duration,
    datetime: check_instant,
    Path: check_path,
    InstanceId: check_instance_id,
    "interval": check_interval,
    "positive duration": check_positive_duration,
    "max_age": check_max_age,
    "max_count": check_max_count,
    "positive int": check_positive_int,
    "name_prefix": check_prefix,
    "first_run": check_first_run,
    "size": parse_size,
    "metadata": check_metadata,
}
"""What a field may hold, by its type, or by the name that an Annotated type of `model` carries."""


def new_converter(*, omit_defaults: bool = True, words: Iterable[type[Enum]] = ()) -> Converter:
    """A strict converter. Unknown keys are errors, but for classes with an ``extra`` field, which keep them.

    Args:
        omit_defaults: Leave out, on the way back, what has its default value.
        words: Enums beside those of `model` that the documents hold.
    """
    converter = Converter(detailed_validation=True)
    for kind, rule in RULES.items():
        if not isinstance(kind, str):
            converter.register_structure_hook(kind, _ignoring_type(rule))
    converter.register_structure_hook_factory(
        lambda kind: hasattr(kind, "__metadata__"), lambda kind: _ignoring_type(RULES[kind.__metadata__[0]])
    )
    converter.register_structure_hook_factory(_is_list, lambda kind: _list_hook(converter, kind))
    converter.register_structure_hook_factory(_is_table, lambda kind: _table_hook(converter, kind))
    for word_type in (Freezer, InstanceState, ManagedBy, Outcome, SnapshotKind, Trigger, *words):
        converter.register_structure_hook(word_type, _check_word)
    converter.register_unstructure_hook(datetime, format_instant)
    converter.register_unstructure_hook(timedelta, format_duration)
    converter.register_unstructure_hook(Path, str)
    converter.register_structure_hook_factory(has, lambda cls: _class_hook(converter, cls))
    converter.register_unstructure_hook_factory(
        has, lambda cls: _class_unhook(converter, cls, omit_defaults=omit_defaults)
    )
    return converter


def _ignoring_type(rule: Callable[[object], Any]) -> Callable[[object, Any], Any]:
    return lambda value, _: rule(value)


def _is_list(kind: Any) -> bool:
    return get_origin(kind) is list or (get_origin(kind) is tuple and get_args(kind)[1:] == (...,))


def _list_hook(converter: Converter, kind: Any) -> Callable[[Any, Any], Any]:
    """As cattrs does it, but for strings and tables: those it would take for lists of their characters or keys."""
    inner, shape = list_structure_factory(kind, converter), get_origin(kind)

    def structure_list(value: Any, _: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            raise RuleBroken(f"{value!r} must be a list")
        return shape(inner(value, kind))

    return structure_list


def _is_table(kind: Any) -> bool:
    return get_origin(kind) in (dict, Mapping)


def _table_hook(converter: Converter, kind: Any) -> Callable[[Any, Any], Any]:
    inner = make_mapping_structure_fn(kind, converter, detailed_validation=True)

    def structure_table(value: Any, _: Any) -> Any:
        if not isinstance(value, Mapping):
            raise RuleBroken(f"{value!r} must be a table of keys and values")
        return inner(value, kind)

    return structure_table


def _check_word(value: object, words: type[Enum]) -> Enum:
    for word in words:
        if word.value == value:
            return word
    raise RuleBroken(f"{value!r} must be one of " + ", ".join(str(word.value) for word in words))


def _class_hook(converter: Converter, cls: type[Any]) -> Callable[[Any, Any], Any]:
    keeps_extra = "extra" in fields_dict(cls)
    known = frozenset(fields_dict(cls)) - {"extra"}
    # Forbidden keys are reported by hand, so that each gets its own path and a suggestion.
    options: dict[str, Any] = {"extra": override(omit=True)} if keeps_extra else {}
    inner = make_dict_structure_fn(cls, converter, _cattrs_forbid_extra_keys=not keeps_extra, **options)

    def structure_class(value: Any, _: Any) -> Any:
        if not isinstance(value, Mapping):
            raise RuleBroken(f"{value!r} must be a table of keys and values")
        made = inner(cast("Mapping[str, Any]", value), cls)
        if keeps_extra and not value.keys() <= known:
            return evolve(made, extra={key: value[key] for key in value if key not in known})
        return made

    return structure_class


def _class_unhook(converter: Converter, cls: type[Any], *, omit_defaults: bool) -> Callable[[Any], dict[str, Any]]:
    keeps_extra = "extra" in fields_dict(cls)
    options: dict[str, Any] = {"extra": override(omit=True)} if keeps_extra else {}
    inner = make_dict_unstructure_fn(cls, converter, _cattrs_omit_if_default=omit_defaults, **options)
    if not keeps_extra:
        return inner
    return lambda value: {**inner(value), **value.extra}


def structure(converter: Converter, value: object, cls: type[T]) -> T:
    """*value* as a *cls*.

    Raises:
        InvalidInput: With every problem found, each with its dotted path.
    """
    try:
        return converter.structure(value, cls)
    except (BaseValidationError, RuleBroken, RulesBroken) as error:
        raise InvalidInput(_problems(error, "")) from None


def resolve_paths(value: T, base: Path) -> T:
    """*value*, an attrs object, with each relative path in its fields and their tuples taken from *base*."""
    changed: dict[str, Any] = {}
    for name in fields_dict(cast("Any", type(value))):
        changed[name] = _resolved(getattr(value, name), base)
    return cast("T", evolve(cast("Any", value), **changed))


def _resolved(held: Any, base: Path) -> Any:
    if isinstance(held, Path):
        return base / held
    if isinstance(held, tuple):
        return tuple(_resolved(one, base) for one in held)
    return resolve_paths(held, base) if has(type(held)) else held


def _problems(error: BaseException, path: str) -> list[Problem]:
    if isinstance(error, ClassValidationError):
        noted, others = error.group_exceptions()
        found = [p for inner, note in noted for p in _problems(inner, join_path(path, note.name))]
        return found + [p for inner in others for p in _unnoted(inner, path)]
    if isinstance(error, IterableValidationError):
        items, others = error.group_exceptions()
        found = []
        for inner, item in items:
            step = f"[{item.index}]" if isinstance(item.index, int) else str(item.index)
            found += _problems(inner, join_path(path, step))
        return found + [p for inner in others for p in _problems(inner, path)]
    if isinstance(error, RulesBroken):
        return [p for one in error.broken for p in _problems(one, path)]
    if isinstance(error, RuleBroken):
        return [Problem(join_path(path, error.subpath), str(error))]
    if isinstance(error, KeyError):
        return [Problem(path, "is missing; it is required")]
    return [Problem(path, str(error) or type(error).__name__)]


def _unnoted(error: BaseException, path: str) -> list[Problem]:
    if isinstance(error, ForbiddenExtraKeysError):
        known = [name for name in fields_dict(cast("Any", error.cl)) if name != "extra"]
        return [_unknown_key(path, str(key), known) for key in sorted(error.extra_fields)]
    return _problems(error, path)


def _unknown_key(path: str, key: str, known: list[str]) -> Problem:
    close = get_close_matches(key, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else "known here: " + ", ".join(sorted(known))
    return Problem(join_path(path, key), f"unknown key; {hint}")
