"""How many runs may work at once: per backend, and overall."""

from collections.abc import Mapping
from typing import Self

import trio


class Slot:
    """A place among the runs of a backend, and one among all.

    The overall one is given back once no guest stands still for the run, the
    backend's once its hypervisor has no more work by it.

    Attributes:
        waited: Whether it had to be waited for.
    """

    def __init__(self, backend: trio.CapacityLimiter, overall: trio.CapacityLimiter) -> None:
        self._limiters = {"backend": backend, "overall": overall}
        self._held: set[str] = set()
        self.waited = False

    async def __aenter__(self) -> Self:
        """Wait for the backend's place first, so that one backend's runs don't fill all the overall ones."""
        try:
            await self._take()
        except BaseException:
            self.release()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """Give back what is held yet."""
        self.release()

    async def _take(self) -> None:
        for name, limiter in self._limiters.items():
            try:
                limiter.acquire_on_behalf_of_nowait(self)  # many that are due at one moment need no turn each
            except trio.WouldBlock:
                self.waited = True
                await limiter.acquire_on_behalf_of(self)
            self._held.add(name)

    def release_overall(self) -> None:
        """Let a run of another backend in. Idempotent."""
        self._release("overall")

    def release(self) -> None:
        """Let the next run in, of whatever backend. Idempotent."""
        for name in self._limiters:
            self._release(name)

    def _release(self, name: str) -> None:
        if name in self._held:
            self._held.remove(name)
            self._limiters[name].release_on_behalf_of(self)


class Slots:
    """The limits. First come, first served."""

    def __init__(self, overall: int) -> None:
        self._overall = trio.CapacityLimiter(overall)
        self._backends: dict[str, trio.CapacityLimiter] = {}

    def resize(self, overall: int, per_backend: Mapping[str, int | None]) -> None:
        """Take limits from the config; a backend without one gets half of the overall, at least 1."""
        self._overall.total_tokens = overall
        for name, limit in per_backend.items():
            tokens = limit or max(1, overall // 2)
            self._backends.setdefault(name, trio.CapacityLimiter(tokens)).total_tokens = tokens

    def take(self, backend: str) -> Slot:
        """A slot for a run on *backend*, to be entered."""
        return Slot(self._backends.setdefault(backend, trio.CapacityLimiter(1)), self._overall)
