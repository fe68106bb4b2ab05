"""The config of the embedded backend."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import Attribute, Factory, field, frozen

from hypemand.backends.embedded_guests import InstanceSpec
from hypemand.core.errors import RuleBroken
from hypemand.core.model import InstanceId, Size


def _check_rate(_: Any, attribute: "Attribute[int | None]", rate: int | None) -> None:
    if rate == 0:
        raise RuleBroken("must be more than zero; leave it out for no limit", subpath=attribute.name)


@frozen
class Settings:
    """Config keys of the type ``embedded``.

    Attributes:
        copy_rate: Bytes per second, so that captures take time; None for as fast as it goes.
    """

    root: Path
    instances: Mapping[InstanceId, InstanceSpec] = Factory(dict)
    copy_rate: Size | None = field(default=None, validator=_check_rate)
