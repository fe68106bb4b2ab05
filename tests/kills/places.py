"""Where in a run a daemon comes to harm, and how. Known to the harness and to its victim."""

import json
import os
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

from attrs import frozen

GUEST, OPERATORS = "web-1", "web-2"
"""The guest whose run is cut short, and one that an operator has paused before."""

VARIABLE = "KILL_AT"
"""Environment variable that tells a victim where."""

STEPS = (
    *("inspect", "prepare", "claim", "make ready", "look", "pause", "capture", "resume"),
    *("complete", "publish", "list", "keep", "delete", "record", "file"),
)
"""A run's steps in their order. *look*: once more at the guest, right before its pause. *keep*: the schedule's file
names the new snapshot before the one is deleted that it named. *record* and *file*: how it ended, in the run log and
in that file.
"""
OF_THE_ENGINE = frozenset({"make ready", "look", "pause", "resume"})
"""Steps that there are only where the engine freezes."""
OF_RECOVERY = ("settle", "settled", "refile")
"""Steps of a recovery, which may be killed as well: the backend's part, the run log's line, the schedule's file."""


class Phase(StrEnum):
    """When, seen from a step: at its boundaries, or at an instant inside it."""

    BEFORE = "before"
    IN = "in"
    AFTER = "after"


class How(StrEnum):
    """What happens to the daemon."""

    KILLED = "SIGKILL"
    STOPPED = "SIGSTOP"
    BLOCKED = "blocked loop"


class By(StrEnum):
    """Who settles it."""

    GUARD = "guard"
    RECOVER = "recover"
    BOTH = "guard and recover"
    RESTART = "guard and daemon"
    NOBODY = "nobody"

    @property
    def has_guard(self) -> bool:
        """Whether the daemon has a guard; in two of these ways others are at once there as well."""
        return self in (By.GUARD, By.BOTH, By.RESTART)


@frozen
class Relapse:
    """Where a recovery is killed."""

    step: str
    phase: Phase
    after_s: float


@frozen
class Kill:
    """One harm that a daemon comes to.

    Attributes:
        after_s: How long after the begin of the step, if inside it; one that is over sooner is harmed at its end.
        operator: Whether an operator pauses the guest right before. The daemon is stopped for that, and then killed.
        relapse: Where a first `recover` is killed, if it gets there; a second one settles it all.
    """

    step: str
    phase: Phase
    how: How = How.KILLED
    by: By = By.RECOVER
    after_s: float = 0.0
    operator: bool = False
    relapse: "Relapse | None" = None

    def __str__(self) -> str:
        inside = f" +{self.after_s * 1000:.1f} ms" if self.phase is Phase.IN else ""
        operator = ", paused by an operator" if self.operator else ""
        relapse = f" after one killed {self.relapse.phase} {self.relapse.step}" if self.relapse else ""
        return f"{self.how} {self.phase} {self.step}{inside}{operator} ({self.by}{relapse})"

    @property
    def holds_lease(self) -> bool:
        """Whether the daemon certainly answers for a frozen guest at that place."""
        return (self.step, self.phase) in _FROZEN or (self.step == "capture" and self.phase is Phase.IN)


_FROZEN = {
    ("pause", Phase.AFTER),
    ("capture", Phase.BEFORE),
    ("capture", Phase.AFTER),
    ("resume", Phase.BEFORE),
}


@frozen
class Trigger:
    """What a victim is told: the place, what to do there, and how to tell that it got there.

    Attributes:
        log: The victim's own: by this environment processes are known that it has started.
        tell: Descriptor of a pipe for its note. A file might wait for a busy disk, while the victim goes on.
    """

    step: str
    phase: Phase
    how: How
    after_s: float
    blocks_s: float
    log: Path
    tell: int = -1

    def environment(self) -> dict[str, str]:
        """As environment variables."""
        told = {
            "step": self.step,
            "phase": self.phase,
            "how": self.how,
            "after_s": self.after_s,
            "blocks_s": self.blocks_s,
            "log": str(self.log),
            "tell": self.tell,
        }
        return {VARIABLE: json.dumps(told)}

    @classmethod
    def found(cls, environment: Mapping[str, str] = os.environ) -> "Trigger":
        """From environment variables."""
        told = json.loads(environment[VARIABLE])
        return cls(
            step=told["step"],
            phase=Phase(told["phase"]),
            how=How(told["how"]),
            after_s=told["after_s"],
            blocks_s=told["blocks_s"],
            log=Path(told["log"]),
            tell=told["tell"],
        )


@frozen
class Note:
    """What a victim noted right before it came to harm.

    Attributes:
        at: On the monotonic clock, which all processes share.
        late: Whether the step was over before the instant inside it that was meant.
        children: Its child processes.
    """

    pid: int
    at: float
    late: bool
    children: tuple[int, ...]

    @classmethod
    def heard(cls, data: bytes) -> "Note":
        """The note that was told as *data*."""
        told = json.loads(data)
        return cls(told["pid"], told["at"], told["late"], tuple(told["children"]))

    def tell(self, descriptor: int) -> None:
        """Write it into a pipe, in one go."""
        told = {"pid": self.pid, "at": self.at, "late": self.late, "children": self.children}
        os.write(descriptor, json.dumps(told).encode())
