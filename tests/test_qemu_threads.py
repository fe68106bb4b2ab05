"""Blocking work of the backend `qemu`: a filesystem that hangs stops nobody who works on another one."""

import threading
from pathlib import Path

import trio

from hypemand.backends.catalog import Catalog, Manifest
from hypemand.backends.qemu.threads import in_thread
from hypemand.core.model import InstanceId


async def test_a_catalog_that_hangs_takes_no_threads_from_another_one_however_often_it_is_asked(tmp_path: Path) -> None:
    go_on = threading.Event()

    class Hung(Catalog):
        def manifests(self, instance: InstanceId) -> list[Manifest]:
            go_on.wait(30)
            return super().manifests(instance)

    good = Catalog(tmp_path / "good")
    try:
        with trio.fail_after(30):
            await in_thread(lambda: good.open(first_use=True))
            with trio.move_on_after(0.5):
                async with trio.open_nursery() as nursery:
                    for _ in range(50):
                        nursery.start_soon(in_thread, Hung(tmp_path / "hung").manifests, InstanceId("web-1"))
            assert list(await in_thread(good.manifests, InstanceId("web-1"))) == []
    finally:
        go_on.set()
