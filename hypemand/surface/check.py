"""The rules of ``status --check``: what of a status is critical, and what is worth a look. For monitoring."""

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from enum import IntEnum
from typing import Any

from attrs import frozen

from hypemand.core.cadence import stale_after
from hypemand.core.duration import parse_duration
from hypemand.core.fields import check_instant
from hypemand.surface.render import ago, one_line

STARTS_WITHIN = timedelta(minutes=1)
"""A daemon that has the state for longer, and does not listen on its socket, is no daemon that starts."""
THAW_SLACK_S = 1.0
"""What hypemand promises: a guest runs again within its freeze budget and a second."""
MOST_FINDINGS = 5
MOST_NAMES = 3
MOST_CHARACTERS = 200

Told = Mapping[str, Any]


class Level(IntEnum):
    """How bad it is; the exit status that monitoring systems expect."""

    OK = 0
    WARNING = 1
    CRITICAL = 2
    UNKNOWN = 3


@frozen
class Finding:
    """One thing that is not as it should be."""

    level: Level
    text: str


@frozen
class Verdict:
    """How a status is to be taken. *findings*: the worst first."""

    level: Level
    summary: str
    findings: tuple[Finding, ...] = ()

    @property
    def line(self) -> str:
        """All of it in one line. A bar is left out: monitoring systems take what follows it for figures."""
        return one_line(f"{self.level.name}: {self.summary}").replace("|", "/")


def judge(status: Told, now: datetime, only: str | None = None) -> Verdict:
    """What *status* is worth.

    Args:
        status: A `documents.status_document`.
        only: The one instance that it is asked about; uncovered ones beside it are nobody's concern then.
    """
    views = status["instances"]
    found = [*_of_daemon(status, now), *_of_state(status)]
    for view in views:
        found += _of_instance(view, now)
    uncovered = [view["instance_id"] for view in views if not view["covered"] and only in (None, view["instance_id"])]
    if uncovered:
        found.append(Finding(Level.WARNING, f"without a schedule: {_several(uncovered, MOST_NAMES)}"))
    found.sort(key=lambda finding: -finding.level)
    if not found:
        return Verdict(Level.OK, _all_well(views, now))
    return Verdict(found[0].level, _several([finding.text for finding in found], MOST_FINDINGS, "; "), tuple(found))


def daemon_down(why: str) -> Verdict:
    """The verdict where nobody listens, and the state may not be read either."""
    text = f"the daemon does not answer: {why}"
    return Verdict(Level.CRITICAL, text, (Finding(Level.CRITICAL, text),))


def unknown(why: str) -> Verdict:
    """The verdict where there is no status to be had."""
    return Verdict(Level.UNKNOWN, why)


def _several(texts: list[str], most: int, between: str = ", ") -> str:
    more = len(texts) - most
    return between.join([*texts[:most], *([f"and {more} more"] if more > 0 else [])])


def _all_well(views: Iterable[Told], now: datetime) -> str:
    active = [view for view in views if _is_active(view)]
    oldest = min((_last_good_at(view) for view in active if view["last_good_at"]), default=None)
    schedules = f"{len(active)} schedule{'s' * (len(active) != 1)}"
    return schedules if oldest is None else f"{schedules}, last good snapshot at most {_old(oldest, now)} old"


def _old(at: datetime, now: datetime) -> str:
    return ago(min(at, now), now).removesuffix(" ago")


def _of_daemon(status: Told, now: datetime) -> Iterator[Finding]:
    lock, trouble = status["lock"], status.get("socket_trouble")
    if status["answered_by"] == "daemon":
        return
    if lock is None or lock["role"] != "daemon":
        holder = f"; the state is in use by {lock['role']} (pid {lock['pid']})" if lock else ""
        yield Finding(Level.CRITICAL, f"the daemon is not running{holder}")
        return
    daemon = f"the daemon (pid {lock['pid']})"
    why, message = (trouble["why"], trouble["message"]) if trouble else ("strange", "not asked")
    since = lock["since"]
    if why == "absent" and since is not None and now - check_instant(since) < STARTS_WITHIN:
        yield Finding(Level.WARNING, f"{daemon} starts, or stops")
    elif why in ("absent", "hung"):
        yield Finding(Level.CRITICAL, f"{daemon} does not answer: {message}")
    else:
        yield Finding(Level.WARNING, f"{daemon} can't be asked: {message}")


