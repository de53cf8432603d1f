"""How much a call may send, how slowly, and what its going away ends."""

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import pytest
import structlog
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message

from gateway_http.app import Health, build_app
from gateway_http.client import SchedulerClient
from gateway_http.http_protocol import Departure
from gateway_http.settings import GatewaySettings
from tests.gateway import tiny_model
from tests.gateway.conftest import serving, settings_for
from tests.gateway.scripted import ScriptedScheduler
from tests.gateway.scripted_runs import leave_alone

CHAT = {"model": tiny_model.NAME, "messages": [{"role": "user", "content": "Hi"}]}
PATH = "/v1/chat/completions"


def head_of_post(num_bytes: int) -> bytes:
    return (
        f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {num_bytes}\r\n\r\n".encode()
    )


async def chunks(num_bytes: int) -> AsyncIterator[bytes]:
    for _ in range(0, num_bytes, 1000):
        yield b" " * 1000


async def test_body_limits(client: SchedulerClient, scheduler: ScriptedScheduler) -> None:
    settings = settings_for(scheduler, max_openai_body_bytes=10_000)
    async with serving(client, settings) as url, httpx.AsyncClient(base_url=url) as http:
        announced = await http.post(PATH, content=b" " * 10_001)
        chunked = await http.post(PATH, content=chunks(20_000))
        for response in (announced, chunked):
            assert response.status_code == 413
            assert response.json()["error"]["code"] == "body_too_large"
        response = await http.post(PATH, json=CHAT, headers={"X-Long": "x" * 40_000})
        assert response.status_code == 200
    async with serving(client, settings_for(scheduler, body_timeout_s=0.05)) as url:
        reader, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
        writer.write(head_of_post(10) + b"{")
        assert b"400 Bad Request" in await reader.readline()
        writer.close()
        await writer.wait_closed()
    settings = settings_for(scheduler, max_body_bytes=10_000, max_body_values=100)
    async with serving(client, settings) as url, httpx.AsyncClient(base_url=url) as http:
        large = await http.post("/api/v1/asample", content=b" " * 10_001)
        assert large.status_code == 413
        for path in (PATH, "/api/v1/asample"):
            body = b'{"prompt": [' + b"1," * 101
            response = await http.post(path, content=body)
            assert (response.status_code, response.headers["x-should-retry"]) == (413, "false")
    settings = settings_for(scheduler, max_total_body_bytes=100)
    async with serving(client, settings) as url, httpx.AsyncClient(base_url=url) as http:
        response = await http.post(PATH, content=b" " * 101)
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert response.headers["x-should-retry"] == "true"


async def test_a_body_may_not_drip(client: SchedulerClient, scheduler: ScriptedScheduler) -> None:
    settings = settings_for(scheduler, body_timeout_s=0.2, min_body_bytes_per_s=10**6)
    async with serving(client, settings) as url:
        reader, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
        writer.write(head_of_post(10_000))
        status = asyncio.create_task(reader.readline())
        while not status.done():  # always a little, never enough
            writer.write(b" ")
            await asyncio.wait([status], timeout=0.02)
        assert b"400 Bad Request" in status.result()
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("path", [PATH, "/api/v1/asample", "/api/v1/telemetry"])
async def test_a_hang_up_in_the_middle_of_a_body_is_no_crash(
    client: SchedulerClient, settings: GatewaySettings, path: str
) -> None:
    app = build_app(client, settings)
    messages = [{"type": "http.request", "body": b"{", "more_body": True}]
    sent: list[Message] = []

    async def receive() -> Message:
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b""}
    with structlog.testing.capture_logs() as logs:
        await app({**scope, "state": {}}, receive, send)
    assert "request.crashed" not in [line["event"] for line in logs]
    assert sent == []


async def raw(url: str, *parts: bytes) -> bytes:
    """Send the parts one by one, and read until the server closes."""
    reader, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
    for part in parts:
        writer.write(part)
        await writer.drain()
    answer = await reader.read()
    writer.close()
    return answer


async def test_header_limits(client: SchedulerClient, scheduler: ScriptedScheduler) -> None:
    async with serving(client, settings_for(scheduler, header_timeout_s=0.2)) as url:
        assert await raw(url, b"GET /v1/models HTTP/1.1\r\nX-Slow: ") == b""
        assert await raw(url) == b""
    settings = settings_for(scheduler, max_header_bytes=500)
    async with serving(client, settings) as url, httpx.AsyncClient(base_url=url) as http:
        assert await raw(url, b"GET /v1/models HTTP/1.1\r\nX-Long: " + b"x" * 600) == b""
        assert (await raw(url, b"nonsense\r\n\r\n")).startswith(b"HTTP/1.1 400")
        assert (await http.get("/v1/models")).status_code == 200
        assert (await http.get("/v1/models")).status_code == 200


async def test_a_pipelined_request_ends_the_connection_and_its_work(
    client: SchedulerClient, scheduler: ScriptedScheduler, settings: GatewaySettings
) -> None:
    scheduler.script = leave_alone
    body = json.dumps(CHAT).encode()
    head = head_of_post(len(body))
    async with serving(client, settings) as url:
        first = asyncio.create_task(raw(url, head + body + head + body))
        assert await first == b""
    await scheduler.until(lambda: len(scheduler.cancelled) == len(scheduler.runs))


@pytest.mark.parametrize("padding", [0, 300_000])  # reading pauses for more than 64 KiB
async def test_a_client_that_hangs_up_ends_its_work(
    client: SchedulerClient, scheduler: ScriptedScheduler, settings: GatewaySettings, padding: int
) -> None:
    scheduler.script = leave_alone
    body = json.dumps(CHAT).encode() + b" " * padding
    async with serving(client, settings) as url:
        _, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
        writer.write(head_of_post(len(body)) + body)
        await scheduler.until(lambda: len(scheduler.runs) == 1)
        writer.close()
        await scheduler.until(lambda: len(scheduler.cancelled) == 1)


def test_a_departure_is_told_once_however_early_it_was() -> None:
    told: list[str] = []
    early, late, unheard = Departure(), Departure(), Departure()
    early.happen()
    early.listen(lambda: told.append("early"))
    late.listen(lambda: told.append("late"))
    late.happen()
    late.happen()
    unheard.listen(lambda: told.append("unheard"))
    unheard.ignore()
    unheard.happen()
    assert told == ["early", "late"]


async def test_every_connection_can_be_cut(
    client: SchedulerClient, settings: GatewaySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def cut(self: Health, request: Request) -> Response:
        request.scope["state"]["connection"].abort()
        return Response()

    monkeypatch.setattr(Health, "ready", cut)
    async with serving(client, settings) as url:
        assert await raw(url, b"GET /ready HTTP/1.1\r\nHost: localhost\r\n\r\n") == b""
