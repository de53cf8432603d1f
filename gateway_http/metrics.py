"""GET /metrics for Prometheus: this gateway's answers, and the queue and fleet behind it.

Labels are bounded: routes as they are written, statuses, executors, decisions; never a tenant, a
key or a request. Each gateway has its own answers; queue and fleet are the same at all of them.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Scope

from gateway_http.client import SchedulerClient
from gateway_http.monitor.data import Backend, MonitorData, in_parts
from gateway_http.monitor.routes import Guard, Watch
from gateway_http.stall_guard import Cause
from headway.errors import HeadwayError

_NO_ROUTE = "none"
_HEAD_LINES = 2  # HELP and TYPE, before the lines of a metric


class _Some(Collector):
    """A few metrics that were made by hand."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        """See prometheus_client."""
        return self._metrics


async def fleet_text(data: MonitorData) -> bytes:
    """Queue and fleet; what has lines for each executor is written in parts."""
    texts = [generate_latest(_Some(_totals(data)))]
    for family in (_live, _slots):
        head_lines = 0  # only the first part says what the lines mean
        async for part in in_parts(data.backends):
            lines = generate_latest(_Some([family(part)]))
            texts.append(lines.split(b"\n", head_lines)[-1])
            head_lines = _HEAD_LINES
    return b"".join(texts)


def _totals(data: MonitorData) -> Iterable[Metric]:
    yield GaugeMetricFamily("headway_queue_depth", "Requests waiting.", data.queue_depth)
    yield GaugeMetricFamily("headway_running", "Requests granted and not ended.", data.running)
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


def _live(backends: Sequence[Backend]) -> Metric:
    live = GaugeMetricFamily("headway_executor_live", "Whether it is.", labels=["executor"])
    for one in backends:
        live.add_metric([one.url], one.live)
    return live


def _slots(backends: Sequence[Backend]) -> Metric:
    slots = GaugeMetricFamily(
        "headway_executor_slots", "Seats for sequences.", labels=["executor", "kind"]
    )
    for one in backends:
        slots.add_metric([one.url, "total"], one.slots_total)
        slots.add_metric([one.url, "acquired"], one.slots_acquired)
    return slots


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
            fleet = await fleet_text(await watch.data())
        except HeadwayError:
            fleet = b""
        return fleet + generate_latest(self._registry)


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
