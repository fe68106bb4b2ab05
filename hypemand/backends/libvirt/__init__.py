"""Guests of libvirt's QEMU driver: internal snapshots, of which libvirt itself keeps all that is to be known."""

from importlib.util import find_spec

from hypemand.core.errors import InvalidInput, Problem

MISSING = (
    "the type libvirt needs libvirt's binding for this Python: pip install 'hypemand[libvirt]' builds it"
    " (on Debian: apt-get install libvirt-dev gcc pkg-config python3-dev); or apt-get install python3-libvirt,"
    " and a virtual environment made with --system-site-packages"
)

if find_spec("libvirt") is None:
    raise InvalidInput([Problem("type", MISSING)])

from hypemand.backends.libvirt.backend import TYPE  # noqa: E402 - without the binding it can't be imported

__all__ = ["TYPE"]
