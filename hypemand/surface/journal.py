"""The log in systemd's journal: its native protocol, so that each fact is a field to search by.

One datagram an entry, of lines ``FIELD=value``; a value with line breaks has
its length before it. See systemd's "Native Journal Protocol".
"""

import os
import re
import socket
import sys
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
    trace = facts.pop("exception", None)
    fields = {
        "MESSAGE": f"{message}\n{trace}" if trace else message,
        "PRIORITY": str(_PRIORITIES.get(level, 6)),
        "SYSLOG_IDENTIFIER": "hypemand",
        f"{PREFIX}EVENT": text,
    }
    for key, value in facts.items():
        fields[PREFIX + re.sub("[^A-Z0-9]", "_", key.upper())] = _text(value)
    return b"".join(_field(name, value) for name, value in fields.items()).decode(errors="surrogateescape")


def message(event: Mapping[str, Any]) -> str:
    """The text of *event*, and its facts as ``key=value``, quoted where they would run into each other."""
    facts = {key: value for key, value in event.items() if key not in ("event", "level", "exception")}
    return " ".join([str(event.get("event", "")), *(f"{key}={_shown(value)}" for key, value in facts.items())])


def _text(value: Any) -> str:
    return value if isinstance(value, str) else orjson.dumps(value, default=str).decode()


def _shown(value: Any) -> str:
    text = _text(value)
    return text if text and not re.search(r"[\s=\"]", text) else orjson.dumps(text, default=str).decode()


def _field(name: str, value: str) -> bytes:
    data = value.encode(errors="backslashreplace")[:_MOST_BYTES]
    if b"\n" in data:
        return name.encode() + b"\n" + len(data).to_bytes(8, "little") + data + b"\n"
    return name.encode() + b"=" + data + b"\n"


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
            message = data.removeprefix(b"MESSAGE=").partition(b"\n")[0]
            sys.stderr.write(message.decode(errors="backslashreplace") + "\n")

    def flush(self) -> None:
        """There is nothing kept back."""
