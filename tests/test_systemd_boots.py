"""The service over boots and beside others: what was due while the machine was down, two machines at once, idling."""

import shutil
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import orjson

from tests.processes import TOLD
from tests.systemd_service import CONFIG, STATE, Service, booted_with_hypemand

SLOW = 'copy_rate = "32KiB"'
GUESTS = [f"web-{number}" for number in range(1, 9)]
IDLE_S = 120


def test_after_a_boot_each_missed_schedule_is_caught_up_once_and_spread(installed: Path, tmp_path: Path) -> None:
    with booted_with_hypemand(installed) as first:
        first.configure(guests=" ".join(GUESTS), schedule="", interval="1m")
        first.box.run("systemctl", "enable", "--now", "hypemand")
        first.box.run("systemctl", "stop", "hypemand")
        for guest in GUESTS:
            miss(first, guest, slots=60)
        for name in ("etc/systemd/system", CONFIG.lstrip("/"), STATE.lstrip("/")):
            copy(first.box.path(name), tmp_path / name)
    booted_at = datetime.now(UTC)
    with booted_with_hypemand(installed, more=tmp_path) as second:
        second.recorded(len(GUESTS))
        runs = second.history()
        again = datetime.now(UTC)
        assert second.is_active()
    assert sorted(run["instance_id"] for run in runs) == sorted(GUESTS), "one run each, and no more"
    assert {run["outcome"] for run in runs} == {"succeeded"}
    assert all(run["missed"] >= 59 for run in runs)
    began = sorted(datetime.fromisoformat(run["started_at"]) for run in runs)
    assert booted_at < began[0]
    assert began[-1] - began[0] > timedelta(seconds=1), "they are spread out"
    assert again - booted_at < timedelta(minutes=1), "there was no time for the next slot"


def miss(service: Service, guest: str, slots: int) -> None:
    """Have *guest*'s schedule look as if so many slots had passed."""
    path = service.box.path(f"{STATE}/schedules/{guest}.json")
    document = orjson.loads(path.read_bytes())
    due = datetime.fromisoformat(document["next_run_at"]) - timedelta(minutes=slots + 1)
    path.write_bytes(orjson.dumps(document | {"next_run_at": due.isoformat().replace("+00:00", "Z")}))


def copy(source: Path, target: Path) -> None:
    """Copy a file or a tree, owners and all."""
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True, ignore=lambda _, names: [n for n in names if n == "api.sock"])
    else:
        target.parent.mkdir(parents=True)
        shutil.copy(source, target)
    for path in (target, *target.rglob("*")):
        found = (source / path.relative_to(target)).lstat()
        shutil.chown(path, found.st_uid, found.st_gid) if not path.is_symlink() else None


def test_two_machines_that_share_nothing_do_not_meet(service: Service, installed: Path) -> None:
    with booted_with_hypemand(installed) as other:
        for each in (service, other):
            each.configure(backend=SLOW)
            each.start()
            each.in_mid_capture()
        pid = other.main_pid()
        service.box.run("systemctl", "kill", "-s", "KILL", "hypemand")
        service.box.wait_until(lambda: service.guest_state() == "Running", "web-1 runs again")
        assert other.guest_state() == "Paused"
        assert other.main_pid() == pid
        service.recorded(1)
        assert other.history() == []


def test_two_minutes_of_idling_take_less_than_a_thousandth_of_a_processor(
    service: Service, record_property: object
) -> None:
    service.configure(guests=" ".join(GUESTS))
    service.start()
    service.recorded(len(GUESTS))
    time.sleep(5)  # what a start leaves to be done
    before, began = used_ns(service), time.monotonic()
    time.sleep(IDLE_S)
    used = used_ns(service) - before
    share = used / 1e9 / (time.monotonic() - began)
    assert callable(record_property)
    record_property(TOLD, f"idle: {100 * share:.3f} % of a processor")
    assert 0 < share < 0.001
    assert len(service.history()) == len(GUESTS)


def used_ns(service: Service) -> int:
    """CPU time of all its processes so far."""
    return int(service.box.show("hypemand", "CPUUsageNSec"))
