"""The config keys of a hypeman backend."""

import ipaddress
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from attrs import evolve, frozen

from hypemand.core.errors import RuleBroken, RulesBroken


@frozen(kw_only=True)
class HypemanSettings:
    """Keys of a backend of this type.

    Attributes:
        url: The server, as its clients have it: scheme, host, port, and the path where it is not at the top.
        token_file: A file that holds the server's token; none: the systemd credential ``hypeman-token``, if there is
            one.
        ca_file: Certificates of those whom to trust instead of the system's own, in PEM.
        snapshot_dir: The catalog; the default is below the state directory.
    """

    url: str
    token_file: Path | None = None
    ca_file: Path | None = None
    snapshot_dir: Path | None = None

    def __attrs_post_init__(self) -> None:
        """Check what a type alone does not say."""
        broken = [RuleBroken(f"{_shown(self.url)} {problem}", "url") for problem in _url_problems(self.url)]
        if self.ca_file is not None and is_plain(self.url):
            broken.append(RuleBroken("is of no use: the url is not https", "ca_file"))
        if broken:
            raise RulesBroken(broken)

    def absolute(self) -> "HypemanSettings":
        """The same with absolute paths, and the url in the one way in which it is compared."""
        return evolve(
            self,
            url=in_one_way(self.url),
            token_file=self.token_file and self.token_file.absolute(),
            ca_file=self.ca_file and self.ca_file.absolute(),
            snapshot_dir=self.snapshot_dir and self.snapshot_dir.absolute(),
        )


def in_one_way(url: str) -> str:
    """*url* as it is compared and kept: the scheme, of any case, in small letters; no slash at the end."""
    scheme, colon, rest = url.partition(":")
    return f"{scheme.lower()}{colon}{rest}".rstrip("/")


def is_plain(url: str) -> bool:
    """Whether *url* says http, in any case: what is not, is secured."""
    return url.partition(":")[0].lower() == "http"


def _url_problems(url: str) -> Iterator[str]:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        yield f"is no URL: {error}"
        return
    if parts.scheme not in ("http", "https") or not host or port == 0 or url != url.strip():
        yield 'must be a URL like "http://127.0.0.1:8080" or "https://hypeman.example.org"'
        return
    if "@" in parts.netloc or parts.query or parts.fragment:
        yield "must hold no user, password, query or fragment; the token belongs into token_file"
        return
    if parts.scheme == "http" and not is_loopback(host):
        yield (
            f"would have the token readable by all on the way to {host}: use https,"
            " or a tunnel, like `ssh -L 8080:localhost:8080`"
        )


def _shown(url: str) -> str:
    """*url* without what may be a password."""
    return repr(url) if "@" not in url else "(a URL with a user)"


def is_loopback(host: str) -> bool:
    """Whether *host* is this machine, for whoever looks."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
