"""Nonsense at every HTTP endpoint: a 4xx of the endpoint's own shape, never a 5xx or a trace."""

import json
from collections.abc import Iterator
from itertools import product
from typing import Any

import httpx
import pytest

from bench.stack import Stack

POST = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/tokenize",
    "/detokenize",
    "/api/v1/client/config",
    "/api/v1/client/dynamic_config",
    "/api/v1/auth/token",
    "/api/v1/create_session",
    "/api/v1/session_heartbeat",
    "/api/v1/sessions/some-id/finish",
    "/api/v1/create_sampling_session",
    "/api/v1/join_sampling_session",
    "/api/v1/asample",
    "/api/v1/retrieve_future",
    "/api/v1/retrieve_futures",
    "/api/v1/cancel_future",
    "/api/v1/telemetry",
)
GET = (
    "/v1/models",
    "/v1/models/no-such-model",
    "/v1/models/%00%ff",
    "/v1/requests/no-such/events",
    "/api/v1/healthz",
    "/api/v1/get_server_capabilities",
    "/api/v1/samplers/no-such-sampler",
    "/health",
    "/health/",
    "/ready",
    "/openapi.json",
    "/metrics",
    "/monitor",
    "/monitor/data",
    "/v1/requests/no-such-request/events",
    "/no/such/page",
)
DEEP = "[" * 100_000 + "]" * 100_000
BODIES: tuple[bytes, ...] = (
    b"",
    b"{",
    b"null",
    b"[]",
    b"42",
    b'"text"',
    b"\xff\xfe\x00",
    b"{}" * 2,
    DEEP.encode(),
    b'{"model": NaN}',
    b'{"model": 1e999}',
    b'{"model": "mock", "model": "mock"}',
    b'{"model": {"a": [1]}, "prompt": 3, "messages": 7}',
)
COMPLETION = {"model": "mock", "prompt": [1, 2, 3], "max_tokens": 2}
WRONG_FIELDS: tuple[dict[str, object], ...] = (
    {"model": "no-such-model"},
    {"model": ""},
    {"model": "x" * 100_000},
    {"prompt": []},
    {"prompt": ""},
    {"prompt": [-1]},
    {"prompt": [2**31]},
    {"prompt": [2**70]},
    {"prompt": [1.5]},
    {"prompt": [True]},
    {"prompt": [[1], "a"]},
    {"prompt": list(range(1000)) * 200},
    {"max_tokens": 0},
    {"max_tokens": -1},
    {"max_tokens": 2**40},
    {"max_tokens": "many"},
    {"n": 0},
    {"n": -1},
    {"n": 10**9},
    {"temperature": -1},
    {"temperature": "hot"},
    {"top_p": 0},
    {"top_p": 1.5},
    {"top_k": -5},
    {"min_p": 2},
    {"seed": 2**70},
    {"stop": 7},
    {"stop": ["x"] * 1000},
    {"stop": ["x" * 100_000]},
    {"stop_token_ids": [10**12]},
    {"logprobs": 50},
    {"stream": "yes"},
    {"logit_bias": {"1": 500}},
    {"logit_bias": {"one": 5}},
    {"presence_penalty": 9},
    {"repetition_penalty": -1},
    {"structured_outputs": {"regex": "(?=a)", "choice": ["a"]}},
    {"response_format": {"type": "json_schema"}},
    {"best_of": 3},
    {"no_such_parameter": 1},
    {"priority": 10**6},
    {"queue_timeout_s": -1},
    {"execution_timeout_s": 1e300},
)


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with (
        Stack.start() as stack,
        httpx.Client(base_url=stack.gateway_url, timeout=60) as client,
    ):
        yield client
        assert client.post("/v1/completions", json=COMPLETION).status_code == 200
        for process in (stack.scheduler, *stack.executors, stack.gateway):
            errors = [x for x in process.lines if x.get("level") == "error" or "text" in x]
            assert not errors, f"{process.name}: {errors[:3]}"


def check(response: httpx.Response, *, is_refused: bool = True) -> None:
    assert response.status_code < 500, response.text[:300]
    assert "content-length" in response.headers
    assert "Traceback" not in response.text
    assert ".py" not in response.text
    if is_refused:
        assert 400 <= response.status_code < 500, response.text[:300]
        assert response.content
    if response.status_code >= 400:
        assert "error" in response.json()


@pytest.mark.parametrize("path", POST)
def test_bodies_that_are_not_requests(client: httpx.Client, path: str) -> None:
    for body in BODIES:
        check(client.post(path, content=body), is_refused=False)
        check(
            client.post(path, content=body, headers={"content-type": "text/plain"}),
            is_refused=False,
        )


@pytest.mark.parametrize("change", WRONG_FIELDS, ids=lambda change: next(iter(change)))
def test_completion_with_one_wrong_field(client: httpx.Client, change: dict[str, object]) -> None:
    response = client.post("/v1/completions", json=COMPLETION | change)
    check(response)
    assert response.json()["error"]["message"]


def test_methods_that_a_path_does_not_have(client: httpx.Client) -> None:
    for method, path in product(("PUT", "DELETE", "PATCH", "GET"), POST):
        check(client.request(method, path))
    for method, path in product(("PUT", "DELETE", "POST"), GET):
        check(client.request(method, path))
    for path in GET:
        check(client.get(path), is_refused=False)


def test_unknown_request_ids(client: httpx.Client) -> None:
    names: list[Any] = ["", "req_unknown", "x" * 10_000, "\x00", "req_\u2603", 7, None, {}]
    for request_id in names:
        body = json.dumps({"request_id": request_id})
        check(client.post("/api/v1/retrieve_future", content=body))


def test_a_body_over_the_limit(client: httpx.Client) -> None:
    def chunks() -> Iterator[bytes]:
        yield b'{"model": "'
        for _ in range(80):
            yield b"x" * (1 << 20)

    response = client.post("/v1/completions", content=chunks())
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"
