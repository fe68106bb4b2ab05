"""Errors of the rules, and how a problem with somebody's input is named."""

from collections.abc import Iterable

from attrs import frozen


class HypemandError(Exception):
    """Base of every error that hypemand raises on purpose."""


@frozen(order=True)
class Problem:
    """One thing wrong with an input: where (a dotted path) and which rule it breaks."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message

    def under(self, prefix: str) -> "Problem":
        """The same problem, seen from a document that holds this one at *prefix*."""
        return Problem(join_path(prefix, self.path), self.message)


class InvalidInput(HypemandError):
    """Input that breaks rules; carries every problem found, in document order."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(str(problem) for problem in self.problems))


class RuleBroken(ValueError):
    """A single value breaks a rule; *subpath* leads to the part at fault inside the value."""

    def __init__(self, message: str, subpath: str = "") -> None:
        self.subpath = subpath
        super().__init__(message)


class RulesBroken(ValueError):
    """Several parts of one value break rules."""

    def __init__(self, broken: Iterable[RuleBroken]) -> None:
        self.broken = tuple(broken)
        super().__init__("; ".join(str(one) for one in self.broken))


class StateForbidsRun(HypemandError):
    """The instance is in a state from which no scheduled snapshot can be taken."""


def join_path(prefix: str, rest: str) -> str:
    """Join two dotted paths: ``a`` and ``b`` to ``a.b``, ``a`` and ``[0]`` to ``a[0]``."""
    if not prefix or not rest:
        return prefix or rest
    return f"{prefix}{rest}" if rest.startswith("[") else f"{prefix}.{rest}"
