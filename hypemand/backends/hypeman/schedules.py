"""The schedules that a Hypeman server keeps itself: reading them, and deleting one that hypemand has taken over."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import trio
from attrs import frozen

from hypemand.backends.base import BackendError, BackendUnavailable
from hypemand.backends.hypeman.documents import Guest, guests_of
from hypemand.backends.hypeman.server import Server
from hypemand.backends.hypeman.settings import HypemanSettings
from hypemand.core.naming import TAGS_MAX

AT_ONCE = 8
_SET = ("interval", "name_prefix", "metadata", "retention")
PATIENCE_S = 60.0
"""A guest that is being captured just then keeps its schedule to itself for so long."""
MOST_METADATA = TAGS_MAX - 3
"""Of a schedule whose snapshots a server is to keep: the tags that hypemand adds want room, too."""


@frozen
class Found:
    """The schedule of one instance, as the server or its file has it.

    Attributes:
        document: JSON values; None where it can't be had.
        problem: Why not.
    """

    instance_id: str
    document: Any = None
    problem: str = ""


async def read_schedules(settings: HypemanSettings) -> list[Found]:
    """Every schedule of the server's instances, by instance.

    Those of instances that were deleted it does not tell.

    Raises:
        BackendUnavailable: It can't be asked for its instances.
    """
    server = Server(settings)
    found: list[Found] = []
    limiter = trio.CapacityLimiter(AT_ONCE)

    async def read(guest: Guest) -> None:
        async with limiter:
            with trio.move_on_after(PATIENCE_S) as waiting:
                found.extend(await _read(server, guest.id))
        if waiting.cancelled_caught:
            found.append(Found(guest.id, problem=f"no answer within {PATIENCE_S:g} s"))

    def pass_over(entry: str, why: str) -> None:
        found.append(Found(entry, problem=why))

    try:
        answer = await server.ask("GET", "/instances")
        if answer.status != 200:
            raise BackendUnavailable(f"{settings.url}: {answer}")
        async with trio.open_nursery() as nursery:
            for guest in guests_of(answer.document, pass_over):
                nursery.start_soon(read, guest)
    finally:
        await server.aclose()
    return sorted(found, key=lambda one: one.instance_id)


async def _read(server: Server, instance: str) -> list[Found]:
    try:
        answer = await server.ask("GET", _path(instance))
    except BackendError as error:
        return [Found(instance, problem=str(error))]
    if answer.not_found:
        return []
    if answer.status != 200:
        return [Found(instance, problem=str(answer))]
    return [Found(instance, answer.document)]


async def delete_schedules(settings: HypemanSettings, read: Mapping[str, Any]) -> dict[str, str]:
    """Delete the server's own schedules that are *read*, by instance; their snapshots stay. Already gone: no error.

    One that was changed on the server since it was read is not deleted: hypemand has not what it says now.

    Returns:
        Why one was not deleted, by instance.
    """
    server = Server(settings)
    problems: dict[str, str] = {}
    try:
        for instance, document in read.items():
            try:
                with trio.fail_after(PATIENCE_S):
                    problem = await _delete(server, instance, document)
            except BackendError as error:
                problem = str(error)
            except trio.TooSlowError:
                problem = f"no answer within {PATIENCE_S:g} s"
            if problem:
                problems[instance] = problem
    finally:
        await server.aclose()
    return problems


async def _delete(server: Server, instance: str, document: Any) -> str:
    """Why it was not deleted."""
    for found in await _read(server, instance):
        if found.problem:
            return found.problem
        if _wanted(found.document) != _wanted(document):
            return "it was changed there after it was read; do this again"
        answer = await server.ask("DELETE", _path(instance))
        if answer.status != 204 and not answer.not_found:
            return str(answer)
    return ""


def _wanted(document: Any) -> Any:
    """What a client has set in a schedule; what its runs have left there does not count."""
    return {key: document.get(key) for key in _SET} if isinstance(document, dict) else document


def _path(instance: str) -> str:
    return f"/instances/{quote(instance, safe='')}/snapshot-schedule"
