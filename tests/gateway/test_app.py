"""What stands around the routes: keys, limits, errors, health, and the process itself."""

import asyncio
import contextlib
import json
import re
import signal
import sys
from collections.abc import AsyncIterator, MutableMapping
from typing import Any

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
from headway.reasons import Reason
from headway.v1 import generation_pb2
from tests.gateway import tiny_model
from tests.gateway.conftest import serving, settings_for
from tests.gateway.scripted import WAIT_S, Run, ScriptedScheduler, failure, leave_alone

CHAT = {"model": tiny_model.NAME, "messages": [{"role": "user", "content": "Hi"}]}
PATH = "/v1/chat/completions"
SIGNING_KEY = "a signing key for tests"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b'"text"',
        b"\xff\xfe",
        b'{"model": "m", "temperature": NaN}',
        b'{"model": "m", "temperature": Infinity}',
        b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
        b'{"messages": ' + b"[" * 100_000,
        b'{"user": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model": "m", "messages": ' + b'[{"content":' * 10_000 + b"}]" * 10_000 + b"}",
        b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "m", "messages": [{"role": "user", "content": "\xed\xa0\x80"}]}',
        b'{"model": "m", "messages": [{"role": "user", "content": "\x00"}]}',
        b'{"\\udfff": 1}',
        b'{"model": "m", "logit_bias": ' + b"1" * 5_000 + b"}",
        b'{"model": "m", "seed": ' + b"1" * 5_000 + b"}",
        b"{" + b",".join(b'"%d": null' % number for number in range(300)) + b"}",
    ],
)
async def test_bodies_that_are_no_request(http: httpx.AsyncClient, body: bytes) -> None:
    response = await http.post(PATH, content=body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert int(response.headers["content-length"]) == len(response.content) > 0


async def test_unknown_paths_and_methods_answer_in_the_style_of_their_place(
    http: httpx.AsyncClient,
) -> None:
    openai = await http.get("/v1/nothing")
    assert (openai.status_code, openai.json()["error"]["type"]) == (404, "invalid_request_error")
    tinker = await http.get("/api/v1/nothing")
    assert tinker.status_code == 404
    assert tinker.json()["detail"] == tinker.json()["error"]
    plain = await http.get("/nothing")
    assert (plain.status_code, plain.json()["code"]) == (404, "REQUEST_NOT_FOUND")
    assert plain.json()["error"] == "There is no such path here."
    slash = await http.post(f"{PATH}/", json=CHAT, headers={"Host": "elsewhere.localhost"})
    assert (slash.status_code, slash.headers.get("location")) == (404, None)
    method = await http.get(PATH)
    assert method.status_code == 405
    assert method.json()["error"]["message"] == "Method Not Allowed"
    for response in (openai, tinker, plain, method):
        assert int(response.headers["content-length"]) == len(response.content)
        assert response.headers["x-should-retry"] == "false"


async def test_a_path_that_is_spelled_like_a_route_is_none(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    """Routes with parameters are patterns, however a path reads."""
    for path in ("/v1/models/{name:path}", "/v1/requests/{request_id}/events"):
        response = await http.get(path)
        assert response.status_code in (400, 404), response.text
    assert (await http.get("/v1/models/" + tiny_model.NAME)).status_code == 200


@pytest.mark.parametrize("headers", [{}, {"x-request-id": "mine"}])
async def test_unknown_exceptions_tell_nothing_but_their_name_in_the_log(
    client: SchedulerClient,
    asgi: httpx.AsyncClient,
    monkeypatch: pytest.MonkeyPatch,
    headers: dict[str, str],
) -> None:
    async def crash(name: str) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(client, "model", crash)
    with structlog.testing.capture_logs() as logs:
        response = await asgi.post(PATH, json=CHAT, headers=headers)
    assert response.status_code == 500
    own_id = response.headers["x-request-id"]
    assert own_id == "mine" or not headers
    assert own_id in response.json()["error"]["message"]
    (line,) = [line for line in logs if line["event"] == "request.crashed"]
    assert (line["request_id"], str(line["exc_info"])) == (own_id, "secret")
    assert "secret" not in response.text
    assert "Traceback" not in response.text
    assert response.json()["error"]["code"] == "internal"


async def test_a_cancellation_that_nobody_asked_for_is_a_crash(
    client: SchedulerClient, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def crash(name: str) -> None:
        raise asyncio.CancelledError

    monkeypatch.setattr(client, "model", crash)
    with structlog.testing.capture_logs() as logs:
        response = await http.post(PATH, json=CHAT)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal"
    assert "request.crashed" in [line["event"] for line in logs]


async def test_whoever_the_server_waits_for_no_longer_is_told_so(
    client: SchedulerClient, asgi: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def be_cancelled(name: str) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)

    monkeypatch.setattr(client, "model", be_cancelled)
    response = await asgi.post(PATH, json=CHAT)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "draining"


@pytest.mark.parametrize("headers", [{}, {"x-request-id": "mine"}])
@pytest.mark.parametrize("is_streaming", [False, True])
async def test_a_failure_of_ours_is_logged_and_others_are_not(
    asgi: httpx.AsyncClient,
    scheduler: ScriptedScheduler,
    is_streaming: bool,
    headers: dict[str, str],
) -> None:
    async def ask(reason: Reason) -> list[MutableMapping[str, Any]]:
        def fail(run: Run) -> None:
            run.emit([1])
            run.finish(failure(reason))

        scheduler.script = fail
        with structlog.testing.capture_logs() as logs:
            await asgi.post(PATH, json={**CHAT, "stream": is_streaming}, headers=headers)
        return [line for line in logs if line["event"] == "request.failed"]

    (line,) = await ask(Reason.ATTEMPTS_EXHAUSTED)
    assert (line["path"], line["reason"]) == (PATH, Reason.ATTEMPTS_EXHAUSTED)
    assert await ask(Reason.EXECUTION_TIMEOUT) == []


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


@pytest.mark.parametrize(
    "values",
    [
        {"host": "0.0.0.0"},
        {"api_keys": "nokey"},
        {"api_keys": "a=key,b=key", "signing_key": SIGNING_KEY},
        {"api_keys": "a=schlüssel", "signing_key": SIGNING_KEY},
        {"signing_key": "", "api_keys": "team=key"},
        {"signing_key": "too short", "api_keys": "team=key"},
        {"scheduler_addresses": ""},
        {"tinker_hold_s": 41},
        {"port": 70_000},
        {"max_inflight": 0},
    ],
)
def test_senseless_settings_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        GatewaySettings(**values)


async def test_keys_are_asked_for_everywhere_but_at_health(
    client: SchedulerClient, scheduler: ScriptedScheduler
) -> None:
    settings = settings_for(scheduler, api_keys="team=key", signing_key=SIGNING_KEY)
    async with serving(client, settings) as url, httpx.AsyncClient(base_url=url) as http:
        for method, path in (("GET", "/v1/models"), ("GET", "/v1/models/x"), ("POST", PATH)):
            response = await http.request(method, path, json=CHAT, headers={"Host": "localhost"})
            assert response.status_code == 401
            assert response.json()["error"]["type"] == "authentication_error"
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"].startswith("Bearer")
        for path in ("/health", "/health/", "/ready"):
            assert (await http.get(path)).status_code == 200
        response = await http.post(PATH, json=CHAT, headers={"Authorization": "Bearer key"})
        assert response.status_code == 200
        assert scheduler.runs[0].request.tenant == "team"


@pytest.mark.parametrize(("has_models", "status"), [(True, 200), (False, 503)])
async def test_health_is_the_fleets(
    scheduler: ScriptedScheduler, asgi: httpx.AsyncClient, has_models: bool, status: int
) -> None:
    if not has_models:
        scheduler.models = []
    assert (await asgi.get("/health")).status_code == status
    ready = await asgi.get("/ready")
    assert ready.status_code == status
    assert ready.json()["reason"] == (None if has_models else "no_executor")


async def test_many_who_ask_for_health_are_one_call(client: SchedulerClient) -> None:
    num_calls = 0
    list_models = client.list_models

    async def count() -> list[generation_pb2.ModelCard]:
        nonlocal num_calls
        num_calls += 1
        return await list_models()

    client.list_models = count  # type: ignore[method-assign]
    health = Health(client)
    assert await asyncio.gather(*(health.is_live() for _ in range(20))) == [True] * 20
    assert num_calls == 1


async def test_a_gateway_that_shuts_down_is_alive_and_not_ready(
    client: SchedulerClient, asgi: httpx.AsyncClient
) -> None:
    assert (await asgi.post(PATH, json=CHAT)).status_code == 200  # so it is connected
    assert (await asgi.get("/ready")).json() == {"is_ready": True, "reason": None}
    client.drain()
    assert (await asgi.get("/health")).status_code == 200
    ready = await asgi.get("/ready")
    assert (ready.status_code, ready.json()["reason"]) == (503, "gateway_draining")


async def test_while_its_scheduler_shuts_down_it_is_alive_and_not_ready(
    scheduler: ScriptedScheduler, asgi: httpx.AsyncClient
) -> None:
    assert (await asgi.post(PATH, json=CHAT)).status_code == 200
    await scheduler.close_door()
    ready = await asgi.get("/ready")
    assert (ready.status_code, ready.json()) == (
        503,
        {"is_ready": False, "reason": "scheduler_draining"},
    )
    assert (await asgi.get("/health")).status_code == 200


async def test_without_a_scheduler_every_answer_comes_soon() -> None:
    settings = GatewaySettings(
        scheduler_addresses="127.0.0.1:1", unary_timeout_s=0.05, shutdown_grace_s=1
    )
    client = SchedulerClient(settings)
    async with (
        client.running(),
        serving(client, settings) as url,
        httpx.AsyncClient(base_url=url) as http,
    ):
        for path in ("/health", "/ready", "/v1/models"):
            assert (await http.get(path)).status_code == 503
        assert (await http.get("/ready")).json()["reason"] == "no_scheduler"
        response = await http.post(PATH, json=CHAT)
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "no_capacity"
        assert response.headers["retry-after"] == "1"


@contextlib.asynccontextmanager
async def gateway_process(
    scheduler: ScriptedScheduler, *arguments: str
) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """A real process that has started, and its base URL."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "gateway_http", "--shutdown-grace-s", "0.5", "--num-text-workers", "0"),
        *("--scheduler-addresses", f"127.0.0.1:{scheduler.port}", *arguments),
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        async for text in process.stderr:
            line = json.loads(text)
            if line["event"] == "server.started":
                break
        yield process, f"http://{line['host']}:{line['port']}"
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def events_to_the_end(process: asyncio.subprocess.Process) -> list[str]:
    assert process.stderr is not None
    return [json.loads(line)["event"] async for line in process.stderr]


async def test_the_process_drains_on_sigterm(scheduler: ScriptedScheduler) -> None:
    scheduler.script = leave_alone
    async with (
        gateway_process(scheduler, "--port", "0") as (process, url),
        httpx.AsyncClient(base_url=url, timeout=60) as http,
    ):
        assert (await http.get("/openapi.json")).status_code == 200  # leaves an idle connection
        body = {**CHAT, "stream": True}
        async with http.stream("POST", PATH, json=body) as response:
            assert response.status_code == 200
            process.send_signal(signal.SIGTERM)
            text = (await response.aread()).decode()
        last = json.loads(text.strip().splitlines()[-1].removeprefix("data: "))
        assert last["error"]["code"] == "draining"
        await scheduler.until(lambda: len(scheduler.cancelled) == 1)
        rest = await events_to_the_end(process)
        assert await process.wait() == 0
        assert rest[-1] == "server.stopped"


async def test_a_stream_that_ends_within_the_grace_ends_well(scheduler: ScriptedScheduler) -> None:
    scheduler.script = leave_alone
    async with (
        gateway_process(scheduler, "--port", "0", "--shutdown-grace-s", "20") as (process, url),
        httpx.AsyncClient(base_url=url, timeout=60) as http,
    ):
        async with http.stream("POST", PATH, json={**CHAT, "stream": True}) as response:
            process.send_signal(signal.SIGTERM)
            assert "server.draining" in await first_event(process)
            run = scheduler.runs[0]
            run.emit(tiny_model.encode("Late"))
            run.end()
            run.finish()
            scheduler.publish()
            text = (await response.aread()).decode()
        assert text.endswith("data: [DONE]\n\n")
        assert await process.wait() == 0


async def first_event(process: asyncio.subprocess.Process) -> str:
    """The next line of the log that tells of the shutdown."""
    assert process.stderr is not None
    async for line in process.stderr:
        if b"server." in line:
            return str(json.loads(line)["event"])
    raise AssertionError("it ended without a word")


async def test_processes_share_a_port_and_one_may_go(scheduler: ScriptedScheduler) -> None:
    async with gateway_process(scheduler, "--port", "0", "--reuse-port") as (first, url):
        port = url.rpartition(":")[2]
        async with gateway_process(scheduler, "--port", port, "--reuse-port") as (second, _):
            answered: set[str] = set()
            while len(answered) < 2:  # which of both answers is the kernel's choice
                async with httpx.AsyncClient(base_url=url) as http:
                    text = (await http.get("/metrics")).text
                    start = re.search(r"^process_start_time_seconds (.*)$", text, re.MULTILINE)
                    assert start
                    answered.add(start[1])
            second.terminate()
            assert await second.wait() == 0
        for _ in range(10):
            async with httpx.AsyncClient(base_url=url) as http:
                assert (await http.get("/health")).status_code == 200
        assert first.returncode is None


async def test_every_connection_can_be_cut(
    client: SchedulerClient, settings: GatewaySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def cut(self: Health, request: Request) -> Response:
        request.scope["state"]["connection"].abort()
        return Response()

    monkeypatch.setattr(Health, "ready", cut)
    async with serving(client, settings) as url:
        assert await raw(url, b"GET /ready HTTP/1.1\r\nHost: localhost\r\n\r\n") == b""
