"""Clients that come over TCP and the tokens that they show. A token is never shown, logged or compared in the clear."""

import hmac
import re
import secrets
from collections.abc import Mapping
from pathlib import Path

from attrs import field, frozen

from hypemand.backends import private_files
from hypemand.backends.private_files import NotPrivateError, read_private
from hypemand.core.errors import InvalidInput, Problem
from hypemand.surface.api.app import LOCAL_CLIENT

SHORTEST = 8
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TOKEN = re.compile(r"[!-~][ -~]*")  # spaces, too: "My API Key" is what Hypeman's documents show


@frozen
class _Known:
    name: str
    digest: bytes = field(repr=False)


class Tokens:
    """Who has which token. Keeps digests alone, made with a key of its own."""

    def __init__(self, by_client: Mapping[str, str]) -> None:
        self._key = secrets.token_bytes(32)
        self._known = tuple(_Known(name, self._digest(token)) for name, token in by_client.items())

    @property
    def clients(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(known.name for known in self._known)

    def client_of(self, authorization: str | None) -> str | None:
        """The client whose token the header ``Authorization`` shows, ``Bearer TOKEN``; None if it is nobody's.

        Takes as long for a wrong token as for a right one, whoever's it is.
        """
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        shown = self._digest(token.strip(" "))
        found = None
        for known in self._known:  # all of them, also once it is found
            if hmac.compare_digest(known.digest, shown):
                found = known.name
        return found

    def _digest(self, token: str) -> bytes:
        return hmac.digest(self._key, token.encode(errors="backslashreplace"), "sha256")


def parse_tokens(text: str) -> dict[str, str]:
    """The tokens by client in *text*: ``name:token`` a line, with ``#`` comments and empty lines between.

    Raises:
        InvalidInput: With the number of each wrong line; what is in it is not told, it may be a token.
    """
    clients: dict[str, int] = {}
    lines: dict[str, int] = {}
    tokens: dict[str, str] = {}
    problems = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, colon, token = (part.strip() for part in line.partition(":"))
        try:
            _check_line(name, colon, token)
            _check_new(clients.setdefault(name, number), number, "this client")
            _check_new(lines.setdefault(token, number), number, "this token")
        except ValueError as error:
            problems.append(Problem(f"line {number}", str(error)))
        else:
            tokens[name] = token
    if not tokens and not problems:
        problems.append(Problem("", 'has no token; write a line "name:token" for each client'))
    if problems:
        raise InvalidInput(problems)
    return tokens


def _check_line(name: str, colon: str, token: str) -> None:
    if not colon:
        raise ValueError('must be "name:token"')
    if not _NAME.fullmatch(name):
        raise ValueError('the client\'s name, before ":", must be 1 to 64 of A-Z a-z 0-9 . _ -')
    if name == LOCAL_CLIENT:
        raise ValueError(f'"{LOCAL_CLIENT}" is what clients on the control socket are called: take another name')
    if len(token) < SHORTEST:
        raise ValueError(f'the token, after ":", must have {SHORTEST} characters or more; try: openssl rand -hex 32')
    if not _TOKEN.fullmatch(token):
        raise ValueError("the token must be of visible ASCII characters and spaces")


def _check_new(first: int, number: int, what: str) -> None:
    if first != number:
        raise ValueError(f"{what} is in line {first} already")


def read_tokens(path: Path) -> Tokens:
    """The tokens in the file *path*. Blocking.

    Raises:
        InvalidInput: With every problem, which never show a token.
    """
    try:
        return Tokens(parse_tokens(read_private(path).decode("utf-8-sig")))
    except NotPrivateError as error:
        problems = [f"{path} {error}"]
    except OSError as error:
        problems = [f"{path} can't be read: {error.strerror}"]
    except UnicodeDecodeError:
        problems = [f"{path} is no text"]
    except InvalidInput as error:
        problems = [f"{path}, {problem}" if problem.path else f"{path} {problem}" for problem in error.problems]
    raise InvalidInput(Problem("", problem) for problem in problems)


def credential() -> Path | None:
    """The file of the systemd credential ``tokens``; None where hypemand was given none."""
    return private_files.credential("tokens")
