"""Go durations: parsed exactly as Go's ``time.ParseDuration`` does, written short."""

import re
from datetime import timedelta
from functools import lru_cache

from hypemand.core.errors import RuleBroken

_UNITS_NS = {
    "ns": 1,
    "us": 1_000,
    "\u00b5s": 1_000,  # micro sign
    "\u03bcs": 1_000,  # Greek letter mu
    "ms": 1_000_000,
    "s": 1_000_000_000,
    "m": 60_000_000_000,
    "h": 3_600_000_000_000,
}
_LIMIT = 1 << 63
_LIMIT_DIGITS = 19  # looked at first: Python refuses to make an int of thousands
_TERM = re.compile(r"([0-9]*)(?:\.([0-9]*))?([^0-9.]*)")


def parse_ns(text: str) -> int:
    """Nanoseconds that *text* stands for, by the rules of Go's ``time.ParseDuration``.

    Fractions are cut to whole nanoseconds with the same floating-point steps
    as Go's, so both programs read the same number.

    Raises:
        RuleBroken: Not a Go duration, or outside 64 bits of nanoseconds.
    """
    negative = text.startswith("-")
    rest = text[1:] if text[:1] in ("+", "-") else text
    if rest == "0":
        return 0
    if not rest:
        raise _invalid(text)
    total = 0
    while rest:
        term = _TERM.match(rest)
        assert term is not None  # the pattern matches the empty string too
        total += _term_ns(text, *term.groups())
        if total > _LIMIT:
            raise _too_large(text)
        rest = rest[term.end() :]
    if total > _LIMIT - (0 if negative else 1):
        raise _too_large(text)
    return -total if negative else total


def _term_ns(text: str, whole: str, fraction: str | None, unit: str) -> int:
    if not whole and not fraction:
        raise _invalid(text)
    if not unit:
        raise RuleBroken(f"{text!r} has a number without a unit; write for example 90s, 15m or 24h")
    if unit not in _UNITS_NS:
        hint = "; Go durations have no days or weeks, write 24h or 168h" if unit in "dw" else ""
        raise RuleBroken(f"{text!r} has the unknown unit {unit!r} (known: ns, us, ms, s, m, h){hint}")
    scale = _UNITS_NS[unit]
    digits = whole.lstrip("0")
    if len(digits) > _LIMIT_DIGITS or int(digits or "0") > _LIMIT // scale:
        raise _too_large(text)
    return int(digits or "0") * scale + _fraction_ns(fraction or "", scale)


def _fraction_ns(digits: str, unit_ns: int) -> int:
    """What Go's ``leadingFraction`` makes of the digits behind the point."""
    value, divisor = 0, 1.0
    for digit in digits:
        if value > (_LIMIT - 1) // 10 or value * 10 + int(digit) > _LIMIT:
            break
        value = value * 10 + int(digit)
        divisor *= 10
    return int(float(value) * (float(unit_ns) / divisor))


def _invalid(text: str) -> RuleBroken:
    return RuleBroken(f"{text!r} is not a duration; write for example 90s, 15m or 24h")


def _too_large(text: str) -> RuleBroken:
    return RuleBroken(f"{text!r} is too large: durations end at about 292 years")


@lru_cache(maxsize=1000)
def parse_duration(text: str) -> timedelta:
    """*text* as a timedelta; parts finer than a microsecond are cut off, towards zero."""
    nanoseconds = parse_ns(text)
    micros = abs(nanoseconds) // 1000
    return timedelta(microseconds=-micros if nanoseconds < 0 else micros)


def to_ns(duration: timedelta) -> int:
    """Whole nanoseconds of *duration*, without a detour over floats."""
    return (duration // timedelta(microseconds=1)) * 1000


def format_ns(nanoseconds: int) -> str:
    """The shortest text in hours, minutes and seconds that Go and `parse_ns` read back: ``1h30m``."""
    if nanoseconds == 0:
        return "0s"
    sign, rest = ("-", -nanoseconds) if nanoseconds < 0 else ("", nanoseconds)
    if rest < _UNITS_NS["s"]:
        unit = "ms" if rest >= _UNITS_NS["ms"] else "us" if rest >= _UNITS_NS["us"] else "ns"
        return sign + _decimal(rest, unit)
    hours, rest = divmod(rest, _UNITS_NS["h"])
    minutes, rest = divmod(rest, _UNITS_NS["m"])
    parts = [f"{hours}h" if hours else "", f"{minutes}m" if minutes else ""]
    return sign + "".join(parts) + (_decimal(rest, "s") if rest else "")


def _decimal(nanoseconds: int, unit: str) -> str:
    whole, fraction = divmod(nanoseconds, _UNITS_NS[unit])
    width = len(str(_UNITS_NS[unit])) - 1
    digits = f"{fraction:0{width}d}".rstrip("0") if fraction else ""
    return f"{whole}.{digits}{unit}" if digits else f"{whole}{unit}"


@lru_cache(maxsize=1000)
def format_duration(duration: timedelta) -> str:
    """*duration* written short: ``24h``, ``1m30s``, ``1.5s``."""
    return format_ns(to_ns(duration))
