"""Set up for every test."""

import fnmatch
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
import structlog.testing
from hypothesis import settings
from structlog.typing import EventDict

from tests.libvirt_site import is_required, missing_parts, require_libvirt
from tests.processes import TOLD
from tests.qemu_guest import require_qemu
from tests.systemd_box import require_systemd
from tests.systemd_service import Service, booted_with_hypemand, installed_once
from tests.virtual_time import VirtualClock

# A busy machine is no bug, and 60 examples a promise keep the suite quick.
settings.register_profile("hypemand", deadline=None, max_examples=60)
settings.load_profile("hypemand")

# A shell without job control has what it starts in the background ignore SIGINT; some of our children are sent it.
signal.signal(signal.SIGINT, signal.default_int_handler)


LONG = (
    "test_two_minutes_of_idling",
    "test_a_daemon_killed_or_hung_at_any_step",
    "test_fifty_thousand_runs",
    "test_a_monitor_that_another_client_holds",
    "test_twenty_guests_at_once",
    "test_a_week_of_a_hundred_schedules",
    "test_a_guest_whose_hypervisor_hangs_is_thawed_even_after",
    "test_a_qemu_that_is_frozen",
    "test_a_daemon_whose_libvirtd_hangs",
)
"""Tests of more than a quarter of a minute, the longest first."""

ONE_AT_A_TIME = (
    "test_qemu_faults.py::*",
    "test_kills.py::test_a_daemon_killed_or_hung_at_any_step*",
    "test_simulation.py::test_fifty_thousand_runs*",
    "test_libvirt_daemon.py::test_a_daemon_whose_libvirtd_hangs*",
)
"""Tests that would disturb each other: some keep processors or disk busy, others look whether something is in time.
Twenty guests in software emulation, or the simulation, leave a guard next to nothing of two processors.
"""


OF_LIBVIRT = "test_libvirt*.py"
"""Files that import libvirt's binding, which may not be there."""


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out what can't even be imported, unless it is required."""
    if fnmatch.fnmatch(collection_path.name, OF_LIBVIRT) and not is_required() and missing_parts():
        return True
    return None


def pytest_report_header() -> str | None:
    """Tell what is left out so."""
    missing = missing_parts()
    return f"{OF_LIBVIRT} and some of test_contract.py are left out: {missing} not found" if missing else None


@pytest.hookimpl(tryfirst=True)  # pytest-xdist has to find the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the long ones: at the end one alone would keep the others' processors idle."""
    ranks = {
        item: next((rank for rank, name in enumerate(LONG) if item.name.startswith(name)), len(LONG)) for item in items
    }
    items.sort(key=ranks.__getitem__)
    for item in items:
        if any(fnmatch.fnmatchcase(f"{item.path.name}::{item.name}", names) for names in ONE_AT_A_TIME):
            item.add_marker(pytest.mark.xdist_group("one-at-a-time"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Stop where groups are not kept: a pytest that is too new for pytest-xdist says nothing of it."""
    in_groups = session.config.getoption("loadgroup", False)  # in workers alone
    marked = [item for item in session.items if item.get_closest_marker("xdist_group")]
    if in_groups and not all("@" in item.nodeid for item in marked):
        pytest.exit("pytest-xdist can't keep groups of tests together with this pytest; see pyproject.toml", 3)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests have to tell of what they did, wherever they ran."""
    for report in [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]:
        for key, told in report.user_properties:
            if key == TOLD:
                terminalreporter.section(report.nodeid)
                terminalreporter.write_line(str(told))


@pytest.fixture
def virtual_clock() -> VirtualClock:
    """A clock that leaps; pytest-trio runs the test on it."""
    return VirtualClock()


@pytest.fixture(autouse=True)
def quiet_log() -> Iterator[None]:
    """Only critical things are logged, unless a test sets the log up itself: rendering would take most of the time."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.reset_defaults()


@pytest.fixture(autouse=True)
def qemu_where_it_is_needed(request: pytest.FixtureRequest) -> None:
    """Here and not in the tests: a skip out of async code would not say what to install."""
    if request.node.get_closest_marker("qemu") is not None:
        require_qemu()


@pytest.fixture(autouse=True)
def libvirt_where_it_is_needed(request: pytest.FixtureRequest) -> None:
    """The same for libvirt."""
    if request.node.get_closest_marker("libvirt") is not None:
        require_libvirt()


@pytest.fixture(scope="session", autouse=True)
def shared_libvirtd_ends() -> Iterator[None]:
    """The libvirtd that some tests share is ended with the last one."""
    yield
    guests = sys.modules.get("tests.libvirt_guest")
    if guests is not None:
        guests.end_shared()


@pytest.fixture
def heard_log(quiet_log: None) -> Iterator[list[EventDict]]:
    """What is logged during the test, of every level."""
    with structlog.testing.capture_logs() as heard:
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG))
        yield heard


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An installed hypemand, to be laid into boxes."""
    require_systemd()
    own = tmp_path_factory.getbasetemp()
    return installed_once(own.parent if "PYTEST_XDIST_WORKER" in os.environ else own)


@pytest.fixture
def service(installed: Path) -> Iterator[Service]:
    """hypemand in a systemd that was booted for the test."""
    with booted_with_hypemand(installed) as made:
        yield made
