"""Who may come in, and what one tenant learns of another."""

import json
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest

from bench.stack import Stack
from gateway_http.app import build_app
from gateway_http.client import SchedulerClient
from gateway_http.settings import GatewaySettings
from gateway_http.tinker_tokens import SamplingSession, Signer
from headway.errors import HeadwayError
from headway.v1 import scheduler_pb2
from tests.process.known_faults.conftest import (
    ALICE,
    BOB,
    CHAT,
    COMPLETION,
    SECRET_TEXT,
    SIGNING_KEY,
    key,
    refused,
)

OPEN_PATHS = {"/health", "/health/", "/ready", "/api/v1/healthz", "/openapi.json"}
OPEN_PATHS |= {"/monitor", "/monitor/"}  # the page, which holds nothing


def routes() -> Iterator[tuple[str, set[str]]]:
    """Every path with something for each of its parameters, and its methods."""
    settings = GatewaySettings()
    for route in build_app(SchedulerClient(settings), settings).routes:
        path = getattr(route, "path")  # noqa: B009 - starlette's base class has none
        for name in ("name:path", "name", "request_id", "session_id", "sampling_session_id"):
            path = path.replace("{" + name + "}", "some")
        yield path, getattr(route, "methods", None) or {"GET"}


@pytest.mark.parametrize("value", ["' OR 1=1 --", "x'; DROP TABLE keys; --", "%s%n", "a" * 9_000])
def test_litellm_cve_2026_42208_a_key_is_never_part_of_a_query(
    anybody: httpx.Client, stack: Stack, value: str
) -> None:
    response = anybody.get("/v1/models", headers=key(value))
    assert response.status_code == 401
    assert value not in response.text
    assert value not in json.dumps(stack.gateway.lines)


@pytest.mark.parametrize("host", ["localhost/health?", "localhost/health#", "/health", "x@y"])
def test_litellm_pysec_2026_388_host_decides_nothing(anybody: httpx.Client, host: str) -> None:
    assert anybody.get("/v1/models", headers={"Host": host}).status_code == 401
    forwarded = {"X-Forwarded-Host": host, "X-Original-URL": "/health", "X-Rewrite-URL": "/health"}
    assert anybody.get("/v1/models", headers=forwarded).status_code == 401


@pytest.mark.parametrize(
    "path",
    [
        pytest.param("/config/update", id="litellm-cve-2026-35029"),
        pytest.param("/key/generate", id="litellm-cve-2026-47101"),
        pytest.param("/user/update", id="litellm-cve-2026-47102"),
        pytest.param("/guardrails/test_custom_code", id="litellm-cve-2026-40217"),
        pytest.param("/update_weights_from_tensor", id="sglang-cve-2025-10164"),
        pytest.param("/v2/systemsharedmemory/region/x/register", id="triton-cve-2025-23319"),
        pytest.param("/v2/repository/models/x/load", id="triton-cve-2026-24208"),
        pytest.param("/api/jobs/", id="ray-cve-2023-48022"),
        pytest.param("/v1/load_lora_adapter", id="vllm-load-lora"),
    ],
)
def test_no_door_changes_the_server(alice: httpx.Client, path: str) -> None:
    assert alice.post(path, json={"x": 1}).status_code == 404


@pytest.mark.parametrize("field", ["tenant", "user_role", "key_id", "quota", "api_key"])
def test_litellm_cve_2026_47102_nobody_names_his_own_rights(
    alice: httpx.Client, field: str
) -> None:
    refused(alice.post("/v1/completions", json=COMPLETION | {field: "admin"}), field)


def test_litellm_cve_2026_114612_each_purpose_has_its_own_key(anybody: httpx.Client) -> None:
    signer = Signer(GatewaySettings(signing_key=SIGNING_KEY).signing_secret())
    session = signer.session_id(SamplingSession("mock", "s", 1))
    token = signer.jwt("somebody", 0, 600)
    assert signer.key_id(session, 0) is None
    with pytest.raises(HeadwayError):
        signer.session(token)
    for forged in (session, token):
        headers = {"x-api-key": forged}
        assert anybody.get("/api/v1/get_server_capabilities", headers=headers).status_code == 401


