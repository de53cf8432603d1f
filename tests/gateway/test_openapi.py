"""The OpenAPI document names every route, every failure, and nothing that is not there."""

import json
import re
import sys
from typing import Any

import httpx
import pytest
from starlette.datastructures import Headers

from gateway_http.app import build_app
from gateway_http.client import SchedulerClient
from gateway_http.http_request import header
from gateway_http.openai_chat_schema import ChatRequest
from gateway_http.openai_choice import ReplySpec
from gateway_http.openai_responses_schema import ResponsesRequest
from gateway_http.openai_schema import CompletionRequest, decode
from gateway_http.openapi import document
from gateway_http.settings import GatewaySettings
from gateway_http.tinker_tokens import SamplingSession, Signer
from headway.errors import HeadwayError
from tests.gateway import tiny_model
from tests.gateway.conftest import settings_for
from tests.gateway.scripted import ScriptedScheduler
from tests.gateway.scripted_runs import leave_alone

METHODS = {"GET", "POST"}
# of HTTP itself, keys, and how a caller came here: no parameters
NO_PARAMETERS = {"accept", "host", "authorization", "x-api-key", "via", "forwarded"}
NO_PARAMETERS |= {"x-forwarded-for", "x-forwarded-host"}
# of HTTP itself, and of pages
NOT_NAMED = {"content-type", "content-length", "cache-control", "x-accel-buffering"}
NOT_NAMED |= {"content-security-policy", "x-content-type-options", "referrer-policy"}
NOT_NAMED |= {"x-frame-options"}
SECRET = "a signing key for tests"
CHAT = {"model": tiny_model.NAME, "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION = {"model": tiny_model.NAME, "prompt": "Hi"}
RESPONSE = {"model": tiny_model.NAME, "input": "Hi"}
SAMPLE = {
    "base_model": tiny_model.NAME,
    "prompt": {"chunks": [{"tokens": [1]}]},
    "sampling_params": {"max_tokens": 1},
}
SESSION = Signer(GatewaySettings().signing_secret()).session_id(SamplingSession("m", "s", 0))
FUTURES = {"target": {"sampling_session_id": SESSION}}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return document()


def test_it_has_the_routes_that_there_are(found: dict[str, Any]) -> None:
    settings = GatewaySettings()
    routes = set()
    found_routes: list[Any] = build_app(SchedulerClient(settings), settings).routes
    for route in found_routes:
        path = re.sub(r":\w+}", "}", route.path)
        routes |= {(path, method) for method in route.methods & METHODS}
    documented = {
        (path, method.upper()) for path, item in found["paths"].items() for method in item
    }
    assert documented == routes


def test_every_reference_leads_somewhere(found: dict[str, Any]) -> None:
    for reference in set(re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(found))):
        place: Any = found
        for part in reference.split("/"):
            place = place[part]
        assert place


def test_bodies_are_the_parsers_own(found: dict[str, Any]) -> None:
    body = found["components"]["schemas"]["CompletionRequest"]
    assert body["required"] == ["model", "prompt"]
    assert body["additionalProperties"] is False
    assert found["components"]["schemas"]["Sample"]["properties"]["num_samples"]["minimum"] == 1


