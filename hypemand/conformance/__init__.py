"""What every backend must keep, as tests: its promises one by one, and a fault at each step of a real run.

One line in a test file runs a backend through all of it::

    test_conformance = conformance(my_subject)

Needs pytest, and nothing else beside hypemand; no other part of hypemand
imports this. docs/backends.md tells how to use it.
"""

import pytest

# Before they are imported: a promise that is broken is then told with its values.
pytest.register_assert_rewrite(
    "hypemand.conformance.aftermath",
    "hypemand.conformance.matrix",
    "hypemand.conformance.promises_of_freezing",
    "hypemand.conformance.promises_of_settling",
    "hypemand.conformance.promises_of_snapshots",
    "hypemand.conformance.promises_of_state",
)

from hypemand.conformance.subject import Case, Subject, SubjectMaker, Traits  # noqa: E402
from hypemand.conformance.suite import conformance, conformance_cases  # noqa: E402 - see above

__all__ = ["Case", "Subject", "SubjectMaker", "Traits", "conformance", "conformance_cases"]
