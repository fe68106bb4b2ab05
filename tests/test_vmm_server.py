"""The stand-in for Cloud Hypervisor and Firecracker does what their documents say: by it the backends are judged."""

import http.client
import threading
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.vmm_guest import CLOUD_HYPERVISOR, FIRECRACKER, KINDS, MIB, Guest, ask, count_in, running_guest

both = pytest.mark.parametrize("kind", KINDS)
CH = "/api/v1"


def save(guest: Guest, directory: Path) -> tuple[int, Any]:
    directory.mkdir(exist_ok=True)
    if guest.kind == CLOUD_HYPERVISOR:
        return guest.ask("PUT", f"{CH}/vm.snapshot", {"destination_url": f"file://{directory}"})
    paths = {"snapshot_path": f"{directory}/state", "mem_file_path": f"{directory}/memory"}
    return guest.ask("PUT", "/snapshot/create", {"snapshot_type": "Full", **paths})


def memory_of(guest: Guest, directory: Path) -> Path:
    return directory / ("memory-ranges" if guest.kind == CLOUD_HYPERVISOR else "memory")


@both
async def test_a_guest_counts_until_it_is_paused_and_counts_on_when_resumed(kind: str, tmp_path: Path) -> None:
    async with running_guest(kind, tmp_path, tick_s=0.002) as guest:
        await guest.ticks()
        guest.pause()
        stood = guest.count()
        await trio.sleep(0.05)
        assert guest.count() == stood
        assert guest.state() == "Paused"
        guest.resume()
        assert await guest.ticks() > stood


@both
async def test_a_snapshot_is_refused_unless_paused_and_is_files_of_the_memory(kind: str, tmp_path: Path) -> None:
    async with running_guest(kind, tmp_path) as guest:
        status, said = save(guest, tmp_path / "to")
        assert status >= 400
        assert "not paused" in str(said) or "while VM is running" in str(said)
        assert list((tmp_path / "to").iterdir()) == []
        guest.pause()
        assert save(guest, tmp_path / "to") == (204, None)
        memory = memory_of(guest, tmp_path / "to")
        assert memory.stat().st_size == MIB
        assert count_in(memory) == guest.count()


@both
async def test_requests_are_served_one_by_one(kind: str, tmp_path: Path) -> None:
    async with running_guest(kind, tmp_path, save_s=0.3) as guest:
        guest.pause()
        saving = threading.Thread(target=save, args=(guest, tmp_path / "to"))
        saving.start()
        with trio.fail_after(20):
            while not memory_of(guest, tmp_path / "to").exists():
                await trio.sleep(0.005)
        assert guest.state() == "Paused"
        assert memory_of(guest, tmp_path / "to").stat().st_size == MIB  # the answer came when that was done
        saving.join()


async def test_cloud_hypervisor_says_no_as_its_versions_do(tmp_path: Path) -> None:
    async with running_guest(CLOUD_HYPERVISOR, tmp_path) as guest:
        guest.pause()
        status, said = guest.ask("PUT", f"{CH}/vm.pause")
        assert status == 500
        assert "InvalidStateTransition(Paused, Paused)" in said[-1]
        assert guest.ask("PUT", f"{CH}/vm.resume", {"a": "body"})[0] == 400
        assert guest.ask("PUT", f"{CH}/vm.nothing")[0] == 404
        save(guest, tmp_path / "to")
        status, said = save(guest, tmp_path / "to")  # its files are there
        assert (status, "File exists" in str(said)) == (500, True)
        assert guest.ask("PUT", f"{CH}/vm.snapshot", {"destination_url": "file:///nowhere"})[0] == 500
    for old, expected in ((False, 404), (True, 500)):
        async with running_guest(CLOUD_HYPERVISOR, tmp_path, empty=True, old=old, wait=False) as guest:
            status, said = guest.ask("PUT", f"{CH}/vm.pause")
            assert status == expected
            assert isinstance(said, str) is old


async def test_firecracker_says_yes_to_the_state_it_has_and_400_to_the_rest(tmp_path: Path) -> None:
    async with running_guest(FIRECRACKER, tmp_path) as guest:
        for state in ("Paused", "Paused", "Resumed", "Resumed"):
            assert guest.ask("PATCH", "/vm", {"state": state}) == (204, None)
        assert guest.ask("PATCH", "/vm", {"state": "Stopped"})[0] == 400
        assert "fault_message" in guest.ask("GET", "/nothing")[1]
        assert guest.ask("PUT", "/snapshot/load", {})[0] == 400
        guest.pause()
        assert guest.ask("PUT", "/snapshot/create", {"snapshot_type": "Diff"})[0] == 400
        assert save(guest, tmp_path / "to")[0] == save(guest, tmp_path / "to")[0] == 204
    async with running_guest(FIRECRACKER, tmp_path, empty=True, wait=False) as guest:
        assert guest.state() == "Not started"
        assert guest.ask("PATCH", "/vm", {"state": "Paused"})[0] == 400


@both
async def test_a_snapshot_brings_the_count_back(kind: str, tmp_path: Path) -> None:
    async with running_guest(kind, tmp_path) as guest:
        guest.pause()
        save(guest, tmp_path / "to")
        saved = guest.count()
    guest.disks[0].write_bytes(bytes(MIB))
    option = f"source_url=file://{tmp_path}/to" if kind == CLOUD_HYPERVISOR else None
    async with running_guest(kind, tmp_path, restore=option, empty=True, wait=False) as restored:
        if kind == FIRECRACKER:
            backend = {"backend_type": "File", "backend_path": f"{tmp_path}/to/memory"}
            body = {"snapshot_path": f"{tmp_path}/to/state", "mem_backend": backend}
            assert restored.ask("PUT", "/snapshot/load", body) == (204, None)
        assert restored.state() == "Paused"
        restored.resume()
        assert await restored.ticks() > saved


@both
async def test_faults_come_as_often_as_they_are_asked_for(kind: str, tmp_path: Path) -> None:
    path = f"{CH}/vmm.ping" if kind == CLOUD_HYPERVISOR else "/version"
    async with running_guest(kind, tmp_path) as guest:
        guest.fail({"request": f"GET {path}", "status": 418, "body": {"a": 1}, "times": 2})
        assert [ask(guest.socket, "GET", path)[0] for _ in range(3)] == [418, 418, 200]
        for cut in ("before", "after", "answer"):
            guest.fail({"request": f"GET {path}", "cut": cut, "huge": 1000})
            with pytest.raises((http.client.HTTPException, ConnectionError)):
                guest.ask("GET", path)
        guest.fail({"request": f"GET {path}", "huge": 1 << 20})
        assert len(guest.ask("GET", path)[1]) == 1 << 20
        assert guest.ask("GET", path)[0] == 200
