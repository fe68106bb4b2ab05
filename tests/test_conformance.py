"""The kit itself: that it finds what is broken, that it needs no more than it says, and that its example is one."""

import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path

import pytest
import trio

from hypemand.backends import registry
from hypemand.backends.base import BackendError, Surroundings
from hypemand.conformance import Case, Traits, conformance, conformance_cases
from hypemand.conformance.faults import FAULTS, KILLS
from hypemand.conformance.steps import STEPS
from hypemand.conformance.subject import Subject
from hypemand.conformance.suite import run_case
from hypemand.core.errors import InvalidInput
from hypemand.core.model import Freezer
from tests.example import EXAMPLE, example_subject, importable, python_path, write_example, write_metadata
from tests.processes import ROOT, RUN_NOW, Lab, environment, run_cli, running_daemon

TRAITS = Traits(catalog=True)
WITHOUT_MARK = Traits(catalog=True, marks=False)
PAGE = ROOT / "docs" / "backends.md"
CAUGHT_BY = {
    "ResumesNothing": "promise-pause-freezes-the-guest-and-resume-lets-it-run",
    "ResumesAnyPause": "promise-a-pause-that-an-operator-made-is-refused-and-left-alone",
    "TakesAnyPauseForItsOwn": "fault-operator-pauses-in-pause",
    "RemembersItsPauseInMemoryAlone": "fault-killed-after-pause",
    "SettlesWhateverStandsStill": "fault-operator-pauses-in-settle",
    "SettlesNoGuest": "fault-killed-before-resume",
    "SettlesNoPartial": "fault-lost-answer-in-capture",
    "SettlesByDeleting": "promise-settling-adopts-the-published-snapshot-of-the-run",
    "IsStoppedWhenUnreachable": "promise-an-unreachable-hypervisor-is-unavailable-and-never-an-empty-answer",
    "IsGoneWhenUnreachable": "promise-an-unreachable-hypervisor-is-unavailable-and-never-an-empty-answer",
    "HasNoSnapshotsWhenUnreachable": "promise-a-catalog-whose-marker-vanished-is-not-an-empty-catalog",
    "MakesItsFolderAnew": "promise-a-catalog-whose-marker-vanished-is-not-an-empty-catalog",
    "CapturesAndPublishes": "promise-a-capture-is-not-listed-before-it-is-complete-and-published",
    "CompletesAndPublishes": "promise-a-capture-is-not-listed-before-it-is-complete-and-published",
    "PublishesOnce": "fault-error-in-state",
    "DeletesOnce": "promise-deleting-a-snapshot-that-is-gone-is-no-error",
    "DeletesAll": "fault-error-in-publish",
    "ListsNewestFirst": "promise-snapshots-are-listed-oldest-first",
    "KnowsNoTakenNames": "promise-preparing-tells-what-is-needed-and-changes-nothing",
    "NamesSnapshotsByItself": "promise-a-snapshot-is-what-was-asked-for-under-the-id-of-its-run",
    "ConnectsToAnother": "promise-the-connection-leads-to-the-same-hypervisor-from-another-process",
}
FOUND = (AssertionError, pytest.fail.Exception, BackendError)
"""What a case ends with that found something; anything else is a bug in the test."""

test_example = conformance(example_subject, TRAITS)


@contextmanager
def _installed(type_name: str, tmp_path: Path) -> Iterator[None]:
    write_metadata(tmp_path / "variant", "variant", {type_name: f"tests.variant_backends:TYPE_{type_name}"})
    with importable(tmp_path / "variant", ROOT, EXAMPLE):
        yield


@pytest.mark.parametrize(("broken", "name"), CAUGHT_BY.items())
def test_a_broken_backend_is_caught_by_the_case_that_names_it(broken: str, name: str, tmp_path: Path) -> None:
    (case,) = [case for case in conformance_cases(TRAITS) if case.name == name]
    with _installed(broken, tmp_path), pytest.raises(BaseException) as caught:  # noqa: PT011 - looked at below
        run_case(case, lambda directory: example_subject(directory, broken), tmp_path / "case")
    for reason in _reasons(caught.value):
        assert isinstance(reason, FOUND)
        assert not re.match("waited|the run did not come to", str(reason)), "found nothing, and gave up"


def _reasons(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _reasons(inner)
    else:
        yield error


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name) for case in conformance_cases(WITHOUT_MARK) if "killed" not in case.name]
)
def test_a_backend_without_a_mark_of_its_own_can_keep_the_rest(case: Case, tmp_path: Path) -> None:
    tried = []

    def subject(directory: Path) -> AbstractAsyncContextManager[Subject]:
        tried.append(directory.parent)
        return example_subject(directory, "GoesByOursAlone")

    with _installed("GoesByOursAlone", tmp_path):
        run_case(case, subject, tmp_path / "case")  # raises what it finds
    assert tried == [tmp_path / "case"]


