"""QEMU guests, running or stopped: snapshots in their own qcow2 disks, and the memory there or in the catalog."""

from hypemand.backends.qemu.backend import TYPE

__all__ = ["TYPE"]
