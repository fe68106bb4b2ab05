"""How a promise becomes a case: a module keeps a list, and each of its functions is added by decoration."""

from collections.abc import Awaitable, Callable
from pathlib import Path

from hypemand.conformance.subject import Case, Subject, Traits

Promise = Callable[[Subject], Awaitable[None]]


class Promises(list[Case]):
    """The promises of a module; a decorator for its functions, whose names say what is promised."""

    def __call__(self, keep: Promise) -> Promise:
        """Add *keep*, a promise of every backend."""
        return self.where(lambda _: True)(keep)

    def where(self, applies: Callable[[Traits], bool]) -> Callable[[Promise], Promise]:
        """Add a promise of such backends alone as *applies* to."""

        def add(keep: Promise) -> Promise:
            async def check(subject: Subject, directory: Path) -> None:
                del directory
                await keep(subject)

            name = getattr(keep, "__name__", "").replace("_", "-")
            self.append(Case(f"promise-{name}", check, applies))
            return keep

        return add
