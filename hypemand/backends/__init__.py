"""Hypervisors behind one protocol, and the snapshots on disk for those that keep none."""
