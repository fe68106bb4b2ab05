"""Asking a Hypeman server over HTTP: requests, answers, and how little is known when one does not come."""

import socket
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import httpx2
import orjson
import trio
from attrs import Factory, define, field, frozen

from hypemand.backends.base import BackendUnavailable
from hypemand.backends.hypeman.holding import LONGEST_S, Held
from hypemand.backends.hypeman.settings import HypemanSettings, is_plain
from hypemand.backends.hypeman.tokens import Token

CONNECT_S = 10.0
_LASTS = (
    # A network that is away for some minutes cuts no capture short, and a host that is gone is noticed.
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 10),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 300_000),
)
MOST_BYTES = 64 * 1024**2
_NOT_SENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout, httpx2.LocalProtocolError)
_CAN_BE_ASKED_AGAIN = frozenset({"GET", "DELETE"})


class NotSentError(BackendUnavailable):
    """The request never left, or was turned away at the door: nothing came of it."""


class NoAnswerError(BackendUnavailable):
    """The request was sent; what became of it is not known."""


@frozen
class Answer:
    """What the server, or whoever stands before it, has said."""

    status: int
    document: Any
    text: str = field(repr=False)

    @property
    def code(self) -> str | None:
        """Hypeman's own word for what is wrong; None where it is not Hypeman who says so, or nothing is wrong."""
        told = self.document
        own = self.status >= 400 and isinstance(told, dict) and isinstance(told.get("message"), str)
        return str(told["code"]) if own and isinstance(told.get("code"), str) else None

    @property
    def not_found(self) -> bool:
        """Whether Hypeman itself says that there is no such thing. A proxy's 404 says nothing of the kind."""
        return self.status == 404 and self.code == "not_found"

    def __str__(self) -> str:
        if self.code is not None:
            return f"{self.document['message']} ({self.status} {self.code})"
        shown = " ".join(self.text.split())[:120]
        return f"status {self.status}, which is not a Hypeman's own answer" + (f": {shown}" if shown else "")


@frozen
class _Call:
    method: str
    target: str
    body: Mapping[str, Any] | None = None
    extensions: Mapping[str, Any] = Factory(dict)


@define(eq=False)
class Server:
    """One server. Its connections are kept and used again; no redirect is followed with the token."""

    settings: HypemanSettings
    _token: Token = field(init=False)
    _client: httpx2.AsyncClient | None = field(init=False, default=None)
    _trust: ssl.SSLContext | bool | None = field(init=False, default=None)

    @_token.default
    def _own_token(self) -> Token:
        return Token(self.settings)

    async def ask(self, method: str, path: str, **query: str) -> Answer:
        """Ask what may be asked twice, or have deleted what may be gone.

        Raises:
            BackendUnavailable: No answer, or none of a server that knows us.
        """
        if self._client is None:
            self._client = await self._new_client()
        target = path + (f"?{httpx2.QueryParams(query)}" if query else "")
        return await self._said(self._client, _Call(method, target))

    async def have_done(self, path: str, body: Mapping[str, Any]) -> Answer:
        """Have something done that takes long, over a connection of its own, which outlives this process if need be.

        Sent once, and never again. Not to be cancelled: with the connection,
        Hypeman gives up in the midst of it, and leaves a guest in standby.

        Raises:
            NotSentError: Nothing was done.
            NoAnswerError: It is not known what was.
        """
        async with Held() as held, await self._new_client() as client:
            return await self._said(client, _Call("POST", path, body, {"trace": held.trace}))

    async def _new_client(self) -> httpx2.AsyncClient:
        if self._trust is None:
            self._trust = await trio.to_thread.run_sync(self._whom_to_trust)
        # How long to wait for an answer is for whoever asks to say; and no proxy is to see the token.
        transport = httpx2.AsyncHTTPTransport(
            verify=self._trust,
            trust_env=False,
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=16),
            socket_options=_LASTS,
        )
        return httpx2.AsyncClient(
            transport=transport, trust_env=False, timeout=httpx2.Timeout(None, connect=CONNECT_S, read=LONGEST_S)
        )

    def _whom_to_trust(self) -> ssl.SSLContext | bool:
        if is_plain(self.settings.url):
            return False
        try:
            return ssl.create_default_context(cafile=self.settings.ca_file)
        except OSError as error:  # also what OpenSSL says of the content
            raise NotSentError(f"ca_file {self.settings.ca_file} can't be used: {error.strerror or error}") from error

    async def _said(self, client: httpx2.AsyncClient, call: _Call) -> Answer:
        """What is said to *call*; a token that is refused is read anew, once."""
        answer = None
        for anew in (False, True):
            headers = await trio.to_thread.run_sync(partial(self._token.headers, anew=anew))
            answer = await self._sent(client, call, headers)
            if answer.status != 401:
                break
        assert answer is not None
        if answer.status in (401, 403):
            raise NotSentError(f"{self.settings.url} refuses us: {answer}; see {self._token.place}")
        return answer

    async def _sent(self, client: httpx2.AsyncClient, call: _Call, headers: Mapping[str, str]) -> Answer:
        request = client.build_request(
            call.method,
            self.settings.url + call.target,
            headers={**headers, "accept": "application/json", "accept-encoding": "identity"},
            json=call.body,
            extensions=dict(call.extensions),
        )
        try:
            return await _received(client, request)
        except httpx2.TransportError as error:
            # A connection that was kept may have ended just when it was used again.
            if isinstance(error, _NOT_SENT) or call.method not in _CAN_BE_ASKED_AGAIN:
                raise self._why_silent(error) from error
        try:
            return await _received(client, request)
        except httpx2.TransportError as error:
            raise self._why_silent(error) from error

    def _why_silent(self, error: httpx2.TransportError) -> BackendUnavailable:
        url = self.settings.url
        distrust = _certificate_error(error)
        if distrust is not None:
            return NotSentError(f"{url} has no certificate that is trusted here: {distrust}; see ca_file")
        if isinstance(error, _NOT_SENT):
            return NotSentError(f"{url} can't be reached: {str(error) or type(error).__name__}")
        return NoAnswerError(f"{url} gave no answer: {str(error) or type(error).__name__}")

    async def aclose(self) -> None:
        """Let go of the connections that are kept."""
        if self._client is not None:
            await self._client.aclose()


async def _received(client: httpx2.AsyncClient, request: httpx2.Request) -> Answer:
    async with _opened(client, request) as response:
        data = bytearray()
        async for part in response.aiter_bytes():
            data += part
            if len(data) > MOST_BYTES:
                break
    try:
        document = orjson.loads(data)
    except orjson.JSONDecodeError:
        document = None
    if response.has_redirect_location:
        return Answer(response.status_code, None, f"it leads on to {response.headers['location']}: is url right?")
    return Answer(response.status_code, document, data[:1000].decode(errors="replace"))


@asynccontextmanager
async def _opened(client: httpx2.AsyncClient, request: httpx2.Request) -> AsyncIterator[httpx2.Response]:
    response = await client.send(request, stream=True, follow_redirects=False)
    try:
        yield response
    finally:
        await response.aclose()


def _certificate_error(error: BaseException | None) -> str | None:
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return error.verify_message
        error = error.__cause__ or error.__context__
    return None
