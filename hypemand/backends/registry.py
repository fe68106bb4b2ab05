"""Which backend types there are, and how a table of settings becomes a backend.

Built-ins come from a literal table, so that naming one imports only its own
module; others come from the entry-point group ``hypemand.backends``.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, cast

from hypemand.backends.base import Backend, BackendType, Surroundings
from hypemand.core.errors import InvalidInput, Problem
from hypemand.core.structure import new_converter, structure

BUILT_IN = {
    "cloud-hypervisor": "hypemand.backends.cloud_hypervisor",
    "embedded": "hypemand.backends.embedded",
    "firecracker": "hypemand.backends.firecracker",
    "hypeman": "hypemand.backends.hypeman",
    "libvirt": "hypemand.backends.libvirt",
    "qemu": "hypemand.backends.qemu",
}
ENTRY_POINT_GROUP = "hypemand.backends"
_CONVERTER = new_converter()


def backend_type(type_name: str) -> BackendType:
    """The backend type called *type_name*.

    Raises:
        InvalidInput: There is none; the text names those that there are.
    """
    if type_name in BUILT_IN:
        return cast("BackendType", import_module(BUILT_IN[type_name]).TYPE)
    # Looked for where it is needed alone: its own import takes as long as all of this package.
    others = import_module("importlib.metadata").entry_points(group=ENTRY_POINT_GROUP)
    if type_name in others.names:
        return cast("BackendType", others[type_name].load())
    known = ", ".join(sorted({*BUILT_IN, *others.names}))
    raise InvalidInput([Problem("type", f"{type_name!r} is not a backend type; known here: {known}")])


def parse_settings(type_name: str, table: Mapping[str, Any]) -> Any:
    """The settings of a backend of *type_name*, checked.

    Raises:
        InvalidInput: Every problem, with paths relative to the backend's table.
    """
    return structure(_CONVERTER, table, backend_type(type_name).settings)


def connect(name: str, connection: Mapping[str, Any], surroundings: Surroundings) -> Backend:
    """A backend from what `Backend.connection` told, or from its config table. Does no I/O.

    Raises:
        InvalidInput: The type or a setting is not known to this version.
    """
    settings = {key: value for key, value in connection.items() if key != "type"}
    type_name = str(connection.get("type", ""))
    return backend_type(type_name).build(name, parse_settings(type_name, settings), surroundings)


def connection_of(type_name: str, settings: Any) -> dict[str, Any]:
    """What a backend gives as its `Backend.connection`: its type and its settings as JSON values."""
    return {"type": type_name, **_CONVERTER.unstructure(settings)}
