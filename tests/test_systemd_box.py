"""The service under a real systemd, booted for each test: what becomes of guests, runs and clients."""

import http.client
import json
import socket
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from tests.systemd_box import PATIENCE_S
from tests.systemd_service import STATE, Service, booted_with_hypemand

SLOW = 'copy_rate = "32KiB"'
"""A capture then takes half a minute, unless it is cut short."""
A_WHILE = 'copy_rate = "512KiB"'
"""Then it takes two seconds."""
SETTLED = "run interrupted"
SOON = "[Service]\nRestartSec=100ms\n"


def said(service: Service) -> list[str]:
    """The messages in its journal, systemd's included."""
    return [str(entry["MESSAGE"]) for entry in service.box.journal("hypemand")]


def guards(service: Service) -> list[Path]:
    """Where the processes are that are guards."""
    found = []
    for process in service.box.path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if b"/guard.py\0" in (process / "cmdline").read_bytes():
                found.append(process)
    return found


def status(service: Service) -> str:
    """What `systemctl status` shows as such."""
    return service.box.show("hypemand", "StatusText")


@pytest.fixture(scope="module")
def running(installed: Path) -> Iterator[Service]:
    """One that runs, for tests that leave it as it is."""
    with booted_with_hypemand(installed) as service:
        service.configure()
        service.start()
        yield service


needs_one_that_runs = pytest.mark.xdist_group("one hypemand that runs")


@needs_one_that_runs
def test_it_is_up_when_the_socket_answers_and_schedules_run(running: Service) -> None:
    assert running.is_active()
    running.hypemand("status", "web-1")
    running.recorded(1)
    assert [run["outcome"] for run in running.history()] == ["succeeded"]
    running.box.wait_until(lambda: status(running).startswith("1 schedule; next web-1 at 20"), "the status says so")


