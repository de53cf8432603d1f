"""Clients that do not take their stream are cut off."""

import asyncio
import json
from typing import Any

import httpx
import structlog
from starlette.types import ASGIApp, Message

from gateway_http.app import build_app
from gateway_http.client import SchedulerClient
from headway.reasons import Reason
from tests.gateway import tiny_model
from tests.gateway.conftest import settings_for
from tests.gateway.scripted import WAIT_S, ScriptedScheduler
from tests.gateway.scripted_runs import failure, leave_alone

CHAT = {"model": tiny_model.NAME, "messages": [{"role": "user", "content": "Hi"}]}
PATH = "/v1/chat/completions"


class FullConnection:
    """A transport whose client takes nothing."""

    is_aborted = False

    def get_write_buffer_size(self) -> int:
        return 1 << 16

    def abort(self) -> None:
        self.is_aborted = True


class StuckClient:
    """Asks for a streamed chat, and takes so many parts of the answer."""

    def __init__(self, num_taken: int = 0, **options: Any) -> None:
        body = json.dumps({**CHAT, "stream": True, **options}).encode()
        self._inbox = [{"type": "http.request", "body": body, "more_body": False}]
        self._num_left = num_taken
        self._never = asyncio.Event()
        self.has_taken, self.is_stuck = asyncio.Event(), asyncio.Event()

    async def call(self, app: ASGIApp, **state: object) -> None:
        scope = {"type": "http", "method": "POST", "path": PATH, "headers": [], "query_string": b""}
        await app({**scope, "state": state}, self._receive, self._send)

    async def _receive(self) -> Message:
        if not self._inbox:
            await self._never.wait()
        return self._inbox.pop()

    async def _send(self, message: Message) -> None:
        if message["type"] != "http.response.body":
            return
        if not self._num_left:
            self.is_stuck.set()
            await self._never.wait()
        self._num_left -= 1
        self.has_taken.set()


async def test_a_client_that_takes_nothing_is_cut_off(
    client: SchedulerClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.script = leave_alone
    app = build_app(client, settings_for(scheduler, stream_write_timeout_s=0.05))
    connection = FullConnection()
    with structlog.testing.capture_logs() as logs:
        await StuckClient().call(app, connection=connection)
    assert connection.is_aborted
    await scheduler.until(lambda: len(scheduler.cancelled) == 1)
    cuts = [(line["cause"], line["is_resumable"]) for line in logs if line["event"] == "stream.cut"]
    assert cuts == [("stalled", False)]
    transport = httpx.ASGITransport(app, client=("127.0.0.1", 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        metrics = (await http.get("/metrics")).text
    assert f'headway_http_streams_cut_total{{cause="stalled",route="{PATH}"}} 1.0' in metrics


async def test_a_client_that_falls_behind_by_too_much_is_cut_off(
    client: SchedulerClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.script = leave_alone
    app = build_app(client, settings_for(scheduler, max_unread_tokens=100))
    connection = FullConnection()
    stuck = StuckClient(logprobs=True, top_logprobs=4, n=2)
    task = asyncio.create_task(stuck.call(app, connection=connection))
    await stuck.is_stuck.wait()
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
    stuck = StuckClient(num_taken=1)
    with structlog.testing.capture_logs() as logs:
        task = asyncio.create_task(stuck.call(app))
        await stuck.has_taken.wait()
        scheduler.runs[0].finish(failure(Reason.INTERNAL))
        scheduler.publish()
        await asyncio.wait_for(task, WAIT_S)
    assert stuck.is_stuck.is_set()
    assert "request.crashed" not in [line["event"] for line in logs]
