"""Every built-in backend keeps what `hypemand.conformance` asks."""

from functools import partial
from pathlib import Path

import pytest

from hypemand.conformance import Case, Traits, conformance, conformance_cases
from hypemand.conformance.suite import run_case
from hypemand.core.model import Freezer
from tests.contract import embedded_subject, hypeman_subject, libvirt_subject, qemu_subject, vmm_subject

test_embedded = conformance(embedded_subject, Traits(catalog=True))

test_qemu = pytest.mark.qemu(conformance(qemu_subject, Traits(freezes=Freezer.HYPERVISOR, catalog=True)))

test_qemu_background = pytest.mark.qemu(conformance(partial(qemu_subject, mode="background"), Traits(catalog=True)))

test_libvirt = pytest.mark.libvirt(conformance(libvirt_subject, Traits(freezes=Freezer.HYPERVISOR)))
test_hypeman = conformance(hypeman_subject, Traits(freezes=Freezer.HYPERVISOR, catalog=True, pauses=False))

test_cloud_hypervisor = conformance(partial(vmm_subject, kind="cloud-hypervisor"), Traits(catalog=True, marks=False))

WITH_FILES_INSIDE = ("in-capture", "in-complete", "in-settle")
"""Steps to which a root directory of the VMM's own makes a difference."""


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name)
        for case in conformance_cases(Traits(catalog=True, marks=False))
        if case.name.startswith("promise") or case.name.endswith(WITH_FILES_INSIDE)
    ],
)
def test_firecracker_below_the_jailer(case: Case, tmp_path: Path) -> None:
    assert case.applies(Traits(catalog=True, marks=False))
    run_case(case, partial(vmm_subject, kind="firecracker", jailed=True), tmp_path)


test_firecracker = conformance(partial(vmm_subject, kind="firecracker"), Traits(catalog=True, marks=False))
