"""Every built-in backend keeps what `hypemand.conformance` asks."""

from functools import partial

import pytest

from hypemand.conformance import Traits, conformance
from hypemand.core.model import Freezer
from tests.contract import embedded_subject, qemu_subject, vmm_subject

test_embedded = conformance(embedded_subject, Traits(catalog=True))

test_qemu = pytest.mark.qemu(conformance(qemu_subject, Traits(freezes=Freezer.HYPERVISOR, catalog=True)))

test_qemu_background = pytest.mark.qemu(conformance(partial(qemu_subject, mode="background"), Traits(catalog=True)))

test_cloud_hypervisor = conformance(partial(vmm_subject, kind="cloud-hypervisor"), Traits(catalog=True, marks=False))

test_firecracker = conformance(partial(vmm_subject, kind="firecracker"), Traits(catalog=True, marks=False))
