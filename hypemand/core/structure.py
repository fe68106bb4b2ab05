"""Documents to values and back, strictly: nothing is coerced, every problem is listed with its dotted path.

One cattrs converter serves the config, the state files and the API, so a
rule about a field is written once, in `fields.RULES`.
"""

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta
from difflib import get_close_matches
from enum import Enum
from functools import lru_cache
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

from hypemand.core.duration import format_duration
from hypemand.core.errors import InvalidInput, Problem, RuleBroken, RulesBroken, join_path
from hypemand.core.fields import RULES, format_instant
from hypemand.core.model import Freezer, InstanceState, ManagedBy, Outcome, RestoreAction, SnapshotKind, Trigger

T = TypeVar("T")


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
    of_model: list[type[Enum]] = [Freezer, InstanceState, ManagedBy, Outcome, RestoreAction, SnapshotKind, Trigger]
    for word_type in (*of_model, *words):
        converter.register_structure_hook(word_type, _word_hook(word_type))
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


def _word_hook(words: type[Enum]) -> Callable[[Any, Any], Enum]:
    known = {word.value: word for word in words}

    def structure_word(value: Any, _: Any) -> Enum:
        word = known.get(value) if isinstance(value, str) else None
        if word is None:
            raise RuleBroken(f"{value!r} must be one of " + ", ".join(map(str, known)))
        return word

    return structure_word


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


def share_equal(converter: Converter, cls: type[Any]) -> None:
    """Have *converter* make one object of tables that say the same, which many documents do: *cls* is immutable."""
    inner = converter.get_structure_hook(cls)

    @lru_cache(maxsize=1000)
    def made_of(items: tuple[tuple[str, type, Any], ...]) -> Any:
        return inner({key: value for key, _, value in items}, cls)

    def structure_shared(value: Any, _: Any) -> Any:
        try:
            key = tuple([(key, type(held), held) for key, held in value.items()])  # as True equals 1
            hash(key)
        except (AttributeError, TypeError):  # no table, or not one of plain values
            return inner(value, cls)
        return made_of(key)

    converter.register_structure_hook(cls, structure_shared)


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
