"""The log in systemd's journal: levels, fields to search by, texts of any kind, and that nothing is lost."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hypemand.surface.journal import Journal, entry, is_journal, message
from tests.processes import ROOT, environment


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "journal"))
        receiver.settimeout(10)
        yield receiver


def fields(data: bytes) -> dict[str, str]:
    """An entry as the journal reads it."""
    found: dict[str, str] = {}
    while data:
        line, _, rest = data.partition(b"\n")
        name, is_one_line, value = line.partition(b"=")
        if not is_one_line:
            length = int.from_bytes(rest[:8], "little")
            value, rest = rest[8 : 8 + length], rest[9 + length :]
        if name:
            found[name.decode()] = value.decode()
        data = rest
    return found


def encoded(**event: object) -> dict[str, str]:
    return fields(entry(event, message(event)).encode(errors="surrogateescape"))


@pytest.mark.parametrize(
    ("level", "priority"), [("debug", "7"), ("info", "6"), ("warning", "4"), ("error", "3"), ("critical", "2")]
)
def test_levels_are_those_of_syslog(level: str, priority: str) -> None:
    assert encoded(event="snapshot taken", level=level)["PRIORITY"] == priority


def test_each_fact_is_a_field_and_people_read_them_all_in_the_message() -> None:
    assert encoded(event="snapshot taken", level="info", instance_id="web-1", freeze_s=0.5, pruned=[], error="a b") == {
        "MESSAGE": 'snapshot taken instance_id=web-1 freeze_s=0.5 pruned=[] error="a b"',
        "PRIORITY": "6",
        "SYSLOG_IDENTIFIER": "hypemand",
        "HYPEMAND_EVENT": "snapshot taken",
        "HYPEMAND_INSTANCE_ID": "web-1",
        "HYPEMAND_FREEZE_S": "0.5",
        "HYPEMAND_PRUNED": "[]",
        "HYPEMAND_ERROR": "a b",
    }


def test_a_text_of_several_lines_can_not_pass_for_fields_of_its_own() -> None:
    found = encoded(event="run failed", level="error", error="no\nPRIORITY=0\nMESSAGE=well", exception="Traceback\n x")
    assert found["PRIORITY"] == "3"
    assert found["HYPEMAND_ERROR"] == "no\nPRIORITY=0\nMESSAGE=well"
    assert found["MESSAGE"].endswith("\nTraceback\n x")
    assert "HYPEMAND_EXCEPTION" not in found


def test_texts_that_are_not_utf_8_and_very_long_ones_are_told_as_far_as_they_can_be() -> None:
    found = encoded(event="run failed", level="error", path="\udcff/x", error="y" * 10**6, **{"a-b.c": 1})
    assert found["HYPEMAND_PATH"] == "\\udcff/x"
    assert 40_000 < len(found["HYPEMAND_ERROR"]) < 60_000
    assert found["HYPEMAND_A_B_C"] == "1"


@pytest.mark.parametrize("value", ["/a b/\udcff", ["\udcff"], {1: 2}, 2**70, Path("/a b/\udcff"), float("nan")])
def test_a_fact_of_any_kind_is_told_and_stops_nobody_who_tells_it(value: object) -> None:
    found = encoded(event="guest not resumed; trying again", level="error", error=value)
    assert found["MESSAGE"].startswith("guest not resumed; trying again error=")
    assert "HYPEMAND_ERROR" in found


def test_a_long_text_is_cut_between_letters() -> None:
    found = encoded(event="run failed", level="error", error="x" + "\u00e4" * 10**5)
    assert set(found["HYPEMAND_ERROR"]) == {"x", "\u00e4"}


def test_entries_reach_the_journal(tmp_path: Path, journald: socket.socket) -> None:
    Journal(tmp_path / "journal").write(entry({"event": "one", "level": "info"}, "one") + "\n")
    assert fields(journald.recv(65536))["MESSAGE"] == "one"


def test_what_the_journal_does_not_take_goes_to_stderr(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Journal(tmp_path / "nobody").write(entry({"event": "one", "level": "info"}, "one") + "\n")
    assert capfd.readouterr().err == "one\n"
    failed = {"event": "bug", "level": "error", "exception": "Traceback\n  in x", "error": "b"}
    Journal(tmp_path / "nobody").write(entry(failed, message(failed)) + "\n")
    assert capfd.readouterr().err == "bug error=b\nTraceback\n  in x\n"


def test_stderr_is_the_journal_only_where_the_environment_names_that_very_file(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        status = os.fstat(log.fileno())
        assert is_journal(log.fileno(), {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"})
        assert not is_journal(log.fileno(), {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino + 1}"})
        assert not is_journal(log.fileno(), {"JOURNAL_STREAM": "x"})
        assert not is_journal(log.fileno(), {})
    assert not is_journal(10**6, {"JOURNAL_STREAM": ":"})


def test_the_log_goes_to_the_journal_and_back_to_lines_when_the_config_says_so(
    tmp_path: Path, journald: socket.socket
) -> None:
    program = """
import sys, structlog
from pathlib import Path
from hypemand.config import LogConfig, LogFormat
from hypemand.surface import log, journal
journal.SOCKET = Path(sys.argv[1])
journal.Journal.__init__.__defaults__ = (journal.SOCKET,)
log.set_up_log(LogConfig())
structlog.get_logger().warning("first", instance_id="web-1", freeze_s=0.25)
try:
    raise OSError("a\\x1b[2Jb \\udcff")
except OSError:
    structlog.get_logger().exception("trouble")
log.set_up_log(LogConfig(format=LogFormat.JSON))
structlog.get_logger().info("second")
"""
    lines = tmp_path / "stderr"
    with lines.open("wb") as stderr:
        status = os.fstat(stderr.fileno())
        subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "journal")],
            stderr=stderr,
            cwd=ROOT,
            env=environment(JOURNAL_STREAM=f"{status.st_dev}:{status.st_ino}"),
            check=True,
            timeout=60,
        )
    heard = fields(journald.recv(65536))
    assert heard["MESSAGE"] == "first instance=web-1 freeze=250ms"
    assert heard["HYPEMAND_FREEZE_S"] == "0.25"
    assert heard["PRIORITY"] == "4"
    trouble = fields(journald.recv(65536))["MESSAGE"]
    assert trouble.startswith("trouble\nTraceback")
    assert "\x1b" not in trouble
    assert '"event":"second"' in lines.read_text()
    assert "first" not in lines.read_text()
