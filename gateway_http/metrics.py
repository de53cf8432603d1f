"""GET /metrics for Prometheus: this gateway's answers, and the queue and fleet behind it.

Labels are bounded: routes as they are written, statuses, executors, decisions; never a tenant, a
key or a request. Each gateway has its own answers; queue and fleet are the same at all of them.
"""

from collections import defaultdict
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Scope

from gateway_http.client import SchedulerClient
from gateway_http.monitor.data import MonitorData
from gateway_http.monitor.routes import Guard, Watch
from gateway_http.stall_guard import Cause
from headway.errors import HeadwayError

_NO_ROUTE = "none"


class Fleet(Collector):
    """The scheduler's snapshot as metrics; nothing while there is none."""

    def __init__(self) -> None:
        self.data: MonitorData | None = None

    def collect(self) -> Iterable[Metric]:
        """See prometheus_client."""
        if self.data is None:
            return
        data = self.data
        yield GaugeMetricFamily("headway_queue_depth", "Requests waiting.", data.queue_depth)
        yield GaugeMetricFamily("headway_running", "Requests granted and not ended.", data.running)
        live = GaugeMetricFamily("headway_executor_live", "Whether it is.", labels=["executor"])
        slots = GaugeMetricFamily(
            "headway_executor_slots", "Seats for sequences.", labels=["executor", "kind"]
        )
        for one in data.backends:
            live.add_metric([one.url], one.live)
            slots.add_metric([one.url, "total"], one.slots_total)
            slots.add_metric([one.url, "acquired"], one.slots_acquired)
        yield live
        yield slots
        decisions = CounterMetricFamily(
            "headway_decisions", "The scheduler's, since its start.", labels=["decision"]
        )
        for name, number in data.decisions.items():
            decisions.add_metric([name], number)
        yield decisions
        if data.accept_time is not None:
            wait = GaugeMetricFamily(
                "headway_queue_wait_seconds", "Until the first grant, over an hour.", labels=["of"]
            )
            for name in ("p10", "mean", "p90"):
                wait.add_metric([name], getattr(data.accept_time, name))
            yield wait


class Answers(Collector):
    """How many answers there were: a Counter takes a lock and five calls for each."""

    def __init__(self) -> None:
        self.counts: defaultdict[tuple[str, str, int], int] = defaultdict(int)
        """By method, route and status."""

    def collect(self) -> Iterable[Metric]:
        """See prometheus_client."""
        labels = ["method", "route", "status"]
        answers = CounterMetricFamily(
            "headway_http_answers", "Answers begun, by route and status.", labels=labels
        )
        for (method, route, status), number in self.counts.items():
            answers.add_metric([method, route, str(status)], number)
        yield answers


class Metrics:
    """All metrics of this process."""

    def __init__(self, client: SchedulerClient) -> None:
        self._registry = CollectorRegistry()
        self._fleet = Fleet()
        self._registry.register(self._fleet)
        ProcessCollector(registry=self._registry)
        self._answers = Answers()
        self._registry.register(self._answers)
        self._cuts = Counter(
            "headway_http_streams_cut",
            "Streams cut off because the client did not take them, by route and cause.",
            ["route", "cause"],
            registry=self._registry,
        )
        inflight = Gauge(
            "headway_gateway_inflight",
            "Requests that this gateway follows.",
            registry=self._registry,
        )
        inflight.set_function(lambda: client.num_inflight)

    def count(self, scope: Scope, status: int) -> None:
        """An answer begins, by the route that was dispatched."""
        path = _route(scope)
        method = scope["method"] if path != _NO_ROUTE else _NO_ROUTE
        self._answers.counts[method, path, status] += 1

    def count_cut(self, scope: Scope, cause: Cause) -> None:
        """A stream was cut off."""
        self._cuts.labels(_route(scope), cause).inc()

    async def text(self, watch: Watch) -> bytes:
        """The exposition; without a scheduler, without queue and fleet."""
        try:
            self._fleet.data = await watch.data()
        except HeadwayError:
            self._fleet.data = None
        return generate_latest(self._registry)


def _route(scope: Scope) -> str:
    """As it is written, with its parameters' names."""
    route = scope.get("route")
    return route.path if isinstance(route, Route) else _NO_ROUTE


def routes(metrics: Metrics, watch: Watch, guard: Guard) -> list[Route]:
    """One route, guarded as the monitor is."""

    async def show(request: Request) -> Response:
        guard.check(request)
        return Response(await metrics.text(watch), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    return [Route("/metrics", show, methods=["GET"])]
