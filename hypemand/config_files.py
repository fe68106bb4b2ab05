"""Where the config file and the state directory are found, and how the file is read."""

import contextlib
import os
import tomllib
from pathlib import Path

import platformdirs

from hypemand.config import Config, ParseSettings, parse_config
from hypemand.core.errors import RuleBroken
from hypemand.core.fields import check_path


def find_config(wanted: str | None) -> Path:
    """The config file: *wanted*, ``$HYPEMAND_CONFIG``, the system's, or the user's own.

    The last one where none of them exists.
    """
    named = wanted or os.environ.get("HYPEMAND_CONFIG")
    if named:
        return Path(named)
    system = Path("/etc/hypemand/config.toml")
    return system if system.exists() else platformdirs.user_config_path("hypemand") / "config.toml"


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


def guess_state_dir(data: bytes, base: Path) -> Path:
    """The state directory that a config with problems most likely means: for showing its state nevertheless."""
    lines = data.decode(errors="replace").splitlines()
    for length in range(len(lines), 0, -1):
        try:
            raw = tomllib.loads("\n".join(lines[:length]))
        except tomllib.TOMLDecodeError:
            continue
        with contextlib.suppress(RuleBroken):
            return base / check_path(raw.get("state_dir"))
        break
    return default_state_dir()
