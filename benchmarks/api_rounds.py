"""Requests per second: each kind of request in its turn, round after round, every other one backwards."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import trio
from attrs import define, field

from benchmarks.api_load import Connection, Target, UnexpectedAnswerError, ask_all, repeated
from benchmarks.api_servers import serving_bare, serving_daemon, write_config

CONNECTIONS = 16
_PATH = "/instances/web-1/snapshot-schedule"
_WANTED = json.dumps({"interval": "24h", "retention": {"max_age": "168h", "max_count": 7}}).encode()


@define
class Rates:
    """One kind of request: its rate in each round, and how long each request took."""

    what: str
    target: Target
    request: bytes
    per_s: list[float] = field(factory=list)
    took_s: list[float] = field(factory=list)

    @property
    def median(self) -> float:
        """Requests per second, in the median of the rounds."""
        return median(self.per_s)

    def document(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "median": round(self.median, 1),
            "min": round(min(self.per_s), 1),
            "max": round(max(self.per_s), 1),
            "p99_ms": round(1000 * quantiles(self.took_s, n=100)[98], 2),
        }


async def measure_rates(directory: Path, rounds: int, seconds: float, tell: Callable[[str], None]) -> list[Rates]:
    """The rates of the bare app, which comes first, and of hypemand's answers. One round more is to warm up."""
    lab, target = write_config(directory, ("web-1",))
    async with serving_daemon(lab, target):
        body = await _put_one(target)
        async with serving_bare(body) as bare:
            every = [
                Rates("bare hypercorn, one route", bare, bare.request("GET", _PATH)),
                Rates("GET schedule", target, target.request("GET", _PATH)),
                Rates("GET health", target, target.request("GET", "/health")),
                Rates("PUT schedule, durable", target, target.request("PUT", _PATH, _WANTED)),
            ]
            for number in range(rounds + 1):
                tell(f"round {number} of {rounds}" if number else "warming up")
                for one in every if number % 2 else reversed(every):
                    load = await ask_all(one.target, repeated(one.request, seconds), CONNECTIONS)
                    if number:
                        one.per_s.append(load.per_s)
                        one.took_s += load.took_s
    return every


async def _put_one(target: Target) -> bytes:
    async with await trio.open_tcp_stream("127.0.0.1", target.port) as stream:
        status, body = await Connection(stream).ask(target.request("PUT", _PATH, _WANTED))
    if status != 200:
        raise UnexpectedAnswerError(f"{status} {body!r}")
    return body
