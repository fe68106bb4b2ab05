"""Measurements that are run by hand, from a checkout; no part of the package that is installed."""