def test_ray_cve_2023_48022_every_route_but_health_asks_for_a_key(anybody: httpx.Client) -> None:
    closed = [(path, methods) for path, methods in routes() if path not in OPEN_PATHS]
    assert len(closed) > 15
    for path, methods in closed:
        for method in methods - {"HEAD"}:
            assert anybody.request(method, path, json={}).status_code in (401, 404), path


def test_ray_cve_2026_27482_a_method_that_is_not_listed_is_denied(anybody: httpx.Client) -> None:
    for path, methods in routes():
        for method in {"POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"} - methods:
            response = anybody.request(method, path)
            assert response.status_code in (401, 404, 405), (method, path)
            if response.status_code == 405:
                assert set(response.headers["allow"].split(", ")) == methods


@pytest.mark.parametrize(
    "path",
    [
        "//v1/models",
        "/v1/models/",
        "/V1/models",
        "/health/../v1/models",
        "/%761/models",
        "/v1/models;/health",
        "/health/%2e%2e/v1/models",
        "/v1/models?path=/health",
        "/v1%2fmodels",
    ],
)
def test_dynamo_cve_2026_24254_no_other_spelling_of_a_path_is_open(
    stack: Stack, anybody: httpx.Client, path: str
) -> None:
    url = httpx.URL(stack.gateway_url, raw_path=path.encode())
    response = anybody.get(url)
    assert response.status_code in (401, 404)
    assert "mock" not in response.text


def test_vllm_cve_2025_59425_a_key_that_begins_well_is_no_better(anybody: httpx.Client) -> None:
    """Keys are looked up, and compared, as digests under a secret."""
    for wrong in (ALICE[:-1], ALICE + "x", ALICE.upper(), ALICE.replace("a", "\u0430")):
        headers = {b"Authorization": f"Bearer {wrong}".encode()}
        assert anybody.get("/v1/models", headers=headers).status_code == 401


def test_vllm_cve_2026_105755_the_same_id_of_two_tenants_mixes_nothing(
    alice: httpx.Client, bob: httpx.Client
) -> None:
    same = {"X-Request-Id": "one", "Idempotency-Key": "one"}
    first = alice.post("/v1/completions", json=COMPLETION, headers=same)
    again = alice.post("/v1/completions", json=COMPLETION, headers=same)
    other = bob.post("/v1/completions", json=COMPLETION | {"prompt": [7]}, headers=same)
    assert [r.status_code for r in (first, again, other)] == [200] * 3
    assert first.json()["id"] == again.json()["id"] != other.json()["id"]
    assert other.json()["usage"]["prompt_tokens"] == 1


