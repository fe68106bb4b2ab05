"""Where the config file and the state directory are found, and how the file is read."""

import contextlib
import os
import tomllib
from pathlib import Path
from typing import Any

import platformdirs

from hypemand.config import ApiConfig, Config, ParseSettings, parse_config
from hypemand.core.errors import RuleBroken
from hypemand.core.fields import check_path

SYSTEM_CONFIG = Path("/etc/hypemand/config.toml")


def find_config(wanted: str | None) -> Path:
    """The config file: *wanted*, ``$HYPEMAND_CONFIG``, the system's, or the user's own.

    The last one where none of them exists.
    """
    named = wanted or os.environ.get("HYPEMAND_CONFIG")
    if named:
        return Path(named)
    return SYSTEM_CONFIG if SYSTEM_CONFIG.exists() else platformdirs.user_config_path("hypemand") / "config.toml"


def default_state_dir() -> Path:
    """Where state lives when the config does not say."""
    given = os.environ.get("STATE_DIRECTORY", "").partition(":")[0]
    if given:
        return Path(given)
    return Path("/var/lib/hypemand") if os.geteuid() == 0 else platformdirs.user_state_path("hypemand")


def load_config(path: Path, parse_settings: ParseSettings) -> Config:
    """The config in the file *path*.

    Raises:
        InvalidInput: With every problem found.
        OSError: The file can't be read.
    """
    return parse_config(path.read_bytes(), path.absolute().parent, default_state_dir(), parse_settings)


def guess_config(data: bytes, base: Path) -> Config:
    """What a config with problems most likely means: its state and its daemon's socket, to be shown and asked."""
    raw = _readable_part(data)
    api = raw.get("api")
    state_dir, socket = default_state_dir(), None
    with contextlib.suppress(RuleBroken):
        state_dir = base / check_path(raw.get("state_dir"))
    with contextlib.suppress(RuleBroken):
        socket = base / check_path(api.get("socket") if isinstance(api, dict) else None)
    return Config(state_dir, api=ApiConfig(socket=socket))


def _readable_part(data: bytes) -> dict[str, Any]:
    """What stands above the first line that is not TOML."""
    lines = data.decode(errors="replace").splitlines()
    for length in range(len(lines), 0, -1):
        try:
            return tomllib.loads("\n".join(lines[:length]))
        except tomllib.TOMLDecodeError:
            continue
    return {}
