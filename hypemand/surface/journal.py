"""The log in systemd's journal: its native protocol, so that each fact is a field to search by.

One datagram an entry, of lines ``FIELD=value``; a value with line breaks has
its length before it. See systemd's "Native Journal Protocol".
"""

import json
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

SOCKET = Path("/run/systemd/journal/socket")
PREFIX = "HYPEMAND_"
"""Of the fields for what is hypemand's own: ``HYPEMAND_INSTANCE_ID`` for ``instance_id``."""
_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
_MOST_BYTES = 48 * 1024
"""Less than what a datagram may hold by default; a longer value is cut."""
_SEND_S = 2.0


def is_journal(descriptor: int, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether what is written to *descriptor* goes to the journal, as ``JOURNAL_STREAM`` says."""
    device, _, inode = environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        status = os.fstat(descriptor)
    except OSError:
        return False
    return (device, inode) == (str(status.st_dev), str(status.st_ino))


def entry(event: Mapping[str, Any], message: str) -> str:
    """A logged *event* as an entry of the journal, undecodable bytes as surrogates.

    Args:
        message: What people are shown of it.
    """
    facts = dict(event)
    level, text = str(facts.pop("level", "info")), str(facts.pop("event", ""))
    facts.pop("exception", None)  # is in the message
    fields = {
        "MESSAGE": message,
        "PRIORITY": str(_PRIORITIES.get(level, 6)),
        "SYSLOG_IDENTIFIER": "hypemand",
        f"{PREFIX}EVENT": text,
    }
    for key, value in facts.items():
        fields[PREFIX + re.sub("[^A-Z0-9]", "_", key.upper())] = _text(value)
    return b"".join(_field(name, value) for name, value in fields.items()).decode(errors="surrogateescape")


def message(event: Mapping[str, Any]) -> str:
    """The text of *event*, its facts as ``key=value``, quoted where they would run into each other, and its trace."""
    facts = {key: value for key, value in event.items() if key not in ("event", "level", "exception")}
    line = " ".join([str(event.get("event", "")), *(f"{key}={_shown(value)}" for key, value in facts.items())])
    return "\n".join([line, str(event["exception"])] if event.get("exception") else [line])


def _text(value: Any) -> str:
    return value if isinstance(value, str) else _dumps(value)


def _shown(value: Any) -> str:
    text = _text(value)
    return text if text and not re.search(r"[\s=\"]", text) else _dumps(text)


def _dumps(value: Any) -> str:
    try:
        return orjson.dumps(value, default=str).decode()
    except TypeError:  # texts that are not UTF-8, numbers of more than 64 bits, keys that are no texts
        return json.dumps(value, default=str, skipkeys=True)


def _field(name: str, value: str) -> bytes:
    data = value.encode(errors="backslashreplace")
    if len(data) > _MOST_BYTES:
        data = data[:_MOST_BYTES].decode(errors="ignore").encode()  # no half letter: it would be shown as binary
    if b"\n" in data:
        return name.encode() + b"\n" + len(data).to_bytes(8, "little") + data + b"\n"
    return name.encode() + b"=" + data + b"\n"


def _message_of(data: bytes) -> bytes:
    """The message of an entry, which is its first field."""
    line, _, rest = data.partition(b"\n")
    return line.removeprefix(b"MESSAGE=") if b"=" in line else rest[8 : 8 + int.from_bytes(rest[:8], "little")]


class Journal:
    """A stream of entries. One that the journal does not take goes to stderr, which leads there, too."""

    def __init__(self, path: Path = SOCKET) -> None:
        self._path = path

    def write(self, text: str) -> None:
        """Send *text*, an `entry`."""
        data = text.encode(errors="surrogateescape")
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.settimeout(_SEND_S)
                sender.sendto(data, str(self._path))
        except OSError:
            # Without Python's buffer in front of it, whose lock a reader that stalls would hold at the process's end.
            rest = _message_of(data) + b"\n"
            while rest:
                rest = rest[os.write(2, rest) :]

    def flush(self) -> None:
        """There is nothing kept back."""
