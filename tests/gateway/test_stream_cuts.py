"""Clients that do not take their stream are cut off."""

import asyncio
import json

import httpx
import structlog
from starlette.types import Message

from gateway_http.app import build_app
from gateway_http.client import SchedulerClient
from headway.reasons import Reason
from tests.gateway import tiny_model
from tests.gateway.conftest import settings_for
from tests.gateway.scripted import WAIT_S, ScriptedScheduler
from tests.gateway.scripted_runs import failure, leave_alone

CHAT = {"model": tiny_model.NAME, "messages": [{"role": "user", "content": "Hi"}]}
PATH = "/v1/chat/completions"


async def test_a_client_that_takes_nothing_is_cut_off(
    client: SchedulerClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.script = leave_alone
    app = build_app(client, settings_for(scheduler, stream_write_timeout_s=0.05))
    body = json.dumps({**CHAT, "stream": True}).encode()
    inbox = [{"type": "http.request", "body": body, "more_body": False}]
    never = asyncio.Event()

    async def receive() -> Message:
        if not inbox:
            await never.wait()
        return inbox.pop()

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            await never.wait()

    connection = FullConnection()
    scope = {"type": "http", "method": "POST", "path": PATH, "headers": [], "query_string": b""}
    with structlog.testing.capture_logs() as logs:
        await app({**scope, "state": {"connection": connection}}, receive, send)
    assert connection.is_aborted
    await scheduler.until(lambda: len(scheduler.cancelled) == 1)
    cuts = [(line["cause"], line["is_resumable"]) for line in logs if line["event"] == "stream.cut"]
    assert cuts == [("stalled", False)]
    transport = httpx.ASGITransport(app, client=("127.0.0.1", 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        metrics = (await http.get("/metrics")).text
    assert f'headway_http_streams_cut_total{{cause="stalled",route="{PATH}"}} 1.0' in metrics


class FullConnection:
    """A transport whose client takes nothing."""

    is_aborted = False

    def get_write_buffer_size(self) -> int:
        return 1 << 16

    def abort(self) -> None:
        self.is_aborted = True


async def test_a_client_that_falls_behind_by_too_much_is_cut_off(
    client: SchedulerClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.script = leave_alone
    app = build_app(client, settings_for(scheduler, max_unread_tokens=100))
    options = {"stream": True, "logprobs": True, "top_logprobs": 4, "n": 2}
    body = json.dumps({**CHAT, **options}).encode()
    inbox = [{"type": "http.request", "body": body, "more_body": False}]
    never, is_stuck = asyncio.Event(), asyncio.Event()

    async def receive() -> Message:
        if not inbox:
            await never.wait()
        return inbox.pop()

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            is_stuck.set()
            await never.wait()

    scope = {"type": "http", "method": "POST", "path": PATH, "headers": [], "query_string": b""}
    connection = FullConnection()
    task = asyncio.create_task(app({**scope, "state": {"connection": connection}}, receive, send))
    await is_stuck.wait()
    run = await scheduler.run()
    for sample in range(2):  # five values a token
        run.emit([7] * 10, sample)
        scheduler.publish()
    run.emit([7])
    scheduler.publish()
    await task
    assert connection.is_aborted
    await scheduler.until(lambda: len(scheduler.cancelled) == 1)


async def test_an_error_for_a_client_that_takes_nothing_is_no_crash(
    client: SchedulerClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.script = leave_alone
    app = build_app(client, settings_for(scheduler, stream_write_timeout_s=0.05))
    body = json.dumps({**CHAT, "stream": True}).encode()
    inbox = [{"type": "http.request", "body": body, "more_body": False}]
    never, is_first = asyncio.Event(), True

    async def receive() -> Message:
        if not inbox:
            await never.wait()
        return inbox.pop()

    async def send(message: Message) -> None:
        nonlocal is_first
        if message["type"] == "http.response.body":
            if not is_first:
                await never.wait()
            is_first = False
            scheduler.runs[0].finish(failure(Reason.INTERNAL))
            scheduler.publish()

    scope = {"type": "http", "method": "POST", "path": PATH, "headers": [], "query_string": b""}
    with structlog.testing.capture_logs() as logs:
        await asyncio.wait_for(app({**scope, "state": {}}, receive, send), WAIT_S)
    assert "request.crashed" not in [line["event"] for line in logs]
