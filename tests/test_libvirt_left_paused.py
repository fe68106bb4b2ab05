"""libvirt is through with a snapshot, and can't let the guest go on. The guest and its pause are real."""

from collections.abc import Iterator
from typing import Any

import libvirt
import pytest

from hypemand.backends.base import BackendUnavailable, CaptureFailed, Settled
from hypemand.backends.libvirt import capturing
from hypemand.backends.libvirt.domains import Pause, find_domain
from tests.libvirt_backend import NAME, WEB, backend_of, new_request, settle
from tests.libvirt_guest import BY_USER, LibvirtGuest, running_libvirt_guest, shared_libvirtd

pytestmark = pytest.mark.libvirt


@pytest.fixture
def guest() -> Iterator[LibvirtGuest]:
    with running_libvirt_guest(shared_libvirtd()) as guest:
        yield guest


class LeftPaused:
    """A domain that stands still after its snapshot, for the reason that libvirt then tells.

    Else it is the real one, which no way was found to have QEMU refuse to resume after it was saved.
    """

    def __init__(self, domain: libvirt.virDomain, why: Pause, refusals: list[str]) -> None:
        self._domain, self._why, self._refusals = domain, why, refusals

    def __getattr__(self, name: str) -> Any:
        return getattr(self._domain, name)

    def snapshotCreateXML(self, document: str, flags: int) -> libvirt.virDomainSnapshot:  # noqa: N802 - libvirt's name
        made = self._domain.snapshotCreateXML(document, flags)
        if flags == libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC:
            self._domain.suspend()
        return made

    def state(self) -> list[int]:
        state, reason = self._domain.state()
        return [state, self._why] if (state, reason) == BY_USER else [state, reason]

    def resume(self) -> int:
        if self._refusals:
            self._domain.blockJobInfo(self._refusals.pop())  # any error of libvirt's own: there is no such disk
        return self._domain.resume()


@pytest.fixture(params=[Pause.SAVE, Pause.API_ERROR], ids=lambda why: why.name)
def refusals(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Has libvirt leave the guest paused after each snapshot; takes how often a resume is refused."""
    refusals: list[str] = []
    monkeypatch.setattr(
        capturing, "find_domain", lambda *asked: LeftPaused(find_domain(*asked), request.param, refusals)
    )
    return refusals


async def test_a_guest_that_libvirt_left_paused_after_a_capture_that_went_well_is_resumed_and_told_of(
    guest: LibvirtGuest, refusals: list[str]
) -> None:
    assert refusals == []
    async with backend_of(guest.libvirtd.uri) as backend:
        captured = await backend.complete(await backend.capture(WEB, new_request()))
        assert captured.warnings == ("libvirt left the guest paused, it was resumed",)
        assert guest.runs()
        await backend.publish(captured.snapshot)
        assert await backend.list_snapshots(WEB) == (captured.snapshot,)
    await guest.next_ticks()


async def test_a_run_whose_guest_libvirt_cannot_resume_stays_open_until_it_runs_and_its_snapshot_is_kept(
    guest: LibvirtGuest, refusals: list[str]
) -> None:
    refusals[:] = ["vdx", "vdx"]
    async with backend_of(guest.libvirtd.uri) as backend:
        request = new_request()
        with pytest.raises(CaptureFailed, match="the snapshot is made; the guest is still paused, and could not be"):
            await backend.capture(WEB, request)
        with pytest.raises(BackendUnavailable, match="vdx"):
            await settle(backend, request)
        assert not guest.runs()
        settled = await settle(backend, request)
        assert settled.resumed
        assert guest.runs()
        assert await backend.list_snapshots(WEB) == (settled.snapshot,)
        assert guest.names() == guest.tags() == [NAME]


async def test_a_guest_that_stays_paused_after_a_capture_that_failed_is_resumed_by_settling(
    guest: LibvirtGuest, refusals: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals[:] = ["vdx"]
    make = LeftPaused.snapshotCreateXML

    def fail(domain: LeftPaused, document: str, flags: int) -> None:
        make(domain, document, flags).delete()
        domain.blockJobInfo("vdy")

    monkeypatch.setattr(LeftPaused, "snapshotCreateXML", fail)
    async with backend_of(guest.libvirtd.uri) as backend:
        request = new_request()
        with pytest.raises(CaptureFailed, match=r"libvirt: .*vdy.*; the guest is still paused, and could not be .*vdx"):
            await backend.capture(WEB, request)
        assert not guest.runs()
        assert await settle(backend, request) == Settled(resumed=True)
        assert guest.runs()
        assert guest.names() == guest.tags() == []


async def test_a_guest_that_an_operator_paused_before_its_capture_stays_so(guest: LibvirtGuest) -> None:
    with guest.domain() as domain:
        domain.suspend()
    async with backend_of(guest.libvirtd.uri) as backend:
        captured = await backend.complete(await backend.capture(WEB, new_request()))
        assert captured.warnings == ()
        assert guest.state() == BY_USER
