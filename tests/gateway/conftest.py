"""A scripted scheduler, a client connected to it, and the application on a real socket."""

import asyncio
import contextlib
import re
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from starlette.types import Scope

from gateway_http.__main__ import Server
from gateway_http.app import build_app
from gateway_http.client import SchedulerClient
from gateway_http.metrics import Metrics
from gateway_http.openapi import document
from gateway_http.settings import GatewaySettings
from headway.v1 import generation_pb2
from tests.gateway import tiny_model
from tests.gateway.scripted import ScriptedScheduler


@pytest.fixture(scope="session")
def documented() -> dict[tuple[str, str], set[int]]:
    """By method and route: the statuses in the OpenAPI document."""
    return {
        (method.upper(), path): set(map(int, operation["responses"]))
        for path, item in document()["paths"].items()
        for method, operation in item.items()
    }


@pytest.fixture(autouse=True)
def only_documented_answers(
    monkeypatch: pytest.MonkeyPatch, documented: dict[tuple[str, str], set[int]]
) -> Iterator[None]:
    """Whatever a test provokes, a route answers what the OpenAPI document lists for it."""
    answers = set()
    count = Metrics.count

    def noted(self: Metrics, scope: Scope, status: int) -> None:
        count(self, scope, status)
        if "route" in scope:
            path = re.sub(r":\w+}", "}", scope["route"].path)
            answers.add((scope["method"].replace("HEAD", "GET"), path, status))

    monkeypatch.setattr(Metrics, "count", noted)
    yield
    for method, path, status in answers:
        statuses = documented.get((method, path), {405})
        assert status in statuses, f"{method} {path} answered {status}"


@pytest.fixture
async def scheduler() -> AsyncIterator[ScriptedScheduler]:
    scheduler = ScriptedScheduler()  # type: ignore[abstract]
    scheduler.port = await scheduler.start()
    yield scheduler
    await scheduler.stop()


@pytest.fixture
def settings(scheduler: ScriptedScheduler) -> GatewaySettings:
    return settings_for(scheduler)


def settings_for(scheduler: ScriptedScheduler, **changes: Any) -> GatewaySettings:
    values: dict[str, Any] = {
        "scheduler_addresses": f"127.0.0.1:{scheduler.port}",
        "reconnect_backoff_min_ms": 1,
        "reconnect_backoff_max_ms": 20,
        "shutdown_grace_s": 1,
        "num_text_workers": 0,  # a process for each test would cost more than the test
        **changes,
    }
    return GatewaySettings(**values)


@pytest.fixture
async def client(settings: GatewaySettings) -> AsyncIterator[SchedulerClient]:
    client = SchedulerClient(settings)
    async with client.running():
        yield client


@contextlib.asynccontextmanager
async def serving(client: SchedulerClient, settings: GatewaySettings) -> AsyncIterator[str]:
    """The application on a free port; gives its base URL."""
    server = Server(client, settings)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        task = asyncio.create_task(server._serve([listener]))
        host, port = listener.getsockname()
        try:
            yield f"http://{host}:{port}"
        finally:
            server.should_exit = True
            await task


@pytest.fixture
async def base_url(client: SchedulerClient, settings: GatewaySettings) -> AsyncIterator[str]:
    async with serving(client, settings) as url:
        yield url


@pytest.fixture
async def http(base_url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=base_url, timeout=60) as http:
        yield http


@pytest.fixture
async def asgi(
    client: SchedulerClient, settings: GatewaySettings
) -> AsyncIterator[httpx.AsyncClient]:
    """The application without a socket: quicker, but nobody can hang up."""
    transport = httpx.ASGITransport(build_app(client, settings))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        yield http


def work(**fields: Any) -> generation_pb2.GenerationRequest:
    """A request for the tiny model."""
    return generation_pb2.GenerationRequest(
        model=tiny_model.NAME, prompt_token_ids=[1, 2, 3], **fields
    )
