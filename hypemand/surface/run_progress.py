"""A run by hand as it is told on a terminal, step by step."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from attrs import define

from hypemand.core.size import format_size
from hypemand.surface.render import one_line, seconds_short

Told = Mapping[str, Any]


@define
class Progress:
    """How far the run of *instance* has come.

    Attributes:
        run: Its finished line, once there is one.
    """

    instance: str
    run: Told | None = None
    begun: bool = False
    _left_open: str | None = None

    def take(self, told: Told) -> Iterator[str]:
        """Take in a step, and tell of it; one that this version does not know is passed over."""
        self.begun = True
        step = told.get("step")
        if step == "finished":
            self.run = told["run"]
            yield from self._ended(told["run"])
        elif step == "left open":
            self._left_open = told.get("message") or told.get("error") or "it is left open"
        elif (text := _step_text(told)) is not None:
            yield f"{self.instance}: {text}"

    def _ended(self, run: Told) -> Iterator[str]:
        for warning in run.get("warnings") or ():
            yield f"{self.instance}: warning: {one_line(warning)}"
        if run["outcome"] == "succeeded" and run["error"]:
            yield f"{self.instance}: warning: {one_line(run['error'])}"

    @property
    def left_alone(self) -> str:
        """What becomes of the run when nobody waits for it any more."""
        if not self.begun:
            return f"{self.instance}: the run goes on, if it has begun; see: hypemand status {self.instance}"
        return f"{self.instance}: the run goes on; see: hypemand status {self.instance}"

    @property
    def no_end(self) -> str:
        """That the daemon told of no end."""
        why = self._left_open or "the daemon ended before its run did"
        return f"{self.instance}: {one_line(why)}; see: hypemand status {self.instance}"

    def cut_short(self, error: Exception) -> str | None:
        """That no more was heard of a run that had begun; None where none had."""
        if not self.begun:
            return None
        return f"{self.instance}: nothing more is heard of the run ({error}); see: hypemand status {self.instance}"


_TEXTS: dict[str, Callable[[Told], str]] = {
    "waiting": lambda told: f"can't start yet, tries again in {told['in_s']:.0f} s: {one_line(told['error'])}",
    "begun": lambda told: f"run begins: snapshot {told['snapshot_name']} ({told['kind']})",
    "paused": lambda told: "paused",  # noqa: ARG005 - it carries no facts
    "copying": lambda told: (
        f"copied {format_size(told['done_bytes'])} of {format_size(told['total_bytes'])}"
        f" ({100 * told['done_bytes'] // told['total_bytes']} %)"
    ),
    "captured": lambda told: f"captured {format_size(told['size_bytes'])}",
    "resumed": lambda told: f"resumed after {seconds_short(told['freeze_s'])}",
    "listed": lambda told: f"snapshot {told['snapshot_name']} is complete, {format_size(told['size_bytes'])}",
    "pruned": lambda told: f"pruned {told['snapshot_name']}: {'; '.join(told['reasons'])}",
}


def _step_text(told: Told) -> str | None:
    text = _TEXTS.get(told.get("step", ""))
    try:
        return text(told) if text else None
    except (KeyError, TypeError, ValueError):  # another version tells it with other facts
        return str(told["step"])
