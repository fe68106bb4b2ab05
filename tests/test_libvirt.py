"""What the libvirt backend keeps beside the promises of every backend: what it refuses, and what it leaves alone."""

import gc
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import libvirt
import pytest
from structlog.typing import EventDict

from hypemand.backends import registry
from hypemand.backends.base import (
    BackendUnavailable,
    CaptureFailed,
    InstanceNotFound,
    Settled,
    Status,
    Unsupported,
)
from hypemand.backends.libvirt import snapshots
from hypemand.backends.libvirt.connections import Connections
from hypemand.backends.libvirt.disks import check_capturable, check_firmware, parts_of, read_disks
from hypemand.backends.libvirt.documents import Stage, new_document, new_note, note_of, published_document, read_xml
from hypemand.backends.libvirt.settings import LibvirtSettings
from hypemand.core.errors import InvalidInput
from hypemand.core.model import InstanceId, InstanceState, SnapshotKind
from tests.libvirt_backend import NAME, WEB, backend_of, new_request, settle, take
from tests.libvirt_guest import LibvirtGuest, running_libvirt_guest, shared_libvirtd
from tests.libvirt_site import NOBODY, domain_xml
from tests.qemu_guest import run_img

pytestmark = pytest.mark.libvirt

THEIRS = "<domainsnapshot><name>{}</name><description>by hand</description></domainsnapshot>"
RAW_DISK = """<disk type='file' device='disk'>
  <driver name='qemu' type='{format}'/><source file='{{home}}/data'/><target dev='vdb' bus='virtio'/>{more}
</disk>"""


@pytest.fixture
def guest() -> Iterator[LibvirtGuest]:
    with running_libvirt_guest(shared_libvirtd()) as guest:
        yield guest


async def test_snapshots_of_others_are_neither_listed_nor_deleted_and_their_names_are_taken(
    guest: LibvirtGuest,
) -> None:
    async with backend_of(guest.libvirtd.uri) as backend:
        with guest.domain() as domain:
            domain.snapshotCreateXML(THEIRS.format("before"))
            ours = await take(backend)
            domain.snapshotCreateXML(THEIRS.format("after"))
        assert await backend.list_snapshots(WEB) == (ours,)
        ready = await backend.prepare(WEB, SnapshotKind.STANDBY)
        assert set(ready.taken_names) == {"before", NAME, "after"}
        await backend.delete_snapshot(ours)
        assert guest.names() == guest.tags() == ["after", "before"]
        for name in ("before", "after"):
            with pytest.raises(CaptureFailed, match="already exists"):
                await backend.capture(WEB, new_request(name))
        request = new_request("before")
        with pytest.raises(CaptureFailed):
            await backend.capture(WEB, request)
        assert await settle(backend, request) == Settled()
        assert guest.names() == guest.tags() == ["after", "before"]
        await guest.next_ticks()


async def test_a_snapshot_that_an_operator_made_their_own_is_left_alone(guest: LibvirtGuest) -> None:
    async with backend_of(guest.libvirtd.uri) as backend:
        snapshot = await take(backend)
        with guest.domain() as domain:
            edited = re.sub(
                "<description>.*</description>", "<description>mine</description>", xml_of(domain), flags=re.DOTALL
            )
            domain.snapshotCreateXML(edited, libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE)
        assert await backend.list_snapshots(WEB) == ()
        await backend.delete_snapshot(snapshot)
        assert guest.names() == guest.tags() == [NAME]


def xml_of(domain: libvirt.virDomain, name: str = NAME) -> str:
    return domain.snapshotLookupByName(name).getXMLDesc(libvirt.VIR_DOMAIN_SNAPSHOT_XML_SECURE)


async def test_publishing_changes_nothing_but_the_description_and_the_current_snapshot_stays_so(
    guest: LibvirtGuest,
) -> None:
    async with backend_of(guest.libvirtd.uri) as backend:
        captured = await backend.capture(WEB, new_request())
        with guest.domain() as domain:
            before = xml_of(domain)
            await backend.publish(captured.snapshot)
            after = xml_of(domain)
            assert domain.snapshotLookupByName(NAME).isCurrent()
    pairs = zip(before.splitlines(), after.splitlines(), strict=True)
    changed = [old for old, new in pairs if old != new]
    assert len(changed) == 2
    assert changed[0].startswith("  <description>hypemand is at work")
    assert changed[1].startswith("{&quot;id&quot;")
    assert "Taken by hypemand on schedule" in after


