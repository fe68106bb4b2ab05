"""The log: for people on a terminal, fields of systemd's journal where it leads there, else one JSON object a line.

On stderr, but for the journal, which has a socket.

Lines are written by a thread of their own: a reader that stalls must hold up
neither a run nor a resume. It loses lines then, and the log says how many.
"""

import atexit
import contextlib
import json
import logging
import os
import queue
import re
import sys
import threading
from collections.abc import Callable, MutableMapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, Protocol

import orjson
import structlog

from hypemand.config import LogConfig, LogFormat
from hypemand.core.size import format_size
from hypemand.surface.journal import Journal, entry, is_journal, message

QUEUE_LINES = 10_000
_FOR_PROGRAMS = frozenset({"run_id", "due_at"})
_FLUSH_S = 2.0
_AT_ONCE = 100
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline


class Stream(Protocol):
    """What lines are written to."""

    def write(self, text: str, /) -> object:
        """Write *text*."""

    def flush(self) -> object:
        """Write what `write` kept back."""


class _Stderr:
    """The process's stderr, without Python's buffer in front of it.

    What is stuck in that, or was left in it for a reader that is gone, would
    hold up the end of the process or spoil its exit status.
    """

    def write(self, text: str) -> None:
        data = text.encode(errors="backslashreplace")
        while data:
            data = data[os.write(2, data) :]

    def flush(self) -> None:
        """There is nothing kept back."""


class LineWriter:
    """Writes lines to a stream from a thread; never blocks and never raises in the caller.

    Attributes:
        stream: Where lines go from now on.
    """

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._lines: queue.Queue[tuple[Stream, str] | None] = queue.Queue(QUEUE_LINES)
        self._lost = 0
        self.tell_lost: Callable[[int], str] = "({} log lines lost: the log's reader was too slow)".format
        self._thread = threading.Thread(target=self._write_all, name="log", daemon=True)
        self._thread.start()

    def write(self, line: str) -> None:
        """Queue *line*; it is lost when the queue is full."""
        try:
            self._own_up()
            self._lines.put_nowait((self.stream, line))
        except queue.Full:
            self._lost += 1

    def _own_up(self) -> None:
        if self._lost:
            self._lines.put_nowait((self.stream, self.tell_lost(self._lost)))
            self._lost = 0

    def close(self) -> None:
        """Write what is queued, for as long as that takes no more than 2 s."""
        try:
            self._own_up()
            self._lines.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(_FLUSH_S)

    def _write_all(self) -> None:
        while True:
            queued = self._wait_for_lines()
            for stream, lines in groupby((one for one in queued if one is not None), key=itemgetter(0)):
                self._write(stream, [f"{line}\n" for _, line in lines])
            if None in queued:
                return

    def _wait_for_lines(self) -> list[tuple[Stream, str] | None]:
        """Those that are there, once there is one; each by itself would have this thread take turns with all others."""
        queued = [self._lines.get()]
        with contextlib.suppress(queue.Empty):
            while len(queued) < _AT_ONCE:
                queued.append(self._lines.get_nowait())
        return queued

    @staticmethod
    def _write(stream: Stream, lines: Sequence[str]) -> None:
        for text in ["".join(lines)] if isinstance(stream, _Stderr) else lines:
            with contextlib.suppress(OSError, ValueError):  # nobody reads the log; hypemand goes on
                stream.write(text)
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


class _Logger:
    """What structlog writes rendered lines to."""

    def __init__(self, writer: LineWriter) -> None:
        self._writer = writer

    def msg(self, line: str) -> None:
        self._writer.write(line)

    log = debug = info = warning = warn = error = critical = fatal = exception = failure = msg


_writer: LineWriter | None = None


def set_up_log(config: LogConfig) -> None:
    """Log as *config* says, from now on; may be called again."""
    global _writer  # noqa: PLW0603 - the process has one log
    own = sys.stderr is sys.__stderr__
    to_journal = config.format is LogFormat.AUTO and own and is_journal(2)
    stream = Journal() if to_journal else _Stderr() if own else sys.stderr
    if _writer is None:
        _writer = LineWriter(stream)
        atexit.register(_writer.close)
    _writer.stream = stream
    logger = _Logger(_writer)
    for_people = config.format is LogFormat.CONSOLE or (config.format is LogFormat.AUTO and sys.stderr.isatty())
    form = _journal() if to_journal else _console() if for_people else _json()
    processors = [structlog.processors.add_log_level, *form]

    def tell_lost(lines: int) -> str:
        event: Any = {"event": "log lines lost: the log's reader was too slow", "lines": lines}
        for processor in processors:
            event = processor(logger, "warning", event)
        return str(event)

    _writer.tell_lost = tell_lost
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, *processors],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, config.level.upper())),
        logger_factory=lambda *_: logger,
        cache_logger_on_first_use=False,
    )


def _console() -> list[Any]:
    return [
        structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
        structlog.processors.format_exc_info,
        _for_people,
        _harmless,
        structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(),
            pad_event_to=16,
            sort_keys=False,
            exception_formatter=structlog.dev.plain_traceback,
        ),
    ]


def _json() -> list[Any]:
    return [
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        structlog.processors.JSONRenderer(serializer=_dumps),
    ]


def _journal() -> list[Any]:
    return [structlog.processors.format_exc_info, _journal_entry]


def _journal_entry(logger: Any, method: str, event: MutableMapping[str, Any]) -> str:
    return entry(event, message(_harmless(logger, method, _for_people(logger, method, event))))


def _for_people(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Units that people read, and not the ids that only programs need."""
    shown: dict[str, Any] = {}
    for key, value in event.items():
        if key.endswith("_s") and isinstance(value, (int, float)):
            shown[key[:-2]] = f"{value * 1000:.0f}ms" if abs(value) < 1 else f"{value:.1f}s"
        elif key.endswith("_bytes") and isinstance(value, int):
            shown[key[:-6]] = format_size(value).replace(" ", "")
        elif key not in _FOR_PROGRAMS:
            shown[key.removesuffix("_id").removesuffix("_name")] = value
    return shown


def _harmless(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """What a hypervisor or a file name says must not steer the terminal."""
    for key, value in event.items():
        if isinstance(value, str):
            event[key] = _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", value)
    return event


def _dumps(event: dict[str, Any], **options: Any) -> str:
    default = options.get("default", str)
    try:
        return orjson.dumps(event, default=default).decode()
    except TypeError:  # texts that are not UTF-8, numbers of more than 64 bits, keys that are no texts
        return json.dumps(event, default=default, skipkeys=True)
