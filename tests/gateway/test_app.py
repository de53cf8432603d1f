"""What stands around the routes: errors, settings, keys, health."""

import asyncio
from collections.abc import MutableMapping
from typing import Any

import httpx
import pytest
import structlog

from gateway_http.app import Health
from gateway_http.client import SchedulerClient
from gateway_http.settings import GatewaySettings
from headway.reasons import Reason
from headway.v1 import generation_pb2
from tests.gateway import tiny_model
from tests.gateway.conftest import serving, settings_for
from tests.gateway.scripted import ScriptedScheduler
from tests.gateway.scripted_runs import Run, failure

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
    assert "/openapi.json" in plain.json()["error"]
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
        {"scheduler_addresses": "localhost"},
        {"scheduler_addresses": "localhost:http"},
        {"scheduler_addresses": ":50051"},
        {"scheduler_addresses": "localhost:50051,localhost:70000"},
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
    health = Health(client, 1.0)
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
