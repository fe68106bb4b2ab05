"""The log: a line for each event, harmless, and never in the way of what is logged."""

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import pytest

from hypemand.surface import log as log_module
from hypemand.surface.log import LineWriter

SET_UP = """
import structlog, sys
from hypemand.config import LogConfig, LogFormat, LogLevel
from hypemand.surface.log import set_up_log
set_up_log(LogConfig(LogLevel({level!r}), LogFormat({form!r})))
log = structlog.get_logger()
"""


def run(code: str, level: str = "info", form: str = "auto", stderr: int | IO[bytes] = subprocess.PIPE) -> str:
    """What a program that logs by *code* writes to its stderr."""
    program = SET_UP.format(level=level, form=form) + code
    done = subprocess.run([sys.executable, "-c", program], stderr=stderr, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return (done.stderr or b"").decode()


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_off_a_terminal_each_event_is_a_line_of_json_with_stable_keys() -> None:
    [first, second] = lines(run('log.info("run begins", instance_id="web-1", late_s=0.5); log.error("größer\\nline")'))
    assert first.keys() == {"event", "level", "timestamp", "instance_id", "late_s"}
    assert (first["event"], first["level"], first["late_s"]) == ("run begins", "info", 0.5)
    at = datetime.fromisoformat(first["timestamp"])
    assert at.utcoffset() is not None
    assert (second["event"], second["level"]) == ("größer\nline", "error")


@pytest.mark.parametrize(
    ("level", "seen"),
    [
        ("debug", ["debug", "info", "warning", "error", "critical"]),
        ("info", ["info", "warning", "error", "critical"]),
        ("warning", ["warning", "error", "critical"]),
        ("error", ["error", "critical"]),
    ],
)
def test_what_is_less_severe_than_the_level_is_left_out(level: str, seen: list[str]) -> None:
    code = 'for name in ("debug", "info", "warning", "error", "critical"): getattr(log, name)("x")'
    assert [line["level"] for line in lines(run(code, level))] == seen


def test_a_new_config_of_the_log_is_in_force_at_once_also_for_loggers_made_before() -> None:
    code = """
log.info("one")
set_up_log(LogConfig(LogLevel.ERROR, LogFormat.JSON))
log.info("two")
set_up_log(LogConfig(LogLevel.DEBUG, LogFormat.JSON))
log.debug("three")
"""
    assert [line["event"] for line in lines(run(code))] == ["one", "three"]


def test_an_exception_is_told_in_its_line() -> None:
    code = """
secret = "do-not-tell"
try:
    1 / 0
except ZeroDivisionError:
    log.exception("failed", run_id="run-1")
"""
    [line] = lines(run(code))
    assert line["event"] == "failed"
    assert line["level"] == "error"
    assert "ZeroDivisionError: division by zero" in line["exception"]
    assert "Traceback" in line["exception"]
    on_console = run(code, form="console")
    assert "ZeroDivisionError: division by zero" in on_console
    assert "do-not-tell" not in on_console


VALUES = {
    "a path": "__import__('pathlib').Path('/x')",
    "bytes": "b'\\xff'",
    "a number of 70 bits": "2**70",
    "no number": "float('nan')",
    "half a surrogate": "'\\udcff'",
    "keys that are no texts": "{1: 2, (3, 4): 5}",
    "a set": "{1}",
    "an object": "object()",
    "an exception": "OSError(5, 'x', 'y')",
    "a timedelta": "__import__('datetime').timedelta(1)",
    "a newline": "'a\\nb'",
    "an escape": "'\\x1b[31mred\\x07'",
    "a return": "'a\\rb'",
    "another control": "'\\x9b31m'",
}


@pytest.mark.parametrize("form", ["json", "console"])
def test_no_value_breaks_a_line_or_steers_a_terminal(form: str) -> None:
    code = "\n".join(f"log.info('event {number}', value={value})" for number, value in enumerate(VALUES.values()))
    code += "\ntry: raise ValueError('\\x1b[31mred')\nexcept ValueError: log.exception('event last')"
    text = run(code, form=form)
    controls = "\x1b\x07\r" if form == "json" else "\x1b\x07\r\x9b"  # JSON does not escape the last
    assert not set(controls) & set(text)
    told = [line for line in text.splitlines() if "event " in line]
    assert len(told) == len(VALUES) + 1
    if form == "json":
        parsed = lines(text)
        assert all({"event", "level", "timestamp", "value"} <= line.keys() for line in parsed[:-1])
        by_case = dict(zip(VALUES, parsed, strict=False))
        assert by_case["a number of 70 bits"]["value"] == 2**70
        assert by_case["a newline"]["value"] == "a\nb"


def test_the_console_format_has_no_escape_codes_off_a_terminal() -> None:
    text = run('log.warning("slow", instance_id="web-1", path="/a b")', form="console")
    assert "\x1b" not in text
    assert "slow" in text
    assert "instance=web-1" in text
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)


def test_auto_is_for_people_on_a_terminal() -> None:
    ours, its = os.openpty()
    with os.fdopen(its, "wb") as terminal:
        run('log.info("run begins", instance_id="web-1")', stderr=terminal)
        text = os.read(ours, 4096).decode()
    os.close(ours)
    assert "run begins" in text
    assert '"event"' not in text


