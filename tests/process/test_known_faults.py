"""Faults that other servers of this field had, tried on our doors; the names say whose they were.

Hostile HTTP is in hostile_cases, kernels and checkpoints that lie in tests/engine. What is here is
the shape of each known fault: once is somebody else's, twice would be ours.
"""

import ast
import asyncio
import base64
import json
import pickle
import socket
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from bench.stack import ROOT, Stack
from gateway_http.app import build_app
from gateway_http.client import SchedulerClient
from gateway_http.http_protocol import BoundedProtocol
from gateway_http.settings import GatewaySettings
from gateway_http.tinker_tokens import SamplingSession, Signer
from headway.errors import HeadwayError
from headway.v1 import generation_pb2, scheduler_pb2, scheduler_pb2_grpc
from scheduler_svc.settings import SchedulerSettings
from tests.gateway.texts import loaded, render

ALICE, BOB = "key-of-alice-0123456789", "key-of-bob-0123456789"
SIGNING_KEY = "a signing key for tests"
SECRET_TEXT = "a prompt that nobody else may read"
COMPLETION = {"model": "mock", "prompt": [1, 2, 3], "max_tokens": 2}
CHAT = {"model": "mock", "messages": [{"role": "user", "content": SECRET_TEXT}]}
OPEN_PATHS = {"/health", "/health/", "/ready", "/api/v1/healthz", "/openapi.json"}
OPEN_PATHS |= {"/monitor", "/monitor/"}  # the page, which holds nothing
TRAVERSALS = ("../../etc/passwd", "..%2f..%2fetc%2fpasswd", "/etc/passwd", "a/../../b")


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    gateway = {"api_keys": f"alice={ALICE},bob={BOB}", "signing_key": SIGNING_KEY}
    gateway |= {"monitor": "key", "num_text_workers": "0"}
    with Stack.start(gateway=gateway) as stack:
        yield stack


@pytest.fixture(scope="module")
def anybody(stack: Stack) -> Iterator[httpx.Client]:
    """Without a key; afterwards everything still works and no process has crashed."""
    with httpx.Client(base_url=stack.gateway_url, timeout=60) as client:
        yield client
        works = client.post("/v1/completions", json=COMPLETION, headers=key(ALICE))
        assert works.status_code == 200
    for process in (stack.scheduler, *stack.executors, stack.gateway):
        errors = [x for x in process.lines if x.get("level") == "error" or "text" in x]
        assert not errors, f"{process.name}: {errors[:3]}"


@pytest.fixture
def alice(anybody: httpx.Client, stack: Stack) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=stack.gateway_url, timeout=60, headers=key(ALICE)) as client:
        yield client


@pytest.fixture
def bob(anybody: httpx.Client, stack: Stack) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=stack.gateway_url, timeout=60, headers=key(BOB)) as client:
        yield client


@pytest.fixture
def stub(stack: Stack) -> Iterator[Any]:
    """One that waits; the generated types are of those that do not."""
    with grpc.insecure_channel(stack.scheduler_address) as channel:
        channel_of_any_kind: Any = channel
        yield scheduler_pb2_grpc.SchedulerServiceStub(channel_of_any_kind)


def key(value: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {value}"}


def refused(response: httpx.Response, field: str) -> None:
    """400, for this field."""
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == field, response.text


def routes() -> Iterator[tuple[str, set[str]]]:
    """Every path with something for each of its parameters, and its methods."""
    settings = GatewaySettings()
    for route in build_app(SchedulerClient(settings), settings).routes:
        path = getattr(route, "path")  # noqa: B009 - starlette's base class has none
        for name in ("name:path", "name", "request_id", "session_id", "sampling_session_id"):
            path = path.replace("{" + name + "}", "some")
        yield path, getattr(route, "methods", None) or {"GET"}


# --- who may come in


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
    token = signer.jwt("somebody", 0)
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


# --- what a request may ask for


def test_vllm_cve_2026_34756_n_is_bounded(alice: httpx.Client) -> None:
    refused(alice.post("/v1/completions", json=COMPLETION | {"n": 10**9}), "n")
    params = {"base_model": "mock", "sampling_params": {}, "num_samples": 10**9}
    body = params | {"prompt": {"chunks": [{"tokens": [1]}]}}
    assert alice.post("/api/v1/asample", json=body).status_code == 400


def test_vllm_cve_2025_62164_cve_2026_56340_no_tensors_of_clients(alice: httpx.Client) -> None:
    tensor = base64.b64encode(pickle.dumps([1.0] * 100)).decode()
    body = COMPLETION | {"prompt_embeds": tensor}
    refused(alice.post("/v1/completions", json=body), "prompt_embeds")


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "continue_final_message", "x"])
def test_vllm_cve_2025_62426_template_arguments_are_an_allow_list(
    alice: httpx.Client, name: str
) -> None:
    body = CHAT | {"chat_template_kwargs": {name: "{{ 1 }}"}}
    assert alice.post("/v1/chat/completions", json=body).status_code == 400


