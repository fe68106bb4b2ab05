"""Schedules and run log lines as JSON, and back."""

from collections.abc import Mapping
from typing import Any

import orjson

from hypemand.core.errors import HypemandError, InvalidInput, Problem
from hypemand.core.model import InstanceId, Retention, RunFinished, RunStarted, Schedule, Settings
from hypemand.core.structure import new_converter, share_equal, structure
from hypemand.core.utf8 import as_utf8

FORMAT = 1
_FILES = new_converter()
for _often_equal in (Retention, Settings):
    share_equal(_FILES, _often_equal)
_LINES = new_converter(omit_defaults=False)
_LINE_TYPES: dict[str, type[RunStarted] | type[RunFinished]] = {"started": RunStarted, "finished": RunFinished}

Line = RunStarted | RunFinished


class NewerFormatError(HypemandError):
    """The document was written by a later version; this one must leave it alone."""


def schedule_document(schedule: Schedule) -> dict[str, Any]:
    """*schedule* as JSON values: the API's keys, ours, and those that this version does not know."""
    document: dict[str, Any] = _FILES.unstructure(schedule)
    settings = document.pop("settings", {})
    managed_by = document.pop("managed_by", schedule.managed_by)
    return {**document, "managed_by": managed_by, "settings": settings, "format": FORMAT}


def encode_schedule(schedule: Schedule) -> bytes:
    """The content of a schedule's file."""
    return to_json(schedule_document(schedule), orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def decode_schedule(data: bytes, instance: InstanceId) -> Schedule:
    """The schedule in the file of *instance*; files that Hypeman wrote included.

    Raises:
        InvalidInput: Not JSON, a field is missing or breaks its rule, or it is another instance's.
        NewerFormatError: Of a later version.
    """
    document = _json_object(data)
    written_as = document.pop("format", FORMAT)
    if isinstance(written_as, int) and written_as > FORMAT:
        raise NewerFormatError(
            f"has format {written_as}, this version of hypemand knows {FORMAT}: use a newer hypemand"
        )
    if written_as != FORMAT or isinstance(written_as, bool):
        raise InvalidInput([Problem("format", f"{written_as!r} must be {FORMAT}")])
    schedule = structure(_FILES, document, Schedule)
    if schedule.instance_id != instance:
        raise InvalidInput(
            [Problem("instance_id", f"is {schedule.instance_id!r}, but the file is that of {instance!r}")]
        )
    return schedule


def schedule_of(document: Mapping[str, Any]) -> Schedule:
    """The schedule that `schedule_document` tells.

    Raises:
        InvalidInput: A later version told it.
    """
    return structure(_FILES, {key: value for key, value in document.items() if key != "format"}, Schedule)


def run_of(document: Mapping[str, Any]) -> RunFinished:
    """The finished run that `line_document` tells.

    Raises:
        InvalidInput: A later version told it.
    """
    return structure(_LINES, {key: value for key, value in document.items() if key != "event"}, RunFinished)


def encode_line(line: Line) -> bytes:
    """*line* of the run log, with its newline."""
    kind = "started" if isinstance(line, RunStarted) else "finished"
    return to_json({"event": kind, **line_document(line)}, orjson.OPT_APPEND_NEWLINE)


def encode_run(run: RunFinished) -> bytes:
    """*run* as the history has it, in one line with its newline."""
    return to_json(line_document(run), orjson.OPT_APPEND_NEWLINE)


def line_document(line: Line) -> dict[str, Any]:
    """*line* as JSON values, every key present."""
    document: dict[str, Any] = _LINES.unstructure(line)
    return document


def decode_line(data: bytes) -> Line:
    """The run log line in *data*.

    Raises:
        InvalidInput: Not JSON, not a line of the log, or a field that breaks its rule.
    """
    document = _json_object(data)
    event = document.pop("event", None)
    if not isinstance(event, str) or event not in _LINE_TYPES:
        raise InvalidInput([Problem("event", f"{event!r} must be one of " + ", ".join(_LINE_TYPES))])
    return structure(_LINES, document, _LINE_TYPES[event])


def to_json(document: Any, option: int = 0) -> bytes:
    """*document*, JSON values, as JSON; text that is no UTF-8 is told with escapes."""
    try:
        return orjson.dumps(document, option=option)
    except orjson.JSONEncodeError:  # an error that names a file whose name is not UTF-8
        return orjson.dumps(as_utf8(document), option=option)


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        document = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        what = "is empty" if not data.strip() else f"is not JSON: {error}"
        raise InvalidInput([Problem("", what)]) from None
    if not isinstance(document, dict):
        raise InvalidInput([Problem("", "must be a JSON object")])
    return document
