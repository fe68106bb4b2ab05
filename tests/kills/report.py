"""What a campaign came to: a table to read, and figures for programs."""

from collections import Counter
from collections.abc import Iterable
from statistics import median
from typing import Any

from tests.kills import checks
from tests.kills.campaign import Campaign
from tests.kills.harness import Outcome
from tests.kills.places import STEPS, How


def summary(campaign: Campaign) -> str:
    """Steps by ground and way, and the times."""
    outcomes = campaign.outcomes
    columns = sorted({(o.ground, o.kill.how, o.kill.by) for o in outcomes})
    counts = Counter((o.kill.step, (o.ground, o.kill.how, o.kill.by)) for o in outcomes)
    lines = [f"{len(outcomes)} kills, seed {campaign.seed}; {len(campaign.failures)} not as promised"]
    lines += [f"  {chr(ord('A') + n)}: {ground}, {how}, {by}" for n, (ground, how, by) in enumerate(columns)]
    lines.append(f"{'':14}" + "".join(f"{chr(ord('A') + n):>4}" for n in range(len(columns))))
    for step in STEPS:
        cells = "".join(f"{counts[step, column] or '·':>4}" for column in columns)
        lines.append(f"{step:14}{cells}")
    return "\n".join([*lines, *_times(outcomes), *map(str, campaign.failures)])


def _times(outcomes: Iterable[Outcome]) -> Iterable[str]:
    outcomes = list(outcomes)
    for ground in sorted({o.ground for o in outcomes}):
        here = [o for o in outcomes if o.ground == ground]
        for how in How:
            times = [o.thawed_s for o in here if o.thawed_s is not None and o.kill.how is how and o.kill.by.has_guard]
            if times:
                yield f"{ground}, {how}, guard: guest runs after {median(times):.2f} s, at most {max(times):.2f} s"
        if freezes := [o.freeze_s for o in here if o.freeze_s is not None]:
            yield f"{ground}: frozen for {median(freezes):.3f} s, at most {max(freezes):.3f} s"


def figures(campaign: Campaign) -> dict[str, Any]:
    """The same as JSON."""
    outcomes = campaign.outcomes
    findings = Counter(finding.kind for failure in campaign.failures for finding in failure.findings)
    return {
        "seed": campaign.seed,
        "kills": len(outcomes),
        "survived": sum(not outcome.findings for outcome in outcomes),
        "lost_runs": findings[checks.LOST],
        "duplicates": findings[checks.TWICE],
        "left_frozen": findings[checks.FROZEN],
        "findings": dict(findings),
        "steps_seen": len({(outcome.ground, outcome.kill.step) for outcome in outcomes}),
        "by_backend": {
            ground: _of_ground([o for o in outcomes if o.ground == ground]) for ground in {o.ground for o in outcomes}
        },
    }


def _of_ground(outcomes: list[Outcome]) -> dict[str, Any]:
    guarded = [o for o in outcomes if o.kill.by.has_guard and o.thawed_s is not None]
    return {
        "kills": len(outcomes),
        "survived": sum(not outcome.findings for outcome in outcomes),
        "ways": Counter(f"{outcome.kill.how}, {outcome.kill.by}" for outcome in outcomes),
        "longest_from_death_to_thaw_s": max(
            (o.thawed_s or 0 for o in guarded if o.kill.how is How.KILLED), default=None
        ),
        "longest_hang_over_a_freeze_s": max(
            (o.thawed_s or 0 for o in guarded if o.kill.how is not How.KILLED), default=None
        ),
        "longest_freeze_s": _longest_freeze(outcomes),
    }


def _longest_freeze(outcomes: list[Outcome]) -> list[dict[str, float]]:
    """The longest freeze with a guard, by the budget that it had."""
    longest: dict[float, float] = {}
    for o in outcomes:
        if o.kill.by.has_guard and o.freeze_s is not None:
            longest[o.budget_s] = max(longest.get(o.budget_s, 0), o.freeze_s)
    return [{"budget_s": budget_s, "longest_freeze_s": freeze_s} for budget_s, freeze_s in sorted(longest.items())]
