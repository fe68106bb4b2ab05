"""The token that the server wants to see. It is in a file, and in the header of a request; never anywhere else."""

import re

from attrs import define, field

from hypemand.backends.base import BackendUnavailable
from hypemand.backends.hypeman.settings import HypemanSettings
from hypemand.backends.private_files import NotPrivateError, credential, read_private

CREDENTIAL = "hypeman-token"
_TOKEN = re.compile(r"[!-~][ -~]*")


@define(eq=False)
class Token:
    """The token of a backend, read from its file when it is first needed. Blocking."""

    settings: HypemanSettings
    _read: str | None = field(init=False, default=None, repr=False)

    @property
    def place(self) -> str:
        """Where it comes from, for people."""
        if self.settings.token_file is not None:
            return f"token_file {self.settings.token_file}"
        return f"the systemd credential {CREDENTIAL}" if credential(CREDENTIAL) else "token_file, which is not set"

    @property
    def known_headers(self) -> dict[str, str] | None:
        """The header as it was read before. Does not block."""
        return None if self._read is None else {"authorization": f"Bearer {self._read}"}

    def headers(self, *, anew: bool) -> dict[str, str]:
        """The header that shows it; none where there is no token.

        Args:
            anew: Read the file again.

        Raises:
            BackendUnavailable: There is a file, and no token to be had from it. What is in it is not told.
        """
        path = self.settings.token_file or credential(CREDENTIAL)
        if path is None:
            return {}
        if self._read is None or anew:
            try:
                text = read_private(path).decode("utf-8-sig").strip()
            except NotPrivateError as error:
                raise BackendUnavailable(f"token_file {path} {error}") from None
            except OSError as error:
                raise BackendUnavailable(f"token_file {path} can't be read: {error.strerror}") from None
            except UnicodeDecodeError:
                text = ""
            if not _TOKEN.fullmatch(text):
                raise BackendUnavailable(f"token_file {path} must hold the token alone: one line of visible characters")
            self._read = text
        return {"authorization": f"Bearer {self._read}"}
