"""The OpenAPI document lists the failures that an endpoint can have: each is provoked here."""

import asyncio
import re
from collections import defaultdict
from typing import Any

import httpx
import pytest
import structlog

from gateway_http.app import build_app
from gateway_http.client import SchedulerClient
from gateway_http.middleware import BodyLimit
from gateway_http.openai_choice import ReplySpec
from gateway_http.openapi import document
from gateway_http.settings import GatewaySettings
from headway.errors import TABLE
from headway.reasons import Reason
from tests.gateway import tiny_model
from tests.gateway.conftest import serving, settings_for
from tests.gateway.scripted import ScriptedScheduler
from tests.gateway.scripted_runs import Run, failure, leave_alone

Statuses = defaultdict[tuple[str, str], set[int]]
SIGNING_KEY = "a signing key for tests"
DOCUMENT = document()
OPERATIONS = [(method, path) for path, item in DOCUMENT["paths"].items() for method in item]
MODEL = tiny_model.NAME
COMPLETION = {"model": MODEL, "prompt": "Hi"}
GENERATING: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]},
    "/v1/completions": COMPLETION,
    "/v1/responses": {"model": MODEL, "input": "Hi"},
}
SAMPLE: dict[str, Any] = {
    "base_model": MODEL,
    "prompt": {"chunks": [{"tokens": [1]}]},
    "sampling_params": {"max_tokens": 1},
}
SUBMITTED = {**GENERATING, "/api/v1/asample": SAMPLE}
REFUSALS = (
    Reason.PROMPT_TOO_LONG,
    Reason.MODEL_NOT_FOUND,
    Reason.REQUEST_ID_CONFLICT,
    Reason.QUEUE_FULL,
    Reason.QUOTA_EXCEEDED,
    Reason.DEADLINE_UNREACHABLE,
)
ENDS = (
    Reason.RESULT_EXPIRED,
    Reason.CANCELLED,
    Reason.QUEUE_TIMEOUT,
    Reason.EXECUTION_TIMEOUT,
    Reason.ATTEMPTS_EXHAUSTED,
)
STATE = {"x-headway-resume": ReplySpec(kind="chat", model=MODEL, created=1).encode()}
EVENTS = "/v1/requests/{request_id}/events"
# what is named there is not known here
UNKNOWN: dict[tuple[str, str], dict[str, Any]] = {
    ("get", EVENTS): {"headers": STATE},
    ("get", "/v1/models/{name}"): {},
    ("post", "/tokenize"): {"json": {"model": "none", "prompt": "x"}},
    ("post", "/detokenize"): {"json": {"model": "none", "tokens": [1]}},
    ("post", "/api/v1/create_sampling_session"): {
        "json": {"session_id": "s", "sampling_session_seq_id": 0, "base_model": "none"}
    },
    ("post", "/api/v1/join_sampling_session"): {"json": {"sampling_session_id": "some"}},
    ("get", "/api/v1/samplers/{sampling_session_id}"): {},
    ("post", "/api/v1/asample"): {"json": {**SAMPLE, "sampling_session_id": "a", "seq_id": 0}},
    ("post", "/api/v1/retrieve_future"): {"json": {"request_id": "some"}},
    ("post", "/api/v1/retrieve_futures"): {"json": {"target": {"sampling_session_id": "some"}}},
}
HOSTILE = {
    "Content-Length: 0": 400,
    "Host: elsewhere.example": 403,
    f"Host: localhost\r\nContent-Length: {10**12}": 413,
}


@pytest.fixture
def seen() -> Statuses:
    return defaultdict(set)


async def ask(
    http: httpx.AsyncClient, seen: Statuses, method: str, path: str, **more: Any
) -> httpx.Response:
    response = await http.request(method, re.sub(r"{\w+}", "some", path), **more)
    seen[method, path].add(response.status_code)
    return response


async def provoke_the_door(url: str, seen: Statuses, heads: dict[str, int]) -> None:
    """Before any endpoint has its say."""
    address = httpx.URL(url)
    for method, path in OPERATIONS:
        for head, status in heads.items():
            reader, writer = await asyncio.open_connection(address.host, address.port)
            target = re.sub(r"{\w+}", "some", path)
            writer.write(f"{method.upper()} {target} HTTP/1.1\r\n{head}\r\n\r\n".encode())
            line = await reader.readline()
            writer.close()
            await writer.wait_closed()
            assert int(line.split()[1]) == status, (path, head)
            seen[method, path].add(status)


