"""Bodies of requests: read up to a limit, JSON taken strictly. Nothing of a client's text makes the answer long."""

import json
from collections import Counter
from collections.abc import Iterable
from decimal import Decimal
from typing import Any, TypeVar

from cattrs import Converter
from starlette.requests import ClientDisconnect, Request

from hypemand.core.errors import HypemandError, InvalidInput, Problem, join_path
from hypemand.core.structure import structure

BODY_LIMIT = 64 * 1024
_SWALLOWED = 1024 * 1024
"""Of a body that is too long so much is read and thrown away: a client that still sends would miss the answer."""
_KEYS_MOST = 100
_PROBLEMS_MOST = 20
_PROBLEM_LENGTH = 300

T = TypeVar("T")


class BodyTooLargeError(HypemandError):
    """The body is longer than `BODY_LIMIT`."""

    def __init__(self) -> None:
        super().__init__(f"the body is longer than {BODY_LIMIT} bytes")


class NotJsonError(HypemandError):
    """The request says that its body is something else than JSON."""

    def __init__(self) -> None:
        super().__init__("the body must be JSON, with Content-Type: application/json")


async def read_body(request: Request) -> bytes:
    """The body of *request*, which may come in chunks.

    Raises:
        BodyTooLargeError: At most `BODY_LIMIT` of it were held.
        ClientDisconnect: The client went away before the end.
    """
    parts, length, more = [], 0, True
    while more and length <= BODY_LIMIT + _SWALLOWED:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        part, more = message.get("body", b""), message.get("more_body", False)
        length += len(part)
        if length <= BODY_LIMIT:
            parts.append(part)
        else:
            parts.clear()
    if length > BODY_LIMIT:
        raise BodyTooLargeError
    return b"".join(parts)


async def read_document(request: Request, converter: Converter, cls: type[T], *, nullable: Iterable[str] = ()) -> T:
    """The body of *request* as a *cls*.

    Args:
        nullable: Keys of the document whose null is the same as leaving them out.

    Raises:
        NotJsonError, BodyTooLargeError, ClientDisconnect: It can't be read.
        InvalidInput: It breaks rules; each problem has its path.
    """
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise NotJsonError
    document = _parse(await read_body(request))
    try:
        problems = [Problem(path, "is null; leave it out instead") for path in _nulls(document, "")]
        problems = [problem for problem in problems if problem.path not in nullable]
        if problems:
            raise InvalidInput(problems)
        return structure(converter, {key: value for key, value in document.items() if value is not None}, cls)
    except RecursionError:
        raise _too_deep() from None


async def read_nothing(request: Request) -> None:
    """Take a *request* that has nothing to say: no body, or an empty object.

    Raises:
        BodyTooLargeError, ClientDisconnect: It can't be read.
        InvalidInput: It says something, which would go unheard.
    """
    data = await read_body(request)
    unheard = _parse(data) if data else {}
    if unheard:
        raise InvalidInput([Problem(key, "unknown key; this request takes none") for key in unheard])


def problems_text(error: InvalidInput) -> str:
    """Each problem of *error* with its path, in UTF-8, and no longer than an answer should be."""
    shown = [_shortened(str(problem)) for problem in error.problems[:_PROBLEMS_MOST]]
    left = len(error.problems) - len(shown)
    return "; ".join([*shown, f"and {left} more problems"] if left else shown)


def _shortened(text: str) -> str:
    text = text.encode(errors="backslashreplace").decode()
    return (
        text if len(text) <= _PROBLEM_LENGTH else f"{text[: _PROBLEM_LENGTH // 2]} ... {text[-_PROBLEM_LENGTH // 2 :]}"
    )


def _parse(data: bytes) -> dict[str, Any]:
    try:
        document = json.loads(
            data.decode(), object_pairs_hook=_object, parse_float=_number, parse_constant=_no_constant
        )
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:  # UnicodeDecodeError and numbers of thousands of digits are among them
        what = "is empty" if not data.strip() else f"is not JSON: {error}"
        raise InvalidInput([Problem("", f"the body {what}")]) from None
    if not isinstance(document, dict):
        raise InvalidInput([Problem("", "the body must be a JSON object")])
    return document


def _too_deep() -> InvalidInput:
    return InvalidInput([Problem("", "the body is nested too deeply")])


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):  # which of both is meant, nobody can tell
        times = Counter(key for key, _ in pairs)
        raise InvalidInput([Problem(key, "is there twice") for key in made if times[key] > 1][:_PROBLEMS_MOST])
    if len(made) > _KEYS_MOST:
        raise InvalidInput([Problem("", f"an object in the body has {len(made)} keys; no such is ever right")])
    return made


def _number(text: str) -> int | float:
    """JSON has one kind of number: 7.0 is a whole one, and so is 7e0."""
    try:
        exact = Decimal(text)
    except ArithmeticError:
        raise ValueError(f"{text[:_KEYS_MOST]} is no number that can be held") from None
    return int(exact) if exact.adjusted() < 20 and exact == exact.to_integral_value() else float(text)


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is no number")


def _nulls(value: Any, path: str) -> Iterable[str]:
    if value is None:
        yield path
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _nulls(inner, join_path(path, key))