def test_a_reader_that_stalls_holds_up_neither_the_program_nor_its_end() -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as stderr:
        run('for number in range(12_000): log.info("a line of some length", number=number)', stderr=stderr)
    [first, *_] = os.read(reading, 65536).splitlines()
    os.close(reading)
    assert json.loads(first)["number"] == 0


def test_a_reader_that_is_gone_does_not_harm_the_program() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as stderr:
        nothing = run('for number in range(100): log.info("a line", number=number)', stderr=stderr)
    assert nothing == ""  # and its exit status was 0


def test_a_program_without_stderr_runs() -> None:
    program = "import sys\nsys.stderr.close()\n" + SET_UP.format(level="info", form="json") + "log.info('x')"
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0


LOSING = """
import os, threading
from hypemand.surface import log as log_module
log_module._writer._lines.maxsize = 5
reading, writing = os.pipe()
kept = os.dup(2)
os.dup2(writing, 2)
os.set_blocking(writing, False)
try:
    while True: os.write(writing, b"x" * 4095 + b"\\n")
except BlockingIOError: pass
os.set_blocking(writing, True)
os.close(writing)
for number in range(50): log.info("line", number=number)
def read():
    rest = b""
    while piece := os.read(reading, 65536):
        rest += piece
    os.write(kept, b"\\n".join(line for line in rest.split(b"\\n") if not line.startswith(b"xxx")))
reader = threading.Thread(target=read)
reader.start()
while not log_module._writer._lines.empty(): pass
log.info("after")
log_module._writer.close()
os.close(2)
reader.join()
os.dup2(kept, 2)
"""


def test_lost_lines_are_told_in_the_format_of_the_log() -> None:
    told = lines(run(LOSING, form="json"))
    assert told[-1]["event"] == "after"
    [loss] = [line for line in told if "lost" in line["event"]]
    assert (loss["level"], loss["lines"]) == ("warning", 50 - (len(told) - 2))
    assert "timestamp" in loss


class StalledStream(io.StringIO):
    """A stream whose writes wait until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.stalled = threading.Event()
        self.go_on = threading.Event()

    def write(self, text: str, /) -> int:
        self.stalled.set()
        assert self.go_on.wait(30)
        return super().write(text)


@pytest.fixture
def short_queue(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(log_module, "QUEUE_LINES", 10)
    return 10


@pytest.mark.parametrize("how_told", [lambda writer: writer.write("after"), lambda writer: None])
def test_a_stalled_stream_loses_lines_and_says_how_many(
    short_queue: int, how_told: Callable[[LineWriter], None]
) -> None:
    stream = StalledStream()
    writer = LineWriter(stream)
    writer.write("first")
    assert stream.stalled.wait(30)
    for number in range(100):
        writer.write(f"line {number}")
    stream.go_on.set()
    while not writer._lines.empty():
        pass
    how_told(writer)
    writer.close()
    written = stream.getvalue().splitlines()
    kept = [line for line in written if line.startswith("line ")]
    assert kept == [f"line {number}" for number in range(short_queue)]
    assert [line for line in written if "lost" in line] == ["(90 log lines lost: the log's reader was too slow)"]


def test_closing_while_the_stream_stalls_returns(short_queue: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "_FLUSH_S", 0.05)
    stream = StalledStream()
    writer = LineWriter(stream)
    writer.write("first")
    assert stream.stalled.wait(30)
    writer.close()
    for number in range(100):
        writer.write(f"line {number}")
    writer.close()
    stream.go_on.set()


def test_what_was_queued_is_written_and_flushed_by_close(tmp_path: Path) -> None:
    for attempt in range(20):
        path = tmp_path / f"log-{attempt}"
        with path.open("w") as stream:
            writer = LineWriter(stream)
            for number in range(50):
                writer.write(f"line {number}")
            writer.close()
            assert path.read_text().splitlines() == [f"line {number}" for number in range(50)]


def test_a_stream_that_is_closed_or_broken_raises_nothing_in_the_caller(tmp_path: Path) -> None:
    stream = (tmp_path / "log").open("w")
    writer = LineWriter(stream)
    writer.write("before")
    stream.close()
    for _ in range(10):
        writer.write("after")
    writer.close()
    assert not writer._thread.is_alive()
    full = Path("/dev/full").open("w")  # noqa: SIM115 - closing it fails
    writer = LineWriter(full)
    for _ in range(10):
        writer.write("line")
    writer.close()
    assert not writer._thread.is_alive()
    with pytest.raises(OSError, match="No space left"):
        full.close()


def test_a_line_that_the_stream_cannot_encode_costs_only_itself(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w", encoding="ascii") as stream:
        writer = LineWriter(stream)
        for line in ("one", "größer", "two"):
            writer.write(line)
        writer.close()
    assert (tmp_path / "log").read_text() == "one\ntwo\n"


def test_on_a_console_units_are_those_of_people_and_ids_of_programs_are_left_out(tmp_path: Path) -> None:
    told = for_people(
        instance_id="web-1",
        run_id="r1",
        snapshot_id="r1",
        snapshot_name="n-1",
        size_bytes=83886080,
        freeze_s=0.0651,
        late_s=2,
    )
    assert told == {"instance": "web-1", "snapshot": "n-1", "size": "80.0MiB", "freeze": "65ms", "late": "2.0s"}


def for_people(**event: Any) -> dict[str, Any]:
    return dict(log_module._for_people(None, "info", event))