async def provoke_crowds_and_crashes(
    scheduler: ScriptedScheduler, seen: Statuses, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(scheduler, max_connections=1)
    client = SchedulerClient(settings)
    async with client.running(), serving(client, settings) as url:
        address = httpx.URL(url)
        _, writer = await asyncio.open_connection(address.host, address.port)
        await provoke_the_door(url, seen, {"Host: localhost": 503})
        writer.close()
        await writer.wait_closed()

    async def crash(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(BodyLimit, "__call__", crash)
    with structlog.testing.capture_logs():
        async with asgi_client(client, settings) as http:
            for method, path in OPERATIONS:
                await ask(http, seen, method, path)
    monkeypatch.undo()


async def provoke_guards(
    client: SchedulerClient, scheduler: ScriptedScheduler, seen: Statuses
) -> None:
    """No key, and no monitor."""
    settings = settings_for(scheduler, api_keys="team=key", signing_key=SIGNING_KEY, monitor="key")
    async with asgi_client(client, settings) as http:
        for method, path in OPERATIONS:
            response = await http.request(method, re.sub(r"{\w+}", "some", path))
            if response.status_code == 401:
                seen[method, path].add(401)
    async with asgi_client(client, settings_for(scheduler, monitor="off")) as http:
        for path in ("/monitor", "/monitor/", "/monitor/data", "/monitor/data/", "/metrics"):
            await ask(http, seen, "get", path)


async def provoke_the_scheduler(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler, seen: Statuses
) -> None:
    for call, more in UNKNOWN.items():
        assert (await ask(http, seen, *call, **more)).status_code == 404, call
    for path, body in SUBMITTED.items():
        for reason in REFUSALS:
            scheduler.refusal = failure(reason)
            response = await ask(http, seen, "post", path, json=body)
            assert response.status_code == TABLE[reason].http_status, (path, reason)
    scheduler.refusal = failure(Reason.QUOTA_EXCEEDED)
    await ask(http, seen, "get", EVENTS, headers=STATE)
    scheduler.refusal = None
    for path, body in GENERATING.items():
        for reason in ENDS:

            def end(run: Run, reason: Reason = reason) -> None:
                run.finish(failure(reason))

            scheduler.script = end
            response = await ask(http, seen, "post", path, json=body)
            assert response.status_code == TABLE[reason].http_status, (path, reason)
    scheduler.script = leave_alone
    await http.post("/api/v1/asample", json=SAMPLE)
    held = {"x-tinker-request-type": "Sample", "x-stainless-read-timeout": "0.01"}
    for name in (scheduler.runs[-1].request_id, "gone"):
        path = "/api/v1/retrieve_future"
        await ask(http, seen, "post", path, json={"request_id": name}, headers=held)
    place = {**STATE, "Last-Event-ID": "another:1"}
    where = EVENTS.replace("{request_id}", scheduler.runs[-1].request_id)
    seen["get", EVENTS].add((await http.get(where, headers=place)).status_code)


def asgi_client(client: SchedulerClient, settings: GatewaySettings) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(build_app(client, settings), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


async def test_each_failure_that_is_listed_can_be_had_and_no_other(
    client: SchedulerClient,
    scheduler: ScriptedScheduler,
    base_url: str,
    http: httpx.AsyncClient,
    seen: Statuses,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await provoke_the_door(base_url, seen, HOSTILE)
    await provoke_crowds_and_crashes(scheduler, seen, monkeypatch)
    await provoke_guards(client, scheduler, seen)
    await provoke_the_scheduler(http, scheduler, seen)
    for method, path in OPERATIONS:
        listed = set(map(int, DOCUMENT["paths"][path][method]["responses"])) - {200}
        assert seen[method, path] - {200} == listed, (method, path)


def test_a_failure_is_described_by_its_rows() -> None:
    answers = DOCUMENT["paths"]["/v1/completions"]["post"]["responses"]
    assert answers["429"]["description"] == "QUEUE_FULL, QUOTA_EXCEEDED, DEADLINE_UNREACHABLE"
    assert answers["429"]["headers"]["retry-after"]["required"]
    assert "retry-after" not in answers["400"]["headers"]
    assert DOCUMENT["paths"]["/v1/models"]["get"]["responses"]["400"]["description"] == (
        "INVALID_REQUEST"
    )
    unwell = DOCUMENT["paths"]["/health"]["get"]["responses"]["503"]
    assert [
        one["$ref"].rpartition("/")[2]
        for one in unwell["content"]["application/json"]["schema"]["anyOf"]
    ] == ["Health", "PlainError"]


def test_every_row_of_the_table_is_somewhere() -> None:
    described = {
        reason
        for method, path in OPERATIONS
        for answer in DOCUMENT["paths"][path][method]["responses"].values()
        for reason in answer["description"].replace(".", "").split(", ")
    }
    assert {reason.value for reason in Reason} - described == {Reason.STALE_LEASE.value}
