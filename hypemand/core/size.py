"""Sizes in bytes as people write them: ``1GiB``, ``512KiB``, ``100MB``."""

import re

from hypemand.core.errors import RuleBroken

_UNITS = {"B": 1} | {
    f"{letter}{suffix}": int(base**power)
    for power, letter in enumerate("KMGT", start=1)
    for suffix, base in (("iB", 1024), ("B", 1000))
}
_SIZE = re.compile(r"([0-9]{1,18}) ?([A-Za-z]+)")


def parse_size(value: object) -> int:
    """Bytes: a whole number, or a whole number with a unit (B, KiB, MiB, GiB, TiB, KB, MB, GB, TB).

    Raises:
        RuleBroken: Anything else.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None or match[2] not in _UNITS:
        raise RuleBroken(f"{value!r} is not a size; write for example 512MiB or 1GiB")
    return int(match[1]) * _UNITS[match[2]]


def format_size(size: int) -> str:
    """*size* for people, to three digits: ``80.0 MiB``."""
    amount = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{size} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"