def test_vllm_cve_2026_115918_no_template_of_clients(alice: httpx.Client) -> None:
    template = "{% for i in range(10**9) %}{% endfor %}"
    refused(
        alice.post("/v1/chat/completions", json=CHAT | {"chat_template": template}), "chat_template"
    )


def test_vllm_cve_2026_55574_pysec_2026_3933_a_regex_is_bounded(alice: httpx.Client) -> None:
    for regex in ("(a+)+$" * 1_000, "((((a{1,999}){1,999}){1,999}){1,999})"):
        body = COMPLETION | {"structured_outputs": {"regex": regex}}
        assert alice.post("/v1/completions", json=body).status_code == 400


@pytest.mark.parametrize("field", ["cache_salt", "mm_processor_kwargs", "kv_transfer_params"])
def test_vllm_cve_2026_105754_nobody_names_what_is_cached(alice: httpx.Client, field: str) -> None:
    refused(alice.post("/v1/completions", json=COMPLETION | {field: "x"}), field)


def test_vllm_cve_2025_46570_no_prefix_is_shared_between_tenants() -> None:
    from executor_svc.core.prefix_cache import PrefixCache

    blocks = PrefixCache(block_size=2)
    blocks.add([0, 1], 0, [5, 6, 7, 8], "alice")
    assert blocks.find([5, 6, 7, 8], "alice", 2) == [0]
    assert blocks.find([5, 6, 7, 8], "bob", 2) == []


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("http://169.254.169.254/latest/meta-data", id="vllm-cve-2026-24779"),
        pytest.param("http://evil\\@127.0.0.1:1/x", id="vllm-cve-2026-25960"),
        pytest.param("file:///etc/passwd", id="dynamo-cve-2026-47614"),
        pytest.param("data:image/png;base64,iVBORw0KGgo=", id="vllm-cve-2026-22773"),
        pytest.param("http://127.0.0.1:50051/", id="lmdeploy-cve-2026-33626"),
    ],
)
def test_no_address_of_a_client_is_fetched(alice: httpx.Client, url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(0)
        ours = f"http://127.0.0.1:{trap.getsockname()[1]}/"
        for address in (url, ours):
            part = {"type": "image_url", "image_url": {"url": address}}
            body = CHAT | {"messages": [{"role": "user", "content": [part]}]}
            assert alice.post("/v1/chat/completions", json=body).status_code == 400
        with pytest.raises(BlockingIOError):
            trap.accept()


def test_vllm_cve_2026_105757_one_request_ends_alone(
    stack: Stack, alice: httpx.Client, stub: Any
) -> None:
    """Straight to the scheduler, past the gateway's checks."""
    senseless: list[dict[str, Any]] = [
        {"prompt_token_ids": [2**32 - 1]},
        {"prompt_token_ids": []},
        {"prompt_token_ids": [1] * 200_000},
        {"prompt_token_ids": [1], "num_samples": 2**31},
        {"prompt_token_ids": [1], "model": "no-such"},
        {"prompt_token_ids": [1], "tenant": "x" * 10_000},
    ]
    for fields in senseless:
        request = generation_pb2.GenerationRequest(**{"model": "mock", **fields})
        with pytest.raises(grpc.RpcError) as caught:
            stub.Submit(scheduler_pb2.SubmitRequest(request=request))
        assert caught.value.code() in (
            grpc.StatusCode.INVALID_ARGUMENT,
            grpc.StatusCode.NOT_FOUND,
        ), caught.value
    assert alice.post("/v1/completions", json=COMPLETION).status_code == 200


# --- bytes that want to be objects


@pytest.mark.parametrize(
    "fault", ["vllm-cve-2025-32444", "sglang-cve-2026-3059", "tensorrt-cve-2025-33255", "shadowmq"]
)
def test_a_pickle_is_no_message(stack: Stack, alice: httpx.Client, fault: str) -> None:
    bomb = pickle.dumps({"fault": fault, "x": Path("x")})
    assert alice.post("/v1/completions", content=bomb).status_code == 400
    with grpc.insecure_channel(stack.scheduler_address) as channel:
        for method in (
            "SchedulerService/Submit",
            "SchedulerService/Generate",
            "AdminService/GetSnapshot",
        ):
            call: Any = channel.unary_stream(f"/headway.v1.{method}")
            with pytest.raises(grpc.RpcError) as caught:
                list(call(bomb))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        call = channel.stream_stream("/headway.v1.FleetService/Attach")
        with pytest.raises(grpc.RpcError):
            list(call(iter([bomb])))


@pytest.mark.parametrize("package", ["zmq", "pickle", "cloudpickle", "dill", "yaml", "ray", "eval"])
def test_sglang_cve_2026_7301_nothing_here_unpickles_or_runs_text(package: str) -> None:
    for folder in ("scheduler_svc", "executor_svc", "gateway_http", "protos", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    names = [getattr(node, "module", None) or ""]
                    names += [alias.name for alias in node.names]
                    assert package not in {name.split(".")[0] for name in names}, path
                elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                    assert node.func.id not in ("eval", "exec", "compile", "__import__"), path


def test_vllm_cve_2025_47277_everything_listens_on_loopback_unless_told_otherwise() -> None:
    assert GatewaySettings().host == SchedulerSettings().host == "127.0.0.1"
    for settings in (GatewaySettings, SchedulerSettings):
        with pytest.raises(ValueError, match="not loopback"):
            settings(host="0.0.0.0")


# --- files of a model


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"auto_map": {"AutoModel": "evil.Model"}}, id="vllm-cve-2025-66448"),
        pytest.param({"model_type": "vision", "auto_map": {}}, id="vllm-cve-2026-22807"),
        pytest.param({"model_type": "evil--code/repo"}, id="vllm-cve-2026-27893"),
    ],
)
def test_no_code_comes_with_a_model(tmp_path: Path, changes: dict[str, Any]) -> None:
    from executor_svc.torch_engine.files import ModelError
    from executor_svc.torch_engine.model_config import load_spec

    source = json.loads((ROOT / "executor_svc/builtin_model/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(source))
    load_spec(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(source | changes))
    with pytest.raises(ModelError, match=r"auto_map|model_type"):
        load_spec(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("pytorch_model.bin", id="torch-cve-2025-32434"),
        pytest.param("model.pt2", id="torch-cve-2026-4538"),
        pytest.param("model.pkl", id="tensorrt-cve-2026-24142"),
        pytest.param("../../other/model.safetensors", id="triton-cve-2026-24208"),
        pytest.param("/etc/model.safetensors", id="dynamo-cve-2026-47612"),
    ],
)
def test_weights_are_safetensors_of_the_models_own_folder(tmp_path: Path, name: str) -> None:
    from executor_svc.torch_engine.files import ModelError
    from executor_svc.torch_engine.loader import Checkpoint

    folder = tmp_path / "a" / "model"
    folder.mkdir(parents=True)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"w": [1.0]}))
    with pytest.raises(ModelError, match="no such file"):
        Checkpoint(folder, {})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").write_bytes(bytes(8))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(ModelError, match=r"not a safetensors file|leads out|no such file"):
        Checkpoint(folder, {})


