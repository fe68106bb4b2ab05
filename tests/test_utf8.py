"""Text on its way into JSON: whatever a hypervisor or a file's name has in it, it can be written down."""

from typing import Any

import orjson
import pytest

from hypemand.core.utf8 import as_utf8

BROKEN = b"disk-\xff.raw".decode(errors="surrogateescape")
TOLD = "disk-\\udcff.raw"


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (BROKEN, TOLD),
        ({BROKEN: {"deep": BROKEN}}, {TOLD: {"deep": TOLD}}),
        ([BROKEN, 1], [TOLD, 1]),
        ((BROKEN,), [TOLD]),
    ],
)
def test_what_is_no_text_becomes_escapes_wherever_it_stands(value: Any, told: Any) -> None:
    with pytest.raises(TypeError):
        orjson.dumps(value)
    assert as_utf8(value) == told
    assert orjson.loads(orjson.dumps(as_utf8(value))) == told


@pytest.mark.parametrize("value", ["grün ☃", 3.5, True, None, {"a": ["b", {"c": 1}]}, []])
def test_what_can_be_written_stays_as_it_is(value: Any) -> None:
    assert as_utf8(value) == value
