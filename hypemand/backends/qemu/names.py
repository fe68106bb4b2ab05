"""What QEMU's name of a disk's file says of it, and which file that is for another process. Blocking."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

_REMOTE = frozenset(
    {"nbd", "rbd", "iscsi", "ssh", "nfs", "gluster", "http", "https", "ftp", "ftps", "vxhs", "sheepdog", "rados"}
)
_BELOW = ("file", "image", "data-file")
"""Keys under which a driver has what it stands on; what lies below an overlay is none of it."""
_TEMPORARY = re.compile(r"/vl\.[A-Za-z0-9]{6}")


def is_remote(name: str) -> bool:
    """Whether QEMU's *name* is that of something on a network."""
    if name.startswith("json:"):
        return any(str(layer.get("driver")) in _REMOTE for layer in _layers(name))
    protocol = re.match(r"([a-z]+)(\+[a-z]+)?:", name)
    return protocol is not None and protocol[1] in _REMOTE


def is_temporary(name: str) -> bool:
    """Whether it is a file that QEMU has made and deleted for ``snapshot=on``."""
    return _TEMPORARY.search(name) is not None and not os.path.exists(name)  # noqa: PTH110 - it raises nothing


def _layers(name: str) -> Iterator[dict[str, Any]]:
    """The drivers of a ``json:`` name from top to bottom; none where QEMU has cut it short."""
    with suppress(orjson.JSONDecodeError):
        layer = orjson.loads(name.removeprefix("json:"))
        while isinstance(layer, dict):
            yield layer
            layer = next((layer[key] for key in _BELOW if key in layer), None)


def lasting_names(process: int | None, names: Sequence[str]) -> list[str]:
    """*names* of the QEMU *process* as they hold here too, and as long as the files do.

    Absolute and without links where there is such a file; the others as they are.
    """
    return [_lasting(process, name) for name in names]


def _lasting(process: int | None, name: str) -> str:
    plain = next((str(layer["filename"]) for layer in _layers(name) if "filename" in layer), name)
    if process is not None and not plain.startswith("/"):
        plain = _of_process(process, plain)
    # os.path.exists says False where it may not look.
    return os.path.realpath(plain) if plain.startswith("/") and os.path.exists(plain) else name  # noqa: PTH110


def _of_process(process: int, relative: str) -> str:
    """*relative* as seen from *process*, or as it has the file open: with ``-daemonize`` it has left its directory."""
    with suppress(OSError):
        path = Path(f"/proc/{process}/cwd").readlink() / relative
        if os.path.exists(path):  # noqa: PTH110
            return str(path)
        wanted = "/" + os.path.normpath(relative)
        opened = [str(link.readlink()) for link in Path(f"/proc/{process}/fd").iterdir()]
        fitting = {file for file in opened if file.endswith(wanted)}
        if len(fitting) == 1:
            return fitting.pop()
    return relative