def _of_state(status: Told) -> Iterator[Finding]:
    troubles = {
        "state file unreadable or invalid": status["unreadable_state_files"],
        "in quarantine": status["quarantine"],
        "run log damaged": status["damaged_log_lines"],
        "config invalid": status["config_problems"],
        "problem": status["problems"],
        "clock": status["clock_doubts"],
    }
    for what, texts in troubles.items():
        if texts:
            yield Finding(Level.WARNING, f"{what}: {_several([_short(text) for text in texts], 1)}")


def _of_instance(view: Told, now: datetime) -> Iterator[Finding]:
    name = view["instance_id"]
    frozen = _why_frozen(view, now)
    if frozen is not None:
        yield Finding(Level.CRITICAL, f"{name}: {frozen}")
    elif view["open_run"] and not view["under_way"]:
        yield Finding(Level.WARNING, f"{name}: its run of {_run_age(view, now)} is not settled yet")
    if not _is_active(view):
        return
    yield from _of_runs(view, now)
    stale = _why_stale(view, now)
    if stale is not None:
        yield Finding(Level.CRITICAL, f"{name}: {stale}")
    if view["trouble"]:
        yield Finding(Level.WARNING, f"{name}: {_short(view['trouble'])}")
    if view["freeze"]["over_budget"]:
        yield Finding(Level.WARNING, f"{name}: its next run will not begin, it froze for longer than its budget before")


def _is_active(view: Told) -> bool:
    """Whether runs of it are expected."""
    schedule = view["schedule"]
    return schedule is not None and view["made"] and schedule["settings"].get("enabled", True)


def _why_frozen(view: Told, now: datetime) -> str | None:
    """Why its guest stands still, or may, though no capture within its budget is under way."""
    run, state = view["current_run"], view["state"]
    if run is None:
        return "is Paused, and not by a run of hypemand" if state == "Paused" and _is_active(view) else None
    if not view["under_way"]:
        if state not in ("Paused", None):
            return None
        stands = "stands still" if state else "may stand still"
        return f"{stands}: its run of {_run_age(view, now)} is not settled{_because(run['error'])}"
    if state != "Paused":
        return None
    for_s, budget_s = _frozen_s(run, now), run["max_freeze_s"]
    if for_s <= budget_s + THAW_SLACK_S:
        return None
    return f"stands still for {for_s:.0f} s in a run, longer than its budget of {budget_s:g} s"


def _frozen_s(run: Told, now: datetime) -> float:
    """How long at most, where only the begin of the run is known."""
    if run["frozen_s"] is not None:
        return float(run["frozen_s"])
    return (now - check_instant(run["started_at"])).total_seconds()


def _run_age(view: Told, now: datetime) -> str:
    return ago(check_instant(view["current_run"]["started_at"]), now)


def _because(error: str | None) -> str:
    return f" ({_short(error)})" if error else ""


def _of_runs(view: Told, now: datetime) -> Iterator[Finding]:
    name, attempt, schedule = view["instance_id"], view["last_attempt"], view["schedule"]
    made_at = check_instant(schedule["created_at"])
    if attempt is None or check_instant(attempt["started_at"]) < made_at:  # of an earlier schedule, or long ago
        if schedule.get("last_error"):
            yield Finding(Level.WARNING, f"{name}: last error: {_short(schedule['last_error'])}")
        return
    age, error = ago(check_instant(attempt["started_at"]), now), _short(attempt["error"] or "")
    if attempt["outcome"] in ("failed", "interrupted"):
        yield Finding(Level.CRITICAL, f"{name}: last run {attempt['outcome']} {age}: {error}")
    elif error:
        yield Finding(Level.WARNING, f"{name}: last run succeeded {age}, but: {error}")


def _last_good_at(view: Told) -> datetime:
    """When its last good snapshot was taken; without one, when its schedule was made."""
    return check_instant(view["last_good_at"] or view["schedule"]["created_at"])


def _why_stale(view: Told, now: datetime) -> str | None:
    schedule = view["schedule"]
    interval, since = parse_duration(schedule["interval"]), _last_good_at(view)
    if now - since <= stale_after(view["instance_id"], interval):
        return None
    every = f"one is due every {schedule['interval']}"
    if view["last_good_at"] is None:
        return f"no good snapshot, and its schedule was made {ago(since, now)}: {every}"
    return f"last good snapshot {_old(since, now)} old: {every}"


def _short(text: str) -> str:
    text = one_line(text)
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 3]}..."
