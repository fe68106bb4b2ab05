"""Why a client's request is not done."""

from hypemand.core.errors import HypemandError


class RequestRefusedError(HypemandError):
    """A request can't be done as things are; the message is for the client."""


class NotFoundError(RequestRefusedError):
    """There is no such schedule, or no such instance."""


class ConflictError(RequestRefusedError):
    """It contradicts what is there.

    Attributes:
        lasting: Asked again, it would be refused again, until somebody changes something.
    """

    def __init__(self, message: str, *, lasting: bool = True) -> None:
        self.lasting = lasting
        super().__init__(message)


class UnavailableError(RequestRefusedError):
    """Not now: a hypervisor does not answer, the disk is full, or hypemand stops. Worth another try."""
