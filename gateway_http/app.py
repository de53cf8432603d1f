"""The HTTP application: every route, and what stands around them."""

import asyncio
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from gateway_http import metrics, openai, openapi, tinker
from gateway_http.auth import Tenants
from gateway_http.client import SchedulerClient
from gateway_http.http_errors import json_response
from gateway_http.middleware import BodyLimit, ErrorTranslator
from gateway_http.monitor import routes as monitor
from gateway_http.settings import GatewaySettings
from headway.errors import HeadwayError


class Look:
    """A question to the scheduler, asked once in an interval at most; no answer is a no."""

    def __init__(self, ask: Callable[[], Awaitable[object]], interval_s: float) -> None:
        self._ask = ask
        self._interval_s = interval_s
        self._lock = asyncio.Lock()
        self._answer = False
        self._fresh_until = 0.0

    async def answer(self) -> bool:
        """As it was lately."""
        clock = asyncio.get_running_loop().time
        async with self._lock:
            if clock() >= self._fresh_until:
                try:
                    self._answer = bool(await self._ask())
                except HeadwayError:
                    self._answer = False
                self._fresh_until = clock() + self._interval_s
            return self._answer


class Health:
    """Whether work can be done, and whether more of it should be sent here."""

    def __init__(self, client: SchedulerClient, interval_s: float) -> None:
        self._client = client
        self._is_live = Look(client.list_models, interval_s)
        self._takes_work = Look(client.takes_work, interval_s)

    async def is_live(self) -> bool:
        """Whether any executor serves a model."""
        return await self._is_live.answer()

    async def health(self, request: Request) -> Response:
        """GET /health."""
        is_live = await self.is_live()
        return json_response(
            {"status": "ok" if is_live else "unavailable"}, 200 if is_live else 503
        )

    async def ready(self, request: Request) -> Response:
        """GET /ready."""
        reason = await self._why_not()
        is_ready = reason is None
        return json_response({"is_ready": is_ready, "reason": reason}, 200 if is_ready else 503)

    async def _why_not(self) -> str | None:
        """What stands in the way of a new request, if anything does."""
        if self._client.is_draining:
            return "gateway_draining"
        if not self._client.is_connected:
            return "no_scheduler"
        if not await self._takes_work.answer():
            return "scheduler_draining"
        return None if await self.is_live() else "no_executor"


class Application:
    """Everything that is served, as ASGI: errors are answered, bodies bounded, a route found.

    Starlette's own application would put two more layers around these, which do the same again.
    Its router tries one pattern after the other, so a path without parameters is looked up first.
    """

    def __init__(
        self, routes: list[Route], settings: GatewaySettings, counted: metrics.Metrics
    ) -> None:
        self.routes = routes
        # a slash too many is no redirect: that would build an address from the Host header
        self._router = Router(routes, redirect_slashes=False)
        self._by_path = {
            (method, route.path): route
            for route in routes
            for method in route.methods or ()
            if not route.param_convertors
        }
        bounded = BodyLimit(self._route, settings)
        self._served = ErrorTranslator(bounded, settings, counted.count, counted.count_cut)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        scope["app"] = self  # Starlette's routes answer by themselves where there is no application
        await self._served(scope, receive, send)

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._by_path.get((scope["method"], scope["path"]))
        if route is None:  # it has parameters, or there is no such route
            await self._router.app(scope, receive, send)
        else:
            scope["route"] = route
            await route.app(scope, receive, send)


def build_app(client: SchedulerClient, settings: GatewaySettings) -> Application:
    """The ASGI application; ``client`` must be running while it serves."""
    tenants = Tenants(settings)
    health = Health(client, settings.health_interval_s)
    watch = monitor.Watch(client, settings)
    guard = monitor.Guard(settings, tenants)
    counted = metrics.Metrics(client)

    routes = [
        *openai.routes(client, settings, tenants),
        *tinker.routes(client, settings, tenants),
        Route("/health", health.health, methods=["GET"]),
        Route("/health/", health.health, methods=["GET"]),
        Route("/ready", health.ready, methods=["GET"]),
        *openapi.routes(),
        *monitor.routes(watch, guard),
        *metrics.routes(counted, watch, guard),
    ]
    return Application(routes, settings, counted)