@pytest.mark.parametrize("name", TRAVERSALS)
def test_dynamo_cve_2026_47612_a_models_name_is_no_path(alice: httpx.Client, name: str) -> None:
    assert alice.get(f"/v1/models/{name}").status_code == 404
    response = alice.post("/v1/completions", json=COMPLETION | {"model": name})
    assert response.status_code == 404
    assert "root:" not in response.text


@pytest.mark.parametrize(
    "template",
    [
        pytest.param(
            "{{ ''.__class__.__mro__[1].__subclasses__() }}", id="llama-cpp-cve-2024-34359"
        ),
        pytest.param("{{ '{0.__class__}'.format(1).__class__ }}", id="jinja2-cve-2024-56201"),
        pytest.param("{% set f = '{0.__class__}'.format %}{{ f(1) }}", id="jinja2-cve-2024-56326"),
        pytest.param("{{ ('{0.__class__}' | attr('format'))(1) }}", id="jinja2-cve-2025-27516"),
        pytest.param("{{ cycler.__init__.__globals__.os }}", id="litellm-2949"),
        pytest.param("{% include '/etc/passwd' %}", id="vllm-cve-2026-115911"),
    ],
)
async def test_a_template_gets_nothing_but_its_messages(template: str) -> None:
    try:
        rendered = await render(await loaded(template))
    except HeadwayError as error:
        rendered = error.message
    assert not rendered or rendered.endswith("does not take these messages."), rendered


