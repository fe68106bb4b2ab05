"""How far the copies of a capture have come."""

from attrs import define


@define(eq=False)
class Meter:
    """Written by whoever copies, one thread at a time; read by anybody.

    Attributes:
        total_bytes: What is to be copied, holes left out as far as that is known; zero: nothing is known.
        done_bytes: What has been copied.
    """

    total_bytes: int = 0
    done_bytes: int = 0