@needs_one_that_runs
def test_whoever_is_in_the_group_may_ask_and_nobody_else(running: Service) -> None:
    ask = ("/usr/local/bin/hypemand", "status", "--json")
    allowed = json.loads(running.box.run("setpriv", "--reuid=65534", "--clear-groups", "--regid=hypemand", *ask))
    assert allowed["answered_by"] == "daemon"
    refused = running.box.ask("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *ask)
    assert "permission denied: it is for its owner and group" in refused.stdout
    assert '"answered_by": "daemon"' not in refused.stdout


@needs_one_that_runs
def test_the_journal_has_priorities_and_fields_to_search_by(running: Service) -> None:
    running.recorded(1)
    (taken,) = running.logged("snapshot taken")
    assert taken["HYPEMAND_INSTANCE_ID"] == "web-1"
    assert taken["HYPEMAND_RUN_ID"] == running.history()[0]["run_id"]
    assert taken["PRIORITY"] == "6"
    assert taken["_SYSTEMD_UNIT"] == "hypemand.service"
    found = running.box.run("journalctl", "-q", "-o", "cat", f"HYPEMAND_RUN_ID={taken['HYPEMAND_RUN_ID']}")
    assert "snapshot taken" in found


# Reloads.


def test_a_reload_has_an_edit_in_force_when_it_returns(service: Service) -> None:
    service.configure()
    service.start()
    service.recorded(1)
    service.configure(interval="3h")
    service.box.run("systemctl", "reload", "hypemand")
    (schedule,) = json.loads(service.hypemand("status", "--json"))["instances"]
    assert schedule["schedule"]["interval"] == "3h"
    assert service.is_active()


def test_a_reload_of_a_broken_edit_fails_says_why_and_changes_nothing(service: Service) -> None:
    service.configure()
    service.start()
    before = service.main_pid()
    service.configure(interval="3 hours")
    assert service.box.ask("systemctl", "reload", "hypemand").returncode != 0
    assert service.is_active()
    assert service.main_pid() == before
    shown = service.box.ask("systemctl", "status", "hypemand", "--no-pager", "--full", "--lines=50").stdout
    assert "schedules[0].interval" in shown
    service.box.wait_until(lambda: "the config file is invalid" in status(service), "the status says so")
    (schedule,) = json.loads(service.box.ask("/usr/local/bin/hypemand", "status", "--json").stdout)["instances"]
    assert schedule["schedule"]["interval"] == "1h"


# Stops, kills and hangs.


def test_a_stop_waits_for_the_capture_under_way(service: Service) -> None:
    service.configure(backend=A_WHILE)
    service.start()
    service.in_mid_capture()
    service.box.run("systemctl", "stop", "hypemand")
    assert service.guest_state() == "Running"
    assert [run["outcome"] for run in service.history()] == ["succeeded"]
    assert service.box.show("hypemand", "Result") == "success"


def assert_settled_before_the_restart(service: Service) -> None:
    """The guest runs, its run is in the history, and the daemon was started again, in this order."""
    service.box.wait_until(lambda: service.box.show("hypemand", "NRestarts") == "1" and service.is_active(), "it is up")
    assert [run["outcome"] for run in service.history()] == ["interrupted"]
    assert service.guest_state() == "Running"
    order = service.order("hypemand starts", SETTLED)
    assert order == ["hypemand starts", SETTLED, "hypemand starts"]


def test_a_guest_is_thawed_by_the_guard_when_the_daemon_is_killed(service: Service) -> None:
    service.drop_in(SOON)
    service.configure(backend=SLOW)
    service.start()
    service.in_mid_capture()
    service.box.run("systemctl", "kill", "-s", "KILL", "--kill-whom=main", "hypemand")
    assert_settled_before_the_restart(service)


def test_a_guest_is_thawed_by_exec_stop_post_when_the_whole_unit_is_killed(service: Service) -> None:
    service.drop_in(SOON)
    service.configure(backend=SLOW)
    service.box.run("systemctl", "start", "hypemand.socket", "hypemand.service")
    service.in_mid_capture()
    service.box.run("systemctl", "kill", "-s", "KILL", "hypemand")
    assert_settled_before_the_restart(service)
    assert service.logged("the guard settles open runs") == []


@pytest.mark.parametrize("kill_mode", ["process", "control-group"])
def test_a_daemon_that_hangs_is_ended_by_the_watchdog_and_its_guest_thawed(service: Service, kill_mode: str) -> None:
    # By the unit's own KillMode the guard is spared; by systemd's default SIGABRT reaches it, too.
    service.drop_in(f"{SOON}WatchdogSec=2s\nKillMode={kill_mode}\n")
    service.configure(backend=SLOW)
    service.start()
    service.in_mid_capture()
    service.box.run("systemctl", "kill", "-s", "STOP", "--kill-whom=main", "hypemand")
    service.box.wait_until(lambda: "Watchdog timeout" in " ".join(said(service)), "the watchdog barks")
    assert_settled_before_the_restart(service)
    assert "Fatal Python error: Aborted" in said(service)
    assert len(service.logged("the guard settles open runs")) == 1


def test_a_guest_whose_hypervisor_hangs_is_thawed_even_after_the_service_was_stopped(service: Service) -> None:
    service.configure(backend=SLOW, runs='shutdown_grace = "1s"')
    service.start()
    service.in_mid_capture()
    lab = service.box.path(f"{STATE}/lab")
    lab.rename(lab.with_name("gone"))
    service.box.run("systemctl", "stop", "hypemand")
    assert guards(service) != []
    assert service.box.show("hypemand", "ActiveState") in ("inactive", "failed")
    lab.with_name("gone").rename(lab)
    service.box.wait_until(lambda: service.guest_state() == "Running", "web-1 runs again")
    service.recorded(1)
    assert [run["outcome"] for run in service.history()] == ["interrupted"]
    service.box.wait_until(lambda: not guards(service), "the guard has ended")


# Troubles.


def test_a_bad_config_is_not_started_again_and_the_status_says_what_is_wrong(service: Service) -> None:
    service.drop_in(SOON)
    service.configure(interval="3 hours")
    assert service.box.ask("systemctl", "start", "hypemand").returncode != 0
    time.sleep(1)
    assert service.box.show("hypemand", "ActiveState") == "failed"
    assert service.box.show("hypemand", "NRestarts") == "0"
    assert service.box.show("hypemand", "ExecMainStatus") == "78"
    shown = service.box.ask("systemctl", "status", "hypemand", "--no-pager", "--full").stdout
    assert "schedules[0].interval" in shown
    assert "status=78/CONFIG" in shown
    service.configure()
    service.start()
    assert service.is_active()


def test_a_start_that_fails_for_good_is_given_up(service: Service) -> None:
    service.drop_in("[Unit]\nStartLimitBurst=3\n[Service]\nRestartSec=50ms\nExecStartPre=/bin/false\n")
    service.configure()
    service.box.ask("systemctl", "start", "hypemand")
    service.box.wait_until(lambda: "Start request repeated too quickly." in " ".join(said(service)), "it is given up")
    service.box.wait_until(lambda: service.box.show("hypemand", "ActiveState") == "failed", "it has failed")
    assert service.box.show("hypemand", "NRestarts") == "3"


def test_a_full_state_filesystem_freezes_no_guest_and_is_got_over(service: Service) -> None:
    service.drop_in("[Service]\nReadWritePaths=/srv/lab\n")
    box = service.box
    box.sh(f"mkdir -p {STATE} /srv/lab; mount -t tmpfs -o size=1M t {STATE}; chown hypemand: {STATE} /srv/lab")
    service.configure(lab="/srv/lab", schedule="", runs='shutdown_grace = "1s"')
    service.start()
    box.sh(f"head -c 1M /dev/zero >{STATE}/filler || true")
    with box.begin("/usr/local/bin/hypemand", "run-now", "web-1") as asking:
        box.wait_until(lambda: service.logged("run failed"), "the run has failed")
        box.run("systemctl", "restart", "hypemand")
        assert asking.wait() == 1
    assert service.guest_state(lab="/srv/lab") == "Running"
    assert service.is_active()
    box.run("rm", f"{STATE}/filler")
    service.hypemand("run-now", "web-1")
    assert [run["outcome"] for run in service.history()] == ["succeeded"]


# Clients.


def answer(service: Service) -> int:
    """The status of an answer over the control socket, waited for as clients do."""

    class Connection(http.client.HTTPConnection):
        def connect(self) -> None:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(PATIENCE_S)
            self.sock.connect(str(service.box.path("/run/hypemand/api.sock")))

    with closing(Connection("localhost")) as connection:
        connection.request("GET", "/snapshot-schedules")
        return connection.getresponse().status


def test_clients_wait_for_a_restart_where_systemd_holds_the_socket(service: Service) -> None:
    service.configure(schedule="")
    box = service.box
    box.run("systemctl", "enable", "--now", "hypemand.socket")
    assert service.main_pid() == 0
    assert answer(service) == 200
    first = service.main_pid()
    assert first != 0
    box.run("systemctl", "kill", "-s", "KILL", "--kill-whom=main", "hypemand")
    box.wait_until(lambda: service.main_pid() == 0, "it is gone")
    assert answer(service) == 200
    assert service.main_pid() not in (0, first)
    with box.begin("systemctl", "restart", "hypemand") as restart:
        while restart.poll() is None:
            assert answer(service) == 200
    assert service.is_active()


def test_tokens_come_as_a_credential_that_may_be_missing(service: Service) -> None:
    box = service.box
    service.configure(more='[api]\nlisten = "127.0.0.1:8080"\n')
    assert box.ask("systemctl", "start", "hypemand").returncode != 0
    assert "has no token" in " ".join(said(service))
    box.write("/etc/hypemand/tokens", "backup:9f2c7f6b7c0d4b0d8f0e6a5f1f0c2d11\n")
    box.path("/etc/hypemand/tokens").chmod(0o600)
    service.start()
    script = (
        "import urllib.request as r; print(r.urlopen(r.Request('http://127.0.0.1:8080/snapshot-schedules',"
        " headers={'Authorization': 'Bearer 9f2c7f6b7c0d4b0d8f0e6a5f1f0c2d11'})).status)"
    )
    assert box.run("/usr/bin/python3", "-c", script) == "200\n"
    refused = box.ask("/usr/bin/python3", "-c", script.replace("9f2c", "9f2d"))
    assert "401" in refused.stdout
