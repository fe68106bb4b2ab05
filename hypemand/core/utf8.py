"""Text that came from bytes of any kind, such as names of files, as text that can be written down."""

from typing import Any


def as_utf8(value: Any) -> Any:
    """*value*, a JSON value, with what is no text as escapes."""
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {as_utf8(key): as_utf8(one) for key, one in value.items()}
    return [as_utf8(one) for one in value] if isinstance(value, (list, tuple)) else value
