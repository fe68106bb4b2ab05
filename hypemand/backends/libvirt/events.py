"""libvirt's event loop, in a thread: without it nobody notices that a connection over the network is dead."""

import threading
import time

import libvirt
import structlog
from attrs import Factory, define

AGAIN_S = 1.0
"""After that, a loop that failed is run again."""
_log = structlog.get_logger()


@define(eq=False)
class EventLoop:
    """The loop, of which libvirt has one in a process."""

    _lock: threading.Lock = Factory(threading.Lock)
    _thread: threading.Thread | None = None

    def begin(self) -> None:
        """Have it served from now on, by one thread, whoever else asks for it at the same time."""
        with self._lock:
            if self._thread is None:
                libvirt.virEventRegisterDefaultImpl()
                self._thread = threading.Thread(target=serve_for_ever, name="libvirt events", daemon=True)
                self._thread.start()


SERVED = EventLoop()


def serve_for_ever() -> None:
    """Serve libvirt's events. A failure is told once, until it goes well again."""
    fails = False
    while True:
        try:
            libvirt.virEventRunDefaultImpl()
            fails = False
        except libvirt.libvirtError as error:
            if not fails:
                _log.error("libvirt's event loop fails; dead connections may not be noticed", error=str(error))
            fails = True
            time.sleep(AGAIN_S)
