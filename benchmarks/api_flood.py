"""Many schedules due at one moment, and new ones put meanwhile."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any

import trio
from attrs import frozen

from benchmarks.api_load import Load, Target, ask_all
from benchmarks.api_rounds import CONNECTIONS
from benchmarks.api_servers import serving_daemon, write_config
from tests.processes import Lab, instant, wait_until

_BEFORE_S = 0.2
"""So long before the moment the first PUT is sent."""
_START_S = 5.0
_LOOK_S = 0.5
_PATIENCE_S = 600.0
_WANTED = json.dumps({"interval": "24h", "retention": {"max_count": 7}}).encode()


@frozen
class Flood:
    """What became of the runs: how late each began, in seconds, how many failed; and of the PUTs."""

    late_s: list[float]
    failed: int
    puts: Load

    def document(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "runs": len(self.late_s),
            "failed": self.failed,
            "latest_s": round(max(self.late_s), 3),
            "median_late_s": round(median(self.late_s), 3),
            "puts": len(self.puts.took_s),
            "puts_took_s": round(self.puts.seconds, 2),
            "slowest_put_s": round(max(self.puts.took_s, default=0.0), 3),
        }


async def flood(directory: Path, schedules: int, *, puts: int) -> Flood:
    """Have so many *schedules* come due at one moment, and *puts* new ones put from just before it on."""
    due = [f"due-{number}" for number in range(schedules)]
    new = [f"new-{number}" for number in range(puts)]
    lab, target = write_config(directory, (*due, *new), at_once=schedules)
    await _make_instances(lab, target, len(due) + len(new))
    moment = datetime.now(UTC) + timedelta(seconds=_START_S + schedules / 200)
    for instance in due:
        lab.prepare(instance, next_run_at=instant(moment), managed_by="api")
    async with serving_daemon(lab, target):
        await trio.sleep((moment - datetime.now(UTC)).total_seconds() - _BEFORE_S)
        load = Load()
        if new:
            paths = (target.request("PUT", f"/instances/{name}/snapshot-schedule", _WANTED) for name in new)
            load = await ask_all(target, paths, CONNECTIONS)
        finished = await _all_finished(lab, set(due))
    late_s = [line["late_s"] for line in finished]
    return Flood(late_s, sum(line["outcome"] != "succeeded" for line in finished), load)


async def _make_instances(lab: Lab, target: Target, count: int) -> None:
    """A first start makes the guests' files, which is nothing that is measured."""
    async with serving_daemon(lab, target):
        made = lab.root / "instances"
        await wait_until(lambda: len(list(made.glob("*"))) >= count, "every instance", _PATIENCE_S)


async def _all_finished(lab: Lab, due: set[str]) -> list[dict[str, Any]]:
    def lines() -> list[dict[str, Any]]:
        return [line for line in lab.log_lines("finished") if line["instance_id"] in due]

    with trio.fail_after(_PATIENCE_S):
        while len({line["instance_id"] for line in lines()}) < len(due):  # noqa: ASYNC110 - of another process
            await trio.sleep(_LOOK_S)
    return lines()
