"""What the server does with its guests."""

import random
import time
from collections.abc import Callable

from tests.hypeman_server.files import Document, RefusedError, Store

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_TRANSITION = "invalid state transition: "


def _now() -> str:
    """As Go tells ``time.Now()``: local time, with nanoseconds and an offset."""
    at = time.time()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at + 3600)) + f".{int(at % 1 * 1e9):09d}+01:00"


def _new_id() -> str:
    return random.choice(_LETTERS) + "".join(random.choices(_LETTERS + "0123456789", k=23))


class Work:
    """What takes time, done for one request, whose context ends with its connection.

    The fault's keys: ``takes_s`` for a copy or a restore, ``paused_s`` before
    the copy; ``copy_fails``; ``restore_fails``, and the guest stays in standby.
    """

    def __init__(self, store: Store, gone: Callable[[], bool], takes_s: float, fault: Document) -> None:
        self._store = store
        self._gone = gone
        self._fault = fault
        self._takes_s = float(fault.get("takes_s", takes_s))

    def snapshot(self, instance: str, body: Document) -> Document:
        guest, kind = self._store.guest(instance), body["kind"]
        self._check(guest, body)
        runs = guest["state"] == "Running"
        if runs:
            self._go_to_standby(instance)
        self._wait(self._takes_s)
        if runs:
            self._come_back(instance)
        if self._fault.get("copy_fails"):
            raise RefusedError(500, "internal_error", "failed to create snapshot")
        made = {
            "id": _new_id(),
            "name": body.get("name", ""),
            "kind": kind,
            "source_instance_id": instance,
            "source_instance_name": guest["name"],
            "source_hypervisor": guest["hypervisor"],
            "created_at": _now(),
            "size_bytes": 4096,
            "compression_state": "none",
            **({"tags": body["tags"]} if "tags" in body else {}),
        }
        self._store.write(made, f"snapshots/{made['id']}")
        return made

    def _check(self, guest: Document, body: Document) -> None:
        state, kind, name = guest["state"], body["kind"], body.get("name")
        others = [one["name"] for one in self._store.all("snapshots") if one["source_instance_id"] == guest["id"]]
        if guest.get("volumes"):
            raise RefusedError(501, "not_supported", "not supported: snapshot requires readonly volume attachments")
        if name and name in others:
            raise RefusedError(409, "conflict", f"already exists: snapshot name {name!r} already exists")
        allowed = ("Running", "Standby") if kind == "Standby" else ("Stopped",)
        if state not in allowed:
            what = f"{kind.lower()} snapshot requires source in {' or '.join(allowed)}, got {state}"
            raise RefusedError(409, "conflict", _TRANSITION + what)

    def _go_to_standby(self, instance: str) -> None:
        self._store.change_guest(instance, state="Paused")
        self._wait(self._fault.get("paused_s", 0))
        if self._gone():  # its context is over, and that of the resume is the same
            raise RefusedError(500, "internal_error", "failed to create snapshot")
        self._store.change_guest(instance, state="Standby")

    def _come_back(self, instance: str) -> None:
        if self._gone() or self._fault.get("restore_fails"):
            raise RefusedError(500, "internal_error", "failed to create snapshot")
        self._store.change_guest(instance, state="Running")

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._gone():
            time.sleep(0.01)

    def standby(self, instance: str) -> Document:
        state = self._store.guest(instance)["state"]
        if state != "Running":
            raise RefusedError(409, "invalid_state", f"{_TRANSITION}cannot standby from state {state}")
        return self._store.change_guest(instance, state="Standby")

    def restore(self, instance: str) -> Document:
        state = self._store.guest(instance)["state"]
        if state != "Standby":
            raise RefusedError(409, "invalid_state", f"{_TRANSITION}cannot restore from state {state}")
        self._wait(self._takes_s)
        if self._gone() or self._fault.get("restore_fails"):
            raise RefusedError(500, "internal_error", "failed to restore instance")
        return self._store.change_guest(instance, state="Running")

    def go_back(self, instance: str, snapshot: Document, body: Document) -> Document:
        state = self._store.guest(instance)["state"]
        if snapshot["source_instance_id"] != instance:
            raise RefusedError(400, "invalid_request", "invalid request: snapshot belongs to another instance")
        if state == "Running":
            why = f"{_TRANSITION}cannot restore snapshot while source is Running"
            raise RefusedError(409, "invalid_state", why)
        by_default = "Running" if snapshot["kind"] == "Standby" else "Stopped"
        wanted = body.get("target_state") or by_default
        return self._store.change_guest(instance, state=wanted, went_back_to=snapshot["id"])
