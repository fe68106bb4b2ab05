"""Asking the daemon over its socket: a small client that waits. It knows nothing of what the answers mean."""

import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from attrs import frozen

from hypemand.config import Config
from hypemand.config_files import SYSTEM_CONFIG, default_state_dir
from hypemand.core.errors import HypemandError
from hypemand.surface.http.sockets import SYSTEM_SOCKET, short_path, socket_path

FORMAT_HEADER = "hypemand-format"
FORMAT = "1"
"""Of the documents below /control/. Another one where a key that was there is gone, or means something else."""
ALIVE_S = 3.0
"""A daemon that is not hung answers much faster."""
ANSWER_S = 25.0
"""Longer than a daemon waits for the backends that it has to ask."""
SILENCE_S = 45.0
"""A run under way is told of more often than that."""


class Silence(Enum):
    """Why a daemon gave no answer."""

    ABSENT = "nobody listens there"
    FORBIDDEN = "permission denied: it is for its owner and group"
    HUNG = "no answer in time"
    STRANGE = "an answer that this version does not know"


class NoAnswerError(HypemandError):
    """The daemon could not be asked, or its answer is of no use."""

    def __init__(self, why: Silence, path: Path, detail: str = "") -> None:
        self.why = why
        super().__init__(f"{path}: {detail or why.value}")


class RefusedError(HypemandError):
    """The daemon understood, and refuses; the message is its own.

    Attributes:
        status: The HTTP status.
    """

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(message)


class _Connection(http.client.HTTPConnection):
    """A connection to a unix socket, whose path may be longer than the kernel takes."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=ALIVE_S)
        self._path = path

    def connect(self) -> None:
        """See `http.client.HTTPConnection.connect`."""
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            made.settimeout(self.timeout)
            with short_path(self._path) as name:
                made.connect(name)
        except BaseException:
            made.close()
            raise
        self.sock = made

    def wait_for(self, seconds: float) -> None:
        """Have each of the following reads wait so long."""
        assert self.sock is not None
        self.sock.settimeout(seconds)


def find_socket(config_path: Path, config: Config) -> Path:
    """Where the daemon of the config in *config_path* listens.

    The system's config may leave out where state lives. The daemon is told by
    its service manager then, and whoever asks is not.
    """
    own = socket_path(config)
    told = config.api.socket is not None or config.state_dir != default_state_dir()
    if told or config_path != SYSTEM_CONFIG or is_there(own):
        return own
    return SYSTEM_SOCKET


def is_there(path: Path) -> bool:
    """Whether there is a file, as far as we may see."""
    try:
        return path.exists()
    except OSError:
        return False


@frozen
class Client:
    """Asks the daemon that listens at *path*."""

    path: Path

    def get(self, target: str, **query: str | None) -> dict[str, Any]:
        """The document at *target*.

        Raises:
            NoAnswerError: There is none to be had.
        """
        return self._document("GET", target, {key: value for key, value in query.items() if value is not None})

    def post(self, target: str, body: bytes | None = None) -> dict[str, Any]:
        """Have *target* done, and return the document that tells what came of it.

        Raises:
            NoAnswerError: There is none to be had.
        """
        return self._document("POST", target, {}, body)

    def _document(self, method: str, target: str, query: dict[str, str], body: bytes | None = None) -> dict[str, Any]:
        with self._asked() as connection:
            headers = {} if body is None else {"content-type": "application/json"}
            connection.request(method, f"{target}?{urlencode(query)}" if query else target, body, headers)
            response = connection.getresponse()
            told = response.read()
            if response.status != 200 or response.getheader(FORMAT_HEADER) != FORMAT:
                raise NoAnswerError(Silence.STRANGE, self.path, _strange(response, told))
            document = json.loads(told)
        if not isinstance(document, dict):
            raise NoAnswerError(Silence.STRANGE, self.path)
        return document

    def run_now(self, instance: str) -> Iterator[dict[str, Any]]:
        """Have a run of *instance* begin; its steps, as they happen.

        Raises:
            NoAnswerError: Nobody is there, or whoever was is there no more; the run may go on.
            RefusedError: No run begins.
        """
        with self._asked() as connection:
            headers = {"accept": "application/x-ndjson"}
            connection.request("POST", f"/instances/{quote(instance, safe='')}/snapshot-schedule/run", headers=headers)
            response = connection.getresponse()
            if response.status != 200:
                raise RefusedError(response.status, _message(response.read()))
            connection.wait_for(SILENCE_S)
            while line := response.readline():
                if line.strip():
                    yield json.loads(line)

    @contextmanager
    def _asked(self) -> Iterator[_Connection]:
        """A connection to a daemon that has just shown that it does not hang."""
        connection = _Connection(self.path)
        try:
            connection.request("GET", "/health")
            connection.getresponse().read()
            if connection.sock is None:  # it closes after each answer
                connection.connect()
            connection.wait_for(ANSWER_S)
            yield connection
        except PermissionError:
            raise NoAnswerError(Silence.FORBIDDEN, self.path) from None
        except TimeoutError:
            raise NoAnswerError(Silence.HUNG, self.path) from None
        except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
            raise NoAnswerError(Silence.ABSENT, self.path) from None
        except BlockingIOError:  # too many wait to be taken already
            raise NoAnswerError(Silence.HUNG, self.path) from None
        except OSError as error:
            raise NoAnswerError(Silence.HUNG, self.path, error.strerror or str(error)) from None
        except (http.client.HTTPException, ValueError) as error:
            raise NoAnswerError(Silence.STRANGE, self.path, f"{Silence.STRANGE.value}: {error!r}") from None
        finally:
            connection.close()


def _strange(response: http.client.HTTPResponse, body: bytes) -> str:
    other = f"status {response.status}" if response.status != 200 else "documents of another version"
    return f"{Silence.STRANGE.value} ({other}{', ' + _message(body) if response.status != 200 else ''})"


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace").strip()[:200] or "no reason given"