async def test_the_freeze_is_told_as_long_as_libvirts_call_took_and_none_for_a_guest_that_stood_still(
    guest: LibvirtGuest,
) -> None:
    async with backend_of(guest.libvirtd.uri) as backend:
        assert ((await backend.capture(WEB, new_request())).freeze_s or 0) > 0
        with guest.domain() as domain:
            domain.suspend()
        assert (await backend.capture(WEB, new_request("other"))).freeze_s == 0


async def test_a_guest_is_captured_running_and_shut_off_in_one_list(guest: LibvirtGuest) -> None:
    async with backend_of(guest.libvirtd.uri) as backend:
        running = await take(backend, "a-running")
        with guest.domain() as domain:
            domain.destroy()
        assert await backend.state(WEB) == Status(InstanceState.STOPPED)
        ready = await backend.prepare(WEB, SnapshotKind.STOPPED)
        assert [room.path for room in ready.rooms] == [guest.disk]
        stopped = await take(backend, "b-stopped", kind=SnapshotKind.STOPPED)
        assert await backend.list_snapshots(WEB) == (running, stopped)
        with pytest.raises(CaptureFailed, match="was shut off since"):
            await backend.capture(WEB, new_request("c-too-late"))
        with guest.domain() as domain:
            domain.create()
        with pytest.raises(CaptureFailed, match="was started since"):
            await backend.capture(WEB, new_request("d-too-early", kind=SnapshotKind.STOPPED))
        for snapshot in (running, stopped):
            await backend.delete_snapshot(snapshot)
        assert guest.names() == guest.tags() == []


async def test_a_guest_whose_memory_is_saved_by_libvirt_is_not_captured_without_it(guest: LibvirtGuest) -> None:
    async with backend_of(guest.libvirtd.uri) as backend:
        with guest.domain() as domain:
            domain.managedSave()
        assert await backend.state(WEB) == Status(InstanceState.STOPPED)
        with pytest.raises(BackendUnavailable, match="managedsave"):
            await backend.prepare(WEB, SnapshotKind.STOPPED)


async def test_a_domain_that_is_not_defined_any_more_is_not_found_and_its_snapshots_are_gone(
    guest: LibvirtGuest,
) -> None:
    async with backend_of(guest.libvirtd.uri) as backend:
        request = new_request()
        snapshot = (await backend.capture(WEB, request)).snapshot
        await backend.publish(snapshot)
        with guest.domain() as domain:
            domain.destroy()
            domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA)
        with pytest.raises(InstanceNotFound):
            await backend.state(WEB)
        assert await backend.list_snapshots(WEB) == ()
        await backend.delete_snapshot(snapshot)
        settled = await settle(backend, request)
        assert (settled.snapshot, settled.resumed) == (None, False)
        assert "no domain with matching name 'web-1'" in settled.notes[0]


async def test_a_transient_guest_is_captured_and_a_warning_tells_what_becomes_of_its_snapshots(
    guest: LibvirtGuest,
) -> None:
    with guest.domain() as domain:
        domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA)
    async with backend_of(guest.libvirtd.uri) as backend:
        ready = await backend.prepare(WEB, SnapshotKind.STANDBY)
        assert ["transient" in warning for warning in ready.warnings] == [True]
        snapshot = await take(backend)
        assert await backend.list_snapshots(WEB) == (snapshot,)
        await backend.delete_snapshot(snapshot)
        assert guest.tags() == []


async def test_domains_whose_names_no_instance_can_have_are_left_out_and_told_once(
    guest: LibvirtGuest, heard_log: list[EventDict]
) -> None:
    with running_libvirt_guest(guest.libvirtd, instance_id="two words", starts=False):
        async with backend_of(guest.libvirtd.uri) as backend:
            for _ in range(2):
                assert "two words" not in await backend.instances()
            assert WEB in await backend.instances()
    told = [line for line in heard_log if "domain" in line]
    assert [line["domain"] for line in told] == ["two words"]


