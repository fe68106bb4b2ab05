"""What is asked of the server, and what it says."""

import re
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hypeman_server.files import CutError, Document, RefusedError, Store
from tests.hypeman_server.guests import Work

SLOW = "/slow"
"""Below this prefix a capture takes `SLOW_S`; else hardly any time."""
SLOW_S = 1.0
TOKEN = "My API Key"
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_TAG = re.compile(r"[A-Za-z0-9 _.:/=+@-]*")
_UNITS = {"h": 3600, "m": 60, "s": 1}
_UNFIT = "request body has an error: doesn't match schema"

Told = tuple[int, Any]
"""Status and document; text that is no JSON is told as it is."""
_NOWHERE: Told = (404, "404 page not found\n")


class Server:
    """Answers by the files in a `Store`.

    Keys of faults: ``delay_s``; ``status`` and ``body`` in place of an answer;
    ``cut``, the connection, ``before`` anything is done, ``after`` it, in the ``midst``
    of the answer, or ``then``; ``garbage`` for an answer that is none; ``location``. More in `Work`.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def answer(
        self, method: str, target: str, headers: Mapping[str, str], body: Any, gone: Callable[[], bool]
    ) -> tuple[int, Any, Document]:
        """Status, document, and what goes wrong on the way.

        Args:
            gone: Whether the client has closed its connection.
        """
        parts = urlsplit(target)
        slow = parts.path.startswith(f"{SLOW}/")
        words = [unquote(word) for word in parts.path.removeprefix(SLOW if slow else "").strip("/").split("/")]
        request = f"{method} /{'/'.join(words)}"
        self._store.note(request)
        fault = self._store.fault(request)
        time.sleep(fault.get("delay_s", 0))
        if fault.get("cut") == "before":
            raise CutError
        if "status" in fault:
            return fault["status"], fault.get("body", "<html>no JSON</html>"), fault
        if words == ["health"]:
            return 200, {"status": "ok"}, fault
        self._check_token(headers)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        work = Work(self._store, gone, SLOW_S if slow else 0, fault)
        status, document = self._route((method, *words), query, body, work)
        if fault.get("cut") == "after":
            raise CutError
        return status, "garbage" if fault.get("garbage") else document, fault

    def _check_token(self, headers: Mapping[str, str]) -> None:
        token = (self._store.read("token") or {"token": TOKEN})["token"]
        shown = headers.get("authorization")
        if shown is None:
            raise RefusedError(401, "Unauthorized", "authorization header required")
        if shown != f"Bearer {token}":
            raise RefusedError(401, "Unauthorized", "invalid token")

    def _route(self, words: tuple[str, ...], query: Mapping[str, str], body: Any, work: Work) -> Told:
        told: Told
        match words:
            case ("GET", "instances"):
                told = 200, self._store.all("guests")
            case ("GET", "snapshots"):
                wanted = query.get("source_instance_id")
                found = self._store.all("snapshots")
                told = 200, [one for one in found if wanted in (None, one["source_instance_id"])]
            case ("GET", "snapshots", snapshot):
                told = 200, self._snapshot(snapshot)
            case ("DELETE", "snapshots", snapshot):
                self._snapshot(snapshot)
                self._store.remove(f"snapshots/{snapshot}")
                told = 204, None
            case (method, "instances", given, *rest):
                told = self._of_instance((method, *rest), self._resolve(given), body, work)
            case _:
                told = _NOWHERE
        return told

    def _of_instance(self, words: tuple[str, ...], instance: str, body: Any, work: Work) -> Told:
        if words == ("POST", "snapshots"):
            _check_snapshot(body)
        if words == ("GET",) and self._store.read("hasty") is not None:  # as no version does that is known
            return 200, self._store.guest(instance)
        with self._store.lock(instance):
            return self._done(words, instance, body, work)

    def _done(self, words: tuple[str, ...], instance: str, body: Any, work: Work) -> Told:
        told = _NOWHERE
        match words:
            case ("GET",):
                told = 200, self._store.guest(instance)
            case ("POST", "snapshots"):
                told = 201, work.snapshot(instance, body)
            case ("POST", "restore"):
                told = 200, work.restore(instance)
            case ("POST", "standby"):
                told = 200, work.standby(instance)
            case ("POST", "snapshots", snapshot, "restore"):
                told = 200, work.go_back(instance, self._snapshot(snapshot), body)
            case (method, "snapshot-schedule"):
                told = self._schedule(method, instance, body)
        return told

    def _resolve(self, given: str) -> str:
        """By exact id, then by name, then by the beginning of an id, as Hypeman does it."""
        guests = self._store.all("guests")
        for found in (
            [one["id"] for one in guests if one["id"] == given],
            [one["id"] for one in guests if one["name"] == given],
            [one["id"] for one in guests if one["id"].startswith(given)],
        ):
            if len(found) == 1:
                return str(found[0])
            if found:
                raise RefusedError(409, "ambiguous", "multiple resources match, use full ID")
        raise RefusedError(404, "not_found", "resource not found")

    def _snapshot(self, snapshot: str) -> Document:
        found: Document | None = self._store.read(f"snapshots/{snapshot}")
        if found is None:
            raise RefusedError(404, "not_found", "snapshot not found")
        return found

    def _schedule(self, method: str, instance: str, body: Any) -> Told:
        name = f"snapshot-schedules/{instance}"
        present = self._store.read(name)
        if method == "PUT":
            made = _new_schedule(instance, body, present)
            self._store.write(made, name)
            return 200, _as_told(made)
        if present is None:
            raise RefusedError(404, "not_found", "snapshot schedule not found")
        if method == "DELETE":
            self._store.remove(name)
            return 204, None
        return 200, _as_told(present)


def _check_snapshot(body: Document) -> None:
    """What is checked by the API's own description, before the server itself sees it."""
    tags = body.get("tags", {})
    if body.get("kind") not in ("Standby", "Stopped") or not body.keys() <= {"kind", "name", "tags", "compression"}:
        raise RefusedError(400, "Bad Request", _UNFIT)
    if len(tags) > 50:
        raise RefusedError(400, "Bad Request", "request body has an error: there must be at most 50 properties")
    for key, value in tags.items():
        if not (0 < len(key) <= 128 and len(value) <= 256 and _TAG.fullmatch(key) and _TAG.fullmatch(value)):
            raise RefusedError(400, "Bad Request", _UNFIT)
    if body.get("name") and not _NAME.fullmatch(body["name"]):
        raise RefusedError(400, "invalid_request", f"invalid request: name {body['name']!r}")


def _new_schedule(instance: str, body: Document, present: Document | None) -> Document:
    """A file as Hypeman writes it."""
    if not body["retention"]:
        raise RefusedError(400, "invalid_request", "retention must include max_count or max_age")
    at = time.time()
    kept = {"max_count": body["retention"].get("max_count", 0)}
    if "max_age" in body["retention"]:
        kept["max_age"] = body["retention"]["max_age"]
    return {
        "instance_id": instance,
        "interval": body["interval"],
        **{key: body[key] for key in ("name_prefix", "metadata") if key in body},
        "retention": kept,
        "next_run_at": _stamp(at + _seconds(body["interval"])),
        "created_at": present["created_at"] if present else _stamp(at),
        "updated_at": _stamp(at),
    }


def _as_told(schedule: Document) -> Document:
    """As the API has it: a limit that is none is left out."""
    kept = {key: value for key, value in schedule["retention"].items() if value}
    return {**schedule, "retention": kept}


def _stamp(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))


def _seconds(duration: str) -> float:
    return sum(float(number) * _UNITS[unit] for number, unit in re.findall(r"([0-9.]+)([hms])", duration))
