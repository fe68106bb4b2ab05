"""``GET /metrics``: what the engine knows, for Prometheus. Nobody is asked for it, so nobody can hold it up."""

from collections.abc import Callable, Iterable
from itertools import chain

import trio
from attrs import frozen
from prometheus_client import ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hypemand.engine.engine import Engine
from hypemand.engine.events import Event, RunEnded, SnapshotsListed
from hypemand.surface.metrics.families import of_instances, parts
from hypemand.surface.metrics.kept import KeptSnapshots
from hypemand.surface.metrics.overall import of_all
from hypemand.surface.metrics.sight import Sight, see
from hypemand.surface.metrics.standing import Standing
from hypemand.surface.metrics.tallies import Tallies


class Metrics:
    """The metrics of *engine*, with what it tells to `heard`.

    An instance whose schedule is gone has none: neither gauges nor counters.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._tallies = Tallies()
        self.kept = KeptSnapshots(engine)
        self._standing = Standing(engine)
        self._process = ProcessCollector(registry=None)
        self._turn = trio.Lock()

    def heard(self, event: Event) -> None:
        """Take in *event*."""
        self._standing.heard(event)
        if isinstance(event, RunEnded) and event.run.instance_id in self._engine.store.schedules:
            self._tallies.of(event.run.instance_id).add(event.run)
        elif isinstance(event, SnapshotsListed):
            self.kept.heard(event.instance_id, event.snapshots)

    async def keep_counting(self) -> None:
        """Ask the backends for the snapshots that are kept, once runs can begin, then now and then; for ever."""
        await self.kept.keep_asking()

    async def page(self, accept: str = "") -> tuple[bytes, str]:
        """Everything as text, in the format that the header *accept* prefers, and its content type.

        One page is made at a time, and every millisecond or so others have a
        turn: neither a thousand instances nor many who ask hold a run up.
        """
        encode, content_type = _encoder(accept)
        text: list[bytes] = []
        name = None
        async with self._turn:
            sights = await self._sights()
            for metric in chain(
                of_all(self._engine), self._standing.metrics(), of_instances(sights), self._process.collect()
            ):
                lines = encode(_One(metric)).splitlines(keepends=True)
                # Each part comes with an end, and with a head, of which the first is enough.
                text += [line for line in lines if line != _END and (metric.name != name or not line.startswith(b"#"))]
                name = metric.name
                await trio.lowlevel.checkpoint()
        if content_type.startswith("application/openmetrics-text"):
            text.append(_END)
        return b"".join(text), content_type

    async def _sights(self) -> list[Sight]:
        now, schedules = self._engine.clock.now(), [*self._engine.store.schedules.values()]
        self._tallies.keep(schedule.instance_id for schedule in schedules)
        sights: list[Sight] = []
        for part in parts(sorted(schedules, key=lambda s: s.instance_id)):
            sights += [see(self._engine, s, self.kept, self._tallies.of(s.instance_id), now) for s in part]
            await trio.lowlevel.checkpoint()
        return sights

    def route(self) -> Route:
        """The route, for Prometheus and for whoever else asks."""

        async def scrape(request: Request) -> Response:
            text, content_type = await self.page(",".join(request.headers.getlist("accept")))
            return Response(text, headers={"content-type": content_type})

        return Route("/metrics", scrape, methods=["GET"])


_END = b"# EOF\n"


def _encoder(accept: str) -> tuple[Callable[[Collector], bytes], str]:
    try:
        return choose_encoder(accept)
    except (TypeError, ValueError):  # it asks for a version that is none
        return choose_encoder("")


@frozen
class _One(Collector):
    """A registry of one metric, which an encoder takes."""

    metric: Metric

    def collect(self) -> Iterable[Metric]:
        return (self.metric,)