def test_results_are_read_by_the_tenant_that_asked_only(
    alice: httpx.Client, bob: httpx.Client, stub: Any
) -> None:
    body = {
        "base_model": "mock",
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
        "sampling_params": {"max_tokens": 2},
    }
    request_id = alice.post("/api/v1/asample", json=body).json()["request_id"]
    wish = {"request_id": request_id}
    assert bob.post("/api/v1/retrieve_future", json=wish).status_code == 404
    bob.post("/api/v1/cancel_future", json=wish)  # harms nobody
    asked = scheduler_pb2.RetrieveRequest(request_id=request_id, tenant="alice")
    asked.wait.FromSeconds(20)
    assert stub.Retrieve(asked).HasField("result")
    mine = alice.post("/api/v1/retrieve_future", json=wish, headers={"accept": "application/json"})
    assert mine.status_code == 200
    assert len(mine.json()["sequences"][0]["tokens"]) == 2
    asked = scheduler_pb2.RetrieveRequest(request_id=request_id, tenant="bob")
    with pytest.raises(grpc.RpcError) as caught:
        stub.Retrieve(asked)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_nobody_learns_of_the_work_of_another_tenant(
    alice: httpx.Client, bob: httpx.Client
) -> None:
    """What Bob may not see looks to him like what is not there, and is not ended by him."""
    wish = {"session_id": "s", "sampling_session_seq_id": 0, "base_model": "mock"}
    session = alice.post("/api/v1/create_sampling_session", json=wish).json()
    session_id = session["sampling_session_id"]
    sample = {
        "sampling_session_id": session_id,
        "prompt": {"chunks": [{"tokens": [1, 2, 3]}]},
        "sampling_params": {"max_tokens": 30_000, "stop": []},
    }
    endless, short = (
        alice.post("/api/v1/asample", json=sample | changes).json()["request_id"]
        for changes in ({"seq_id": 1}, {"seq_id": 2, "sampling_params": {"max_tokens": 1}})
    )
    poll = {"target": {"sampling_session_id": session_id}, "timeout": 20}
    (done,) = alice.post("/api/v1/retrieve_futures", json=poll).json()["completions"]
    assert done["request_id"] == short
    with alice.stream("POST", "/v1/completions", json=COMPLETION | {"stream": True}) as stream:
        streamed = stream.headers["x-headway-request-id"]
        state = {"x-headway-resume": stream.headers["x-headway-resume"]}
        stream.read()

    def tried(request_id: str) -> list[tuple[int, str]]:
        body = {"request_id": request_id}
        calls = [
            bob.post(f"/api/v1/{name}", json=body) for name in ("cancel_future", "retrieve_future")
        ]
        calls.append(bob.get(f"/v1/requests/{request_id}/events", headers=state))
        return [(call.status_code, call.text) for call in calls]

    nothing = tried("req_" + "x" * 24)
    assert [status for status, _ in nothing] == [200, 404, 404]
    assert [tried(one) for one in (endless, short, streamed)] == [nothing] * 3
    nobody = bob.post("/api/v1/retrieve_futures", json=poll | {"timeout": 0}).json()
    assert nobody["completions"] == []
    # Bob's own sample of that number in that session is another one
    own = bob.post("/api/v1/asample", json=sample | {"seq_id": 2}).json()["request_id"]
    assert own not in (endless, short)
    left = alice.post("/api/v1/retrieve_future", json={"request_id": endless})
    assert (left.status_code, left.json()["queue_state"]) == (408, "processing")
    for client, request_id in ((alice, endless), (bob, own)):
        client.post("/api/v1/cancel_future", json={"request_id": request_id})
    ended = alice.post("/api/v1/retrieve_future", json={"request_id": endless}).json()
    assert ended["category"] == "user"


def test_vllm_cve_2025_46570_a_prompt_tells_nothing_of_another_tenants(
    alice: httpx.Client, bob: httpx.Client
) -> None:
    """The mock engine shares as the real one does, and counts it."""

    def num_cached(client: httpx.Client) -> int:
        body = COMPLETION | {"prompt": list(range(500, 800))}
        usage = client.post("/v1/completions", json=body).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert [num_cached(one) for one in (alice, bob)] == [0, 0]
    assert num_cached(alice) > 200


def test_ray_cve_2025_1979_no_log_holds_a_key_or_a_prompt(
    stack: Stack, alice: httpx.Client
) -> None:
    alice.post("/v1/chat/completions", json=CHAT)
    alice.post("/v1/completions", json=COMPLETION | {"prompt": SECRET_TEXT})
    alice.get("/v1/models", headers={"x-api-key": ALICE})
    for process in (stack.gateway, stack.scheduler, *stack.executors):
        logs = json.dumps(process.lines)
        for secret in (ALICE, BOB, SIGNING_KEY, SECRET_TEXT):
            assert secret not in logs
