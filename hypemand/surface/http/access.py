"""What TCP takes besides an address: clients' tokens, and TLS. Read at start, and again at each reload."""

import ssl
from pathlib import Path

import structlog
import trio
from attrs import define, evolve, frozen

from hypemand.config import ApiConfig
from hypemand.core.errors import InvalidInput, Problem
from hypemand.surface.http.tokens import Tokens, credential, read_tokens

NO_TOKENS = (
    'is missing; api.listen needs a file of tokens, or the systemd credential "tokens", which is not there'
    " ($CREDENTIALS_DIRECTORY/tokens)"
)

_log = structlog.get_logger()


@frozen
class Access:
    """Who may come in over TCP, and how what is said there is encrypted."""

    tokens: Tokens
    tls: ssl.SSLContext | None


def read_access(api: ApiConfig) -> Access:
    """The access that *api* asks for. Blocking.

    Raises:
        InvalidInput: With every problem, by the key of the config that it belongs to.
    """
    problems: list[Problem] = []
    tokens, tls = Tokens({}), None
    try:
        tokens = _tokens(api.tokens_file or credential())
    except InvalidInput as error:
        problems += [problem.under("api.tokens_file") for problem in error.problems]
    except OSError as error:
        problems.append(Problem("api.tokens_file", f"can't be read: {error.strerror}"))
    try:
        tls = _tls(api.tls_cert, api.tls_key)
    except InvalidInput as error:
        problems += [problem.under("api") for problem in error.problems]
    if problems:
        raise InvalidInput(problems)
    return Access(tokens, tls)


@define
class CurrentAccess:
    """The access in force; None where hypemand does not serve TCP.

    Attributes:
        problems: Why that which was asked for last is not in force.
    """

    access: Access | None
    problems: tuple[str, ...] = ()

    def client_of(self, authorization: str | None) -> str | None:
        """The client that a request's header ``Authorization`` shows; None if it is nobody."""
        return None if self.access is None else self.access.tokens.client_of(authorization)

    def tls(self) -> ssl.SSLContext | None:
        """What new connections are encrypted with; None if they are not."""
        return None if self.access is None else self.access.tls

    async def reread(self, api: ApiConfig) -> None:
        """Put the access that *api* asks for in force. If it can't be had, the one before stays, and that is logged."""
        if api.listen is None:
            self.problems = ()
            return  # taken out: that takes a restart, and until then nothing changes
        try:
            access = await trio.to_thread.run_sync(read_access, api, abandon_on_cancel=True)
        except InvalidInput as error:
            before = "the ones before stay in force" if self.access else "hypemand would not start with it"
            for problem in error.problems:
                _log.error(f"invalid tokens or TLS; {before}", error=str(problem))
            self.problems = tuple(f"{problem} ({before})" for problem in error.problems)
            return
        self.problems = ()
        if self.access is not None:
            if access.tls is None and self.access.tls is not None:
                # What listens may be reached from anywhere: tokens that come there are not to be sent in the clear.
                _log.warning("TCP without TLS takes a restart; until then it is encrypted as before")
                access = evolve(access, tls=self.access.tls)
            self.access = access
            _log.info("tokens in force", clients=list(access.tokens.clients), tls=access.tls is not None)


def _tokens(path: Path | None) -> Tokens:
    if path is None:
        raise InvalidInput([Problem("", NO_TOKENS)])
    return read_tokens(path)


def _tls(cert: Path | None, key: Path | None) -> ssl.SSLContext | None:
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        missing, present = ("tls_key", "tls_cert") if key is None else ("tls_cert", "tls_key")
        raise InvalidInput([Problem(missing, f"is missing; it goes with api.{present}")])
    unreadable = [*_unreadable("tls_cert", cert), *_unreadable("tls_key", key)]
    if unreadable:
        raise InvalidInput(unreadable)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(cert, key, password=_no_password)
    except _EncryptedKeyError:
        raise InvalidInput([Problem("tls_key", f"{key} is encrypted: write it without a passphrase")]) from None
    except ssl.SSLError as error:
        raise InvalidInput([_blamed(cert, key, error)]) from None
    except OSError as error:  # taken away a moment ago, as it is being renewed
        raise InvalidInput([Problem("tls_cert", f"{cert} or its key can't be read: {error.strerror}")]) from None
    return context


class _EncryptedKeyError(Exception):
    """OpenSSL asks for a passphrase."""


def _no_password() -> str:
    raise _EncryptedKeyError


def _unreadable(name: str, path: Path) -> list[Problem]:
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        return [Problem(name, f"{path} can't be read: {error.strerror}")]
    return []


def _blamed(cert: Path, key: Path, error: ssl.SSLError) -> Problem:
    """Which of both files is at fault: OpenSSL does not say."""
    if error.reason == "KEY_VALUES_MISMATCH":
        return Problem("tls_key", f"{key} does not belong to the certificate in {cert}")
    try:
        ssl.create_default_context(cafile=str(cert))
    except ssl.SSLError:
        return Problem("tls_cert", f"{cert} holds no certificate in PEM form that can be used")
    reason = f" ({error.reason})" if error.reason else ""
    return Problem("tls_key", f"{key} holds no private key in PEM form that can be used{reason}")
