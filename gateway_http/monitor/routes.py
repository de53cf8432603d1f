"""/monitor and /monitor/data: who may see them, and one look at the scheduler for all who do.

The page is public where there is a monitor at all: it holds nothing. Its data are for callers on
this machine, or for keys with the scope monitor, which the page asks for and sends as a header, so
that no other site can. It loads nothing from anywhere; its policy names its script by its hash.
"""

import asyncio
import base64
import hashlib
import ipaddress
import re
from importlib.resources import files

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway_http.auth import Tenants
from gateway_http.client import SchedulerClient
from gateway_http.http_errors import no_such_path
from gateway_http.http_head import is_local_host
from gateway_http.keys import Scope
from gateway_http.monitor.data import MonitorData, view
from gateway_http.settings import GatewaySettings
from headway.errors import HeadwayError
from headway.reasons import Reason

_PROXY_HEADERS = ("forwarded", "x-forwarded-for", "x-forwarded-host", "via")
_NO_STORE = {"cache-control": "no-store", "x-content-type-options": "nosniff"}


class Watch:
    """The scheduler's state, at most ``monitor_interval_s`` old, asked for once at a time."""

    def __init__(self, client: SchedulerClient, settings: GatewaySettings) -> None:
        self._client = client
        self._interval_s = settings.monitor_interval_s
        self._lock = asyncio.Lock()
        self._data: MonitorData | None = None
        self._json: bytes | None = None  # of the data
        self._fresh_until = 0.0

    async def data(self) -> MonitorData:
        """Raises NO_CAPACITY while no scheduler answers."""
        clock = asyncio.get_running_loop().time
        async with self._lock:
            if self._data is None or clock() >= self._fresh_until:
                self._data = await view(await self._client.snapshot())
                self._json = None
                self._fresh_until = clock() + self._interval_s
            return self._data

    async def json(self) -> bytes:
        """The same, encoded once for all who look."""
        data = await self.data()
        if self._json is None:
            self._json = msgspec.json.encode(data)
        return self._json


class Guard:
    """Who may see what operators see."""

    def __init__(self, settings: GatewaySettings, tenants: Tenants) -> None:
        self._mode = settings.monitor
        self._tenants = tenants

    def check_exists(self) -> None:
        """Raises REQUEST_NOT_FOUND where there is no monitor."""
        if self._mode == "off":
            raise no_such_path()

    def check(self, request: Request) -> None:
        """Raises REQUEST_NOT_FOUND, PERMISSION_DENIED or UNAUTHENTICATED."""
        self.check_exists()
        if self._mode == "key":
            self._tenants.caller(request, Scope.MONITOR)
        elif not _is_from_here(request):
            message = "The monitor is for this machine only; see the setting monitor."
            raise HeadwayError(Reason.PERMISSION_DENIED, message)


def _is_from_here(request: Request) -> bool:
    """A caller on this machine, by no proxy's hand and by no name that a browser was led to."""
    client = request.client
    return (
        client is not None
        and ipaddress.ip_address(client.host).is_loopback
        and not any(name in request.headers for name in _PROXY_HEADERS)
        and is_local_host(request.headers.get("host", "").encode("latin-1"))
    )


def routes(watch: Watch, guard: Guard) -> list[Route]:
    """Page and data, with and without a slash behind them."""
    page = files("gateway_http.monitor").joinpath("page.html").read_bytes()
    headers = {**_NO_STORE, "content-security-policy": _policy(page), "x-frame-options": "DENY"}

    async def show(request: Request) -> Response:
        guard.check_exists()
        return Response(page, headers=headers, media_type="text/html; charset=utf-8")

    async def data(request: Request) -> Response:
        guard.check(request)
        return Response(await watch.json(), headers=_NO_STORE, media_type="application/json")

    return [
        Route("/monitor", show, methods=["GET"]),
        Route("/monitor/", show, methods=["GET"]),
        Route("/monitor/data", data, methods=["GET"]),
        Route("/monitor/data/", data, methods=["GET"]),
    ]


def _policy(page: bytes) -> str:
    """Nothing but the page's own script and style, and calls back to where it came from."""
    rules = ["default-src 'none'", "connect-src 'self'", "base-uri 'none'", "form-action 'none'"]
    rules.append("frame-ancestors 'none'")
    for tag, directive in ((b"script", "script-src"), (b"style", "style-src")):
        found = re.search(rb"<%b>(.*?)</%b>" % (tag, tag), page, re.DOTALL)
        assert found, f"the page has no {tag.decode()}"
        digest = base64.b64encode(hashlib.sha256(found[1]).digest()).decode()
        rules.append(f"{directive} 'sha256-{digest}'")
    return "; ".join(rules)