def test_the_example_is_found_through_its_entry_point_alone(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="'folder' is not a backend type"):
        registry.backend_type("folder")
    write_example(tmp_path)
    with importable(tmp_path, EXAMPLE):
        assert registry.backend_type("folder").settings.__module__ == "hypemand_folder"


async def test_the_daemon_takes_snapshots_through_the_example(tmp_path: Path) -> None:
    write_example(tmp_path / "site")
    env = python_path(tmp_path / "site", EXAMPLE, ROOT)
    guests = tmp_path / "guests"
    guests.mkdir()
    (guests / "web-1.json").write_text('{"state": "Running"}')
    lab = Lab(tmp_path)
    lab.replace(f"""
state_dir = "state"
[runs]
min_free = "1MiB"
[backends.mine]
type = "folder"
root = "."
{RUN_NOW}
""")
    checked = await run_cli("check-config", "-c", lab.config, env=env)
    assert (checked.status, checked.stderr) == (0, "")
    async with running_daemon(lab.config, env=env) as daemon:
        taken = await daemon.wait_for("snapshot taken", instance_id="web-1")
        await daemon.stop()
    listed = (await run_cli("snapshots", "-c", lab.config, "--json", env=env)).json
    assert [snapshot["name"] for snapshot in listed] == [taken["snapshot_name"]]
    assert (guests / "web-1.json").read_text() == '{"state": "Running"}'


def test_without_its_package_the_config_names_the_types_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"known here: cloud-hypervisor, embedded, .*qemu"):
        registry.connect("mine", {"type": "folder", "root": str(tmp_path)}, Surroundings(tmp_path))


async def test_the_kit_needs_nothing_but_pytest(tmp_path: Path) -> None:
    write_example(tmp_path / "site")
    shutil.copy(EXAMPLE / "test_folder.py", tmp_path)
    env = python_path(tmp_path / "site", EXAMPLE, ROOT) | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    hidden = "import sys; sys.modules.update(pytest_trio=None, hypothesis=None); import pytest; sys.exit(pytest.main())"
    options = ["-p", "no:cacheprovider", "-W", "error", "-q", "-k", "promise or in-capture", str(tmp_path)]
    done = await trio.run_process(
        [sys.executable, "-c", hidden, *options], capture_stdout=True, check=False, env=environment(**env), cwd=tmp_path
    )
    wanted = [case for case in conformance_cases(TRAITS) if "promise" in case.name or "in-capture" in case.name]
    assert f"{len(wanted)} passed" in done.stdout.decode(), done.stdout.decode()


def test_the_page_shows_the_example_as_it_is() -> None:
    shown = re.findall(r"```(?:python|toml)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for name in ("pyproject.toml", "hypemand_folder.py", "test_folder.py"):
        assert (EXAMPLE / name).read_text() in shown, f"docs/backends.md does not show {name} as it is"


def test_the_page_names_every_step_and_every_fault() -> None:
    page = PAGE.read_text()
    for name in [*(step.name for step in STEPS), *(fault.name for fault in FAULTS), *KILLS]:
        assert f"`{name}`" in page, name


def test_every_fault_is_tried_at_every_step_but_for_what_is_left_out_on_purpose() -> None:
    names = {case.name for case in conformance_cases(TRAITS)}
    every = {f"fault-{fault.name}-in-{step.name}" for fault in FAULTS for step in STEPS}
    every |= {f"fault-{kill}-{step.name}" for kill in KILLS for step in STEPS}
    assert every - names == {"fault-operator-pauses-in-capture", "fault-operator-pauses-in-resume"}


def test_a_backend_whose_hypervisor_freezes_has_no_steps_of_the_engine() -> None:
    names = {case.name for case in conformance_cases(Traits(freezes=Freezer.HYPERVISOR))}
    assert not [name for name in names if name.endswith(("-pause", "-resume", "-last-look"))]
    assert "fault-operator-pauses-in-capture" in names


def test_the_names_of_cases_are_told_apart() -> None:
    names = [case.name for case in conformance_cases(TRAITS)]
    assert len(set(names)) == len(names)


def test_traits_that_are_not_the_backends_are_told(tmp_path: Path) -> None:
    case = conformance_cases(Traits(catalog=False))[0]
    with pytest.raises(AssertionError, match=r"traits\.catalog"):
        run_case(case, example_subject, tmp_path)


async def test_a_backend_without_a_catalog_has_to_tell_what_it_may_leave_behind(tmp_path: Path) -> None:
    async with example_subject(tmp_path) as subject:
        assert await subject.leftovers() == []
        subject.catalog = None
        with pytest.raises(NotImplementedError):
            await subject.leftovers()
