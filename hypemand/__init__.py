"""hypemand: periodic VM snapshots that never leave a guest frozen."""

__version__ = "0.1.0"