@pytest.mark.parametrize(
    ("kind", "least"),
    [(ChatRequest, CHAT), (CompletionRequest, COMPLETION), (ResponsesRequest, RESPONSE)],
)
def test_what_a_body_may_have_is_named_and_taken(
    found: dict[str, Any], kind: Any, least: dict[str, Any]
) -> None:
    named = found["components"]["schemas"][kind.__name__]["properties"]
    assert set(named) == set(kind.__struct_fields__) | set(kind.harmless)
    for name in kind.harmless:
        for value in named[name].get("enum", ("anything", {"a": [1]}, None)):
            assert decode(kind, json.dumps({**least, name: value}).encode())
        if "enum" in named[name]:
            with pytest.raises(HeadwayError, match=name):
                decode(kind, json.dumps({**least, name: "anything else"}).encode())


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("post", "/v1/chat/completions", CHAT),
        ("post", "/v1/completions", COMPLETION),
        ("post", "/v1/responses", RESPONSE),
        ("get", "/v1/requests/{request_id}/events", None),
        ("get", "/v1/models", None),
        ("get", "/v1/models/{name}", None),
        ("post", "/tokenize", COMPLETION),
        ("post", "/detokenize", {"model": tiny_model.NAME, "tokens": [1]}),
        ("post", "/api/v1/client/config", {}),
        ("post", "/api/v1/create_session", {}),
        ("post", "/api/v1/asample", SAMPLE),
        ("post", "/api/v1/retrieve_future", {"request_id": "run-0"}),
        ("post", "/api/v1/retrieve_futures", FUTURES),
        ("post", "/api/v1/cancel_future", {"request_id": "run-0"}),
        ("get", "/metrics", None),
        ("get", "/monitor/data", None),
    ],
)
async def test_the_headers_that_count_are_those_that_are_named(
    asgi: httpx.AsyncClient,
    scheduler: ScriptedScheduler,
    found: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    path: str,
    body: Any,
) -> None:
    operation = found["paths"][path][method]
    named = {one["name"].lower() for one in operation["parameters"] if one["in"] == "header"}
    looked_up = set()
    look_up, look_in = Headers.__getitem__, Headers.__contains__

    def get(self: Headers, name: str) -> str:
        looked_up.add(name.lower())
        return look_up(self, name)

    def contains(self: Headers, name: Any) -> bool:
        looked_up.add(name.lower())
        return look_in(self, name)

    def our_get(scope: Any, name: bytes) -> str | None:
        looked_up.add(name.decode())
        return header(scope, name)

    state = ReplySpec(kind="chat", model=tiny_model.NAME, created=1).encode()
    sent = {"x-headway-resume": state, "x-tinker-request-type": "Sample"}
    sent |= {"x-stainless-read-timeout": "0.01"}
    if "retrieve" in path:
        scheduler.script = leave_alone
    await asgi.post("/api/v1/asample", json=SAMPLE)
    monkeypatch.setattr(Headers, "__getitem__", get)
    monkeypatch.setattr(Headers, "__contains__", contains)
    for name, module in list(sys.modules.items()):
        if name.startswith("gateway_http.") and vars(module).get("header") is header:
            monkeypatch.setattr(module, "header", our_get)
    for headers in ({}, {name: sent[name] for name in named & set(sent)}):
        where = re.sub(r"{\w+}", "some", path)
        await asgi.request(method, where, json=body, headers=headers)
    assert looked_up - NO_PARAMETERS == named


@pytest.mark.parametrize("key", ["", "wrong", "key"])
async def test_answers_have_the_headers_that_are_named(
    client: SchedulerClient, scheduler: ScriptedScheduler, found: dict[str, Any], key: str
) -> None:
    """Of every operation, refused and not; and who needs a key is said as it is."""
    settings = settings_for(scheduler, api_keys="team=key", signing_key=SECRET, monitor="key")
    transport = httpx.ASGITransport(build_app(client, settings))
    headers = {"x-request-id": "mine"} | ({"x-api-key": key} if key else {})
    bodies: dict[str, Any] = {
        "/v1/completions": COMPLETION,
        "/v1/chat/completions": CHAT,
        "/v1/responses": RESPONSE,
    }
    async with httpx.AsyncClient(
        transport=transport, base_url="http://test", headers=headers
    ) as http:
        for path, item in found["paths"].items():
            for method, operation in item.items():
                where = re.sub(r"{\w+}", "some", path)
                body: dict[str, Any] = bodies.get(path, {})
                for more in ({}, {"stream": True}) if path in bodies else ({},):
                    response = await http.request(method, where, json={**body, **more})
                    assert (response.status_code == 401) == (
                        key != "key" and operation["security"] != []
                    ), path
                    answer = operation["responses"][str(response.status_code)]
                    told = set(response.headers) - NOT_NAMED
                    assert told <= set(answer["headers"]), (path, response.status_code)
                    required = (n for n, one in answer["headers"].items() if one.get("required"))
                    assert set(required) <= told


def test_names_of_operations_differ(found: dict[str, Any]) -> None:
    names = [one["operationId"] for item in found["paths"].values() for one in item.values()]
    assert len(set(names)) == len(names) > 30


async def test_it_is_served_without_a_key(asgi: httpx.AsyncClient, found: dict[str, Any]) -> None:
    response = await asgi.get("/openapi.json")
    assert (response.status_code, response.headers["content-type"]) == (200, "application/json")
    assert response.json() == found