async def test_litellm_2949_a_message_is_no_template() -> None:
    text = await loaded("{{ messages[0]['content'] }}")
    from gateway_http.text import Chat

    chat = Chat(messages=[{"role": "user", "content": "{{ 7 * 7 }}{% raw %}"}])
    assert await render(text, chat) == "{{ 7 * 7 }}{% raw %}"


# --- the wire


def test_aiohttp_cve_2025_69224_no_parser_in_python_is_in_use() -> None:
    assert issubclass(BoundedProtocol, HttpToolsProtocol)


@pytest.mark.parametrize(
    ("package", "least"),
    [
        pytest.param("jinja2", (3, 1, 6), id="jinja2-cve-2025-27516"),
        pytest.param("h11", (0, 16), id="h11-cve-2025-43859"),
        pytest.param("grpcio", (1, 65, 4), id="grpcio-ghsa-cfgp-2977-2fmm"),
    ],
)
def test_libraries_are_not_older_than_their_repairs(package: str, least: tuple[int, ...]) -> None:
    assert tuple(map(int, version(package).split(".")[: len(least)])) >= least


def test_triton_cve_2025_23310_cve_2025_23311_many_small_chunks(alice: httpx.Client) -> None:
    response = alice.post("/v1/completions", content=iter([b"["] * 100_000))
    assert response.status_code == 400


def test_triton_cve_2025_33201_a_message_that_is_too_large(
    stub: Any,
) -> None:
    request = generation_pb2.GenerationRequest(model="mock", tenant="x" * (65 << 20))
    with pytest.raises(grpc.RpcError) as caught:
        stub.Submit(scheduler_pb2.SubmitRequest(request=request))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_triton_cve_2025_23320_cve_2025_23334_errors_tell_nothing_of_us(
    alice: httpx.Client,
) -> None:
    """Nor may an answer hold what a client could use as a name here (dynamo CVE-2026-47622)."""
    bodies: list[dict[str, Any]] = [
        {"model": "x"},
        {"prompt": [2**31]},
        {"logit_bias": {"9999999": 1}},
        {"stop": [""] * 99},
        {"structured_outputs": {"json": {"$ref": "file:///etc/passwd"}}},
    ]
    for change in bodies:
        response = alice.post("/v1/completions", json=COMPLETION | change)
        assert response.status_code in (400, 404)
        for word in ("Traceback", ".py", "/dev/shm", "/home", "/usr", "site-packages", "0x"):
            assert word not in response.text


def test_grpcio_cve_2023_4785_many_connections_to_the_scheduler(
    stack: Stack, alice: httpx.Client
) -> None:
    host, port = stack.scheduler_address.split(":")
    peers = [socket.create_connection((host, int(port))) for _ in range(300)]
    try:
        assert alice.post("/v1/completions", json=COMPLETION).status_code == 200
    finally:
        for peer in peers:
            peer.close()


async def test_http2_cve_2023_44487_calls_that_are_reset_at_once(stack: Stack) -> None:
    async with grpc.aio.insecure_channel(stack.scheduler_address) as channel:
        stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        sampling = generation_pb2.SamplingParams(max_tokens=1_000)
        wish = generation_pb2.GenerationRequest(
            model="mock", prompt_token_ids=[1], sampling=sampling
        )
        for _ in range(20):
            calls = [stub.Generate(scheduler_pb2.GenerateRequest(request=wish)) for _ in range(50)]
            await asyncio.gather(*(call.initial_metadata() for call in calls[:1]))
            for call in calls:
                call.cancel()
        models = await stub.ListModels(scheduler_pb2.ListModelsRequest(), timeout=60)
        assert [card.name for card in models.models] == ["mock"]


def test_litellm_1_82_7_no_file_runs_by_being_installed() -> None:
    for folder in ("scheduler_svc", "executor_svc", "gateway_http", "protos"):
        assert not list((ROOT / folder).rglob("*.pth"))
        assert not list((ROOT / folder).rglob("sitecustomize.py"))