async def test_a_writable_disk_that_is_not_qcow2_is_refused_by_its_name_before_anything_stands_still() -> None:
    libvirtd = shared_libvirtd()
    home = libvirtd.new_home()
    run_img("create", "-q", "-f", "raw", home / "data", "1M")
    with running_libvirt_guest(libvirtd, devices=RAW_DISK.format(format="raw", more=""), home=home):
        async with backend_of(libvirtd.uri) as backend:
            with pytest.raises(Unsupported, match=r"disk vdb \(.*/data\) is raw.*qemu-img convert"):
                await backend.prepare(WEB, SnapshotKind.STANDBY)


@contextmanager
def as_somebody_else() -> Iterator[None]:
    """Root may look everywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY - 1)
    try:
        yield
    finally:
        os.seteuid(0)


async def test_a_disk_in_a_directory_for_libvirt_alone_is_captured_without_a_check_of_its_room(
    guest: LibvirtGuest, heard_log: list[EventDict]
) -> None:
    async with backend_of(guest.libvirtd.uri) as backend:
        assert len((await backend.prepare(WEB, SnapshotKind.STANDBY)).rooms) == 1
        guest.disk.parent.chmod(0)
        try:
            with as_somebody_else():
                with pytest.raises(PermissionError):
                    guest.disk.stat()
                assert (await backend.prepare(WEB, SnapshotKind.STANDBY)).rooms == ()
        finally:
            guest.disk.parent.chmod(0o700)
    assert [line["disk"] for line in heard_log if "free space is not checked" in line["event"]] == [str(guest.disk)]


async def test_a_read_only_disk_is_left_out_and_several_writable_ones_are_captured_together() -> None:
    libvirtd = shared_libvirtd()
    home = libvirtd.new_home()
    run_img("create", "-q", "-f", "raw", home / "data", "1M")
    run_img("create", "-q", "-f", "qcow2", home / "more", "1M")
    more = RAW_DISK.format(format="qcow2", more="").replace("/data", "/more").replace("vdb", "vdc")
    devices = RAW_DISK.format(format="raw", more="<readonly/>") + more
    with running_libvirt_guest(libvirtd, devices=devices, home=home) as guest:
        async with backend_of(libvirtd.uri) as backend:
            ready = await backend.prepare(WEB, SnapshotKind.STANDBY)
            assert [room.path.name for room in ready.rooms] == ["web-1.qcow2", "more"]
            snapshot = await take(backend)
            assert NAME in run_img("snapshot", "-U", "-l", home / "more")
            await backend.delete_snapshot(snapshot)
            assert NAME not in run_img("snapshot", "-U", "-l", home / "more")
            await guest.next_ticks()


def document(devices: str = "", *, firmware: str = "") -> str:
    text = domain_xml("web-1", Path("/vms/web-1.qcow2"), Path("/log"), devices=devices)
    return text.replace("hvm</type>", f"hvm</type>{firmware}")


@pytest.mark.parametrize(
    ("devices", "why"),
    [
        pytest.param(RAW_DISK.format(format="raw", more=""), "vdb .* is raw", id="raw"),
        pytest.param(RAW_DISK.format(format="qcow2", more="<transient/>"), "vdb .* is transient", id="transient"),
        pytest.param(
            RAW_DISK.format(format="qcow2", more="").replace("device=", "snapshot='no' device="), "'no'", id="left out"
        ),
        pytest.param(
            "<disk type='network' device='disk'><driver type='raw'/><source protocol='rbd' name='pool/image'/>"
            "<target dev='vdb'/></disk>",
            "vdb .not a file. is raw",
            id="network",
        ),
        pytest.param(
            "<disk type='block' device='lun'><source dev='/dev/sdx'/><target dev='sda'/></disk>", "sda", id="lun"
        ),
    ],
)
def test_disks_that_cannot_be_captured_are_refused_by_name(devices: str, why: str) -> None:
    with pytest.raises(Unsupported, match=why):
        check_capturable(read_disks(read_xml(document(devices))))


@pytest.mark.parametrize(
    "devices",
    [
        RAW_DISK.format(format="raw", more="<readonly/>"),
        "<disk type='file' device='cdrom'><driver type='raw'/><source file='/iso'/><target dev='sda'/></disk>",
        "<disk type='file' device='cdrom'><target dev='sda'/><readonly/></disk>",
        "<disk type='file' device='floppy'><target dev='fda'/></disk>",
    ],
)
def test_what_cannot_be_written_to_is_no_part_of_a_snapshot(devices: str) -> None:
    disks = read_disks(read_xml(document(devices)))
    check_capturable(disks)
    assert list(parts_of(disks).values()) == [True, False]


UEFI = "<loader readonly='yes' type='pflash'>/code.fd</loader><nvram{}>/vars.fd</nvram>"


@pytest.mark.parametrize(
    ("firmware", "version", "why"),
    [
        ("", 9_000_000, None),
        ("<loader type='rom'>/bios</loader>", 9_000_000, None),
        (UEFI.format(""), 9_000_000, "UEFI firmware, of which libvirt 9.0.0 makes no internal snapshots"),
        (UEFI.format(" format='qcow2'"), 10_009_000, "10.9 can make them but not delete them"),
        (UEFI.format(" format='qcow2'"), 10_010_000, None),
        (UEFI.format(" format='raw'"), 11_000_000, "format='qcow2' on <nvram>"),
        (UEFI.format(""), 11_000_000, "format='qcow2' on <nvram>"),
    ],
)
def test_uefi_takes_a_libvirt_that_can_save_its_variables(firmware: str, version: int, why: str | None) -> None:
    domain = read_xml(document(firmware=firmware))
    with nullcontext() if why is None else pytest.raises(Unsupported, match=re.escape(why)):
        check_firmware(domain, version)
        assert why is None


def test_a_note_comes_back_as_it_was_written_and_libvirts_words_around_it_do_not_matter() -> None:
    request = new_request()
    note = new_note(request, 17)
    written = read_xml(new_document(request, note, {"vda": True, "sda": False}))
    assert note_of(written) == note
    assert [disk.attrib for disk in written.findall("disks/disk")] == [
        {"name": "vda", "snapshot": "internal"},
        {"name": "sda", "snapshot": "no"},
    ]
    text = new_document(request, note, {"vda": True})
    with_domain = text.replace(
        "</domainsnapshot>", "<domain><description>a &amp; b</description></domain></domainsnapshot>"
    )
    listed = note_of(read_xml(published_document(with_domain, note)))
    assert listed == note
    assert "<domain><description>a &amp; b</description></domain>" in published_document(with_domain, note)


@pytest.mark.parametrize(
    "text", ["", "by hand", "{}", "[1]", '"hypemand"', '{"hypemand":1}', '{"hypemand":1,"id":5}', "x\n{"]
)
def test_what_is_no_note_of_ours_is_somebody_elses(text: str) -> None:
    assert note_of(read_xml(f"<domainsnapshot><description>{text}</description></domainsnapshot>")) is None


async def test_a_snapshot_with_a_note_of_a_later_format_is_left_alone_and_told(
    guest: LibvirtGuest, heard_log: list[EventDict]
) -> None:
    request = new_request()
    text = new_note(request, 17).text.replace('"hypemand":1', '"hypemand":2').replace("making", "listed")
    made = ET.Element("domainsnapshot")
    ET.SubElement(made, "name").text = NAME
    ET.SubElement(made, "description").text = text
    with guest.domain() as domain:
        domain.snapshotCreateXML(ET.tostring(made, encoding="unicode"))
    async with backend_of(guest.libvirtd.uri) as backend:
        assert await backend.list_snapshots(WEB) == ()
        assert [(line["snapshot_name"], line["error"]) for line in heard_log] == [
            (NAME, "format 2 is newer than this hypemand")
        ]
        assert await settle(backend, request) == Settled()
    assert guest.names() == guest.tags() == [NAME]


def test_a_note_of_a_later_version_is_read_and_its_keys_are_kept() -> None:
    note = new_note(new_request(), 17)
    line = note.text.replace('"hypemand":1', '"hypemand":1,"colour":"blue"').replace("&", "&amp;")
    found = note_of(read_xml(f"<domainsnapshot><description>{line}</description></domainsnapshot>"))
    assert found is not None
    assert (found.extra, found.stage) == ({"colour": "blue"}, Stage.MAKING)
    assert '"colour":"blue"' in found.text


@pytest.mark.parametrize("uri", ["xen:///system", "test:///default", "", "qemu+ssh://[/system"])
def test_a_uri_of_another_driver_is_refused(uri: str) -> None:
    with pytest.raises(InvalidInput, match="uri: "):
        registry.parse_settings("libvirt", {"uri": uri})


@pytest.mark.parametrize(
    ("uri", "here"),
    [
        ("qemu:///system", True),
        ("qemu:///session", True),
        ("qemu+unix:///system?socket=/run/other", True),
        ("qemu+ssh://root@host/system", False),
        ("qemu://host/system", False),
        ("qemu+tcp://localhost/system", False),
    ],
)
def test_free_space_is_looked_at_where_the_guests_are_on_this_machine(uri: str, here: bool) -> None:
    assert registry.parse_settings("libvirt", {"uri": uri}).is_here is here


def test_without_the_binding_the_config_says_what_to_install(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('[backends.vms]\ntype = "libvirt"\n')
    hidden = (
        "import importlib.util, sys; find = importlib.util.find_spec;"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'libvirt' else find(name, *rest);"
        "sys.modules['libvirt'] = None;"
        "from hypemand.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", hidden, "check-config", "--config", config], capture_output=True, text=True, check=False
    )
    assert done.returncode == 78
    assert "backends.vms.type: the type libvirt needs libvirt's binding" in done.stderr
    assert "pip install 'hypemand[libvirt]'" in done.stderr
    assert "Traceback" not in done.stderr


async def test_an_unreachable_libvirt_is_named_by_its_uri() -> None:
    async with backend_of("qemu+unix:///session?socket=/nowhere/sock") as backend:
        with pytest.raises(BackendUnavailable, match=r"libvirt at qemu\+unix:///session\?socket=/nowhere/sock"):
            await backend.state(InstanceId("web-1"))


class Refusing(libvirt.virDomainSnapshot):
    """A snapshot that libvirt refuses to delete, as later versions may where the disks have nothing of it."""

    _o = None  # there is nothing of libvirt's below

    def __init__(self) -> None:
        self.asked: list[int] = []

    def delete(self, flags: int = 0) -> int:
        self.asked.append(flags)
        if flags == 0:
            raise libvirt.libvirtError("snapshot is not in the disks")
        return 0


def test_remains_that_libvirt_refuses_to_delete_are_struck_off_and_told(heard_log: list[EventDict]) -> None:
    handle = Refusing()
    error = libvirt.libvirtError
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(error, "get_error_domain", lambda _: 10)
        patch.setattr(error, "get_error_code", lambda _: 9)
        snapshots.delete_remains(snapshots.Found(handle, NAME, new_note(new_request(), 0)))
    assert handle.asked == [0, libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY]
    assert [line["snapshot_name"] for line in heard_log] == [NAME]


async def test_the_event_loop_never_lets_go_of_anything_of_libvirts_which_might_take_long(
    guest: LibvirtGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last guest or snapshot of a connection closes it, and that waits for libvirt's daemon."""
    freed: list[bool] = []

    def watch(kind: type) -> None:
        free = kind.__dict__["__del__"]

        def freed_by(it: Any) -> None:
            if it._o is not None:  # a connection that was closed lets go of nothing any more
                freed.append(threading.current_thread() is threading.main_thread())
            free(it)

        monkeypatch.setattr(kind, "__del__", freed_by)

    gc.collect()
    for kind in (libvirt.virConnect, libvirt.virDomain, libvirt.virDomainSnapshot):
        watch(kind)
    async with backend_of(guest.libvirtd.uri) as backend:
        snapshot = await take(backend)
        with pytest.raises(CaptureFailed):
            await backend.capture(WEB, new_request())
        with pytest.raises(CaptureFailed):
            await backend.capture(WEB, new_request("too-early", kind=SnapshotKind.STOPPED))
        with pytest.raises(InstanceNotFound):
            await backend.state(InstanceId("never-was"))
        await backend.prepare(WEB, SnapshotKind.STANDBY)
        await backend.instances()
        assert await backend.list_snapshots(WEB) == (snapshot,)
        await settle(backend, new_request("nothing"))
        await backend.delete_snapshot(snapshot)
    gc.collect()
    assert len(freed) > 10
    assert not any(freed)


async def test_a_connection_that_comes_back_late_is_closed_and_not_kept(guest: LibvirtGuest) -> None:
    connections = Connections(LibvirtSettings(uri=guest.libvirtd.uri))
    await connections.ask(lambda connection: connection.getLibVersion())
    assert len(connections._idle) == 1
    await connections.aclose()
    await connections.ask(lambda connection: connection.getLibVersion())
    assert connections._idle == []
