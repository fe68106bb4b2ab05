"""Guests of a Hypeman server: it captures them itself, and keeps the snapshots; hypemand asks it over HTTP."""

from hypemand.backends.hypeman.backend import TYPE

__all__ = ["TYPE"]
