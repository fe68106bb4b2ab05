"""What a Hypeman server tells of guests and snapshots. Keys that are not needed are not looked at."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any, TypeGuard

from attrs import frozen

from hypemand.backends.base import BackendUnavailable, Status
from hypemand.core.errors import RuleBroken
from hypemand.core.fields import check_instant
from hypemand.core.model import InstanceState, SnapshotKind
from hypemand.core.naming import check_instance_id

RUN_TAG = "hypemand.run_id"
"""The tag by which a run finds its snapshot again."""


class StrangeAnswerError(BackendUnavailable):
    """Not what a Hypeman server says."""


@frozen
class Guest:
    """An instance, as the server has it."""

    id: str
    name: str
    state: str
    detail: str = ""

    @property
    def stands_still(self) -> bool:
        """Whether it is in the midst of its life, and does not run."""
        return self.status.state in (InstanceState.STANDBY, InstanceState.PAUSED)

    @property
    def status(self) -> Status:
        """Its state in our words: they are the same."""
        try:
            state = InstanceState(self.state)
        except ValueError:
            return Status(InstanceState.UNKNOWN, self.state)
        return Status(state, self.detail if state is InstanceState.UNKNOWN else "")


@frozen
class Kept:
    """A snapshot, as the server has it. *kind* and *created_at* are None where this version does not know them."""

    id: str
    instance_id: str
    name: str
    kind: SnapshotKind | None
    created_at: datetime | None
    size_bytes: int
    tags: Mapping[str, str]
    hypervisor: str

    @property
    def run_id(self) -> str | None:
        """The run of hypemand that made it; anybody can set a tag, so what can't be a run's id is none."""
        told = self.tags.get(RUN_TAG)
        return told if is_id(told) else None


def is_id(value: object) -> TypeGuard[str]:
    """Whether *value* can stand in a path, there and here."""
    try:
        check_instance_id(value)
    except RuleBroken:
        return False
    return True


def guest_of(document: Any) -> Guest:
    """The instance in *document*.

    Raises:
        StrangeAnswerError: It is none.
    """
    told = _table(document)
    return Guest(
        _text(told, "id"), str(told.get("name") or ""), _text(told, "state"), str(told.get("state_error") or "")
    )


def guests_of(document: Any) -> list[Guest]:
    """Likewise, of a list."""
    return [guest_of(one) for one in _list(document)]


def kept_of(document: Any) -> Kept:
    """The snapshot in *document*.

    Raises:
        StrangeAnswerError: It is none.
    """
    told = _table(document)
    size, tags = told.get("size_bytes"), told.get("tags") or {}
    if not isinstance(tags, dict):
        raise StrangeAnswerError("the server's answer has tags that are none")
    return Kept(
        id=_text(told, "id"),
        instance_id=_text(told, "source_instance_id"),
        name=str(told.get("name") or ""),
        kind=next((kind for kind in SnapshotKind if kind.value == told.get("kind")), None),
        created_at=_instant(told.get("created_at")),
        size_bytes=size if isinstance(size, int) and size >= 0 else 0,
        tags={str(key): str(value) for key, value in tags.items()},
        hypervisor=str(told.get("source_hypervisor") or ""),
    )


def all_kept_of(document: Any) -> list[Kept]:
    """Likewise, of a list."""
    return [kept_of(one) for one in _list(document)]


def _instant(value: object) -> datetime | None:
    try:
        return check_instant(value)
    except RuleBroken:
        return None


def _list(document: Any) -> list[Any]:
    if not isinstance(document, list):
        raise StrangeAnswerError("the server's answer is not the list that a Hypeman server gives")
    return document


def _table(document: Any) -> Mapping[str, Any]:
    if not isinstance(document, dict):
        raise StrangeAnswerError("the server's answer is not what a Hypeman server gives")
    return document


def _text(told: Mapping[str, Any], key: str) -> str:
    value = told.get(key)
    if not isinstance(value, str) or not value:
        raise StrangeAnswerError(f"the server's answer has no {key!r}, as a Hypeman server's would")
    return value
