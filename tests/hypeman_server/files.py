"""What the server knows, in files."""

import json
import os
import re
import threading
from typing import Any

Document = dict[str, Any]
KINDS = ("guests", "snapshots", "snapshot-schedules")


class RefusedError(Exception):
    """An answer that is an error, in Hypeman's shape."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.document = {"code": code, "message": message}


class CutError(Exception):
    """The connection ends without an answer."""


class Store:
    """Files of JSON below a directory, each replaced whole."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self._locks: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()
        for name in KINDS:
            os.makedirs(f"{directory}/{name}", exist_ok=True)

    def lock(self, instance: str) -> threading.Lock:
        """What is held by whoever does something with the instance, or reads it by its id."""
        with self._guard:
            return self._locks.setdefault(instance, threading.Lock())

    def read(self, name: str) -> Any:
        try:
            with open(f"{self.directory}/{name}.json") as file:
                return json.load(file)
        except FileNotFoundError:
            return None

    def write(self, document: Any, name: str) -> None:
        new = f"{self.directory}/{name}.{threading.get_ident()}"
        with open(new, "w") as file:
            json.dump(document, file)
        os.replace(new, f"{self.directory}/{name}.json")

    def remove(self, name: str) -> bool:
        try:
            os.unlink(f"{self.directory}/{name}.json")
        except FileNotFoundError:
            return False
        return True

    def all(self, kind: str) -> list[Document]:
        names = [name for name in sorted(os.listdir(f"{self.directory}/{kind}")) if name.endswith(".json")]
        found = [self.read(f"{kind}/{name.removesuffix('.json')}") for name in names]
        return [document for document in found if document is not None]

    def guest(self, instance: str) -> Document:
        found: Document = self.read(f"guests/{instance}")
        return found

    def change_guest(self, instance: str, **keys: str) -> Document:
        changed = {**self.guest(instance), **keys}
        self.write(changed, f"guests/{instance}")
        return changed

    def fault(self, request: str) -> Document:
        """What goes wrong with *request*, and is used up by that."""
        with self._guard:
            faults: list[Document] = self.read("faults") or []
            for fault in faults:
                if re.fullmatch(fault["at"], request):
                    fault["times"] = fault.get("times", 1) - 1
                    self.write([one for one in faults if one.get("times", 1) != 0], "faults")
                    return fault
        return {}

    def note(self, line: str) -> None:
        with self._guard, open(f"{self.directory}/requests.log", "a") as file:
            file.write(f"{line}\n")
