"""What a request may ask for."""

import base64
import pickle
import socket
from typing import Any

import grpc
import httpx
import pytest

from bench.stack import Stack
from headway.v1 import generation_pb2, scheduler_pb2
from tests.process.known_faults.conftest import CHAT, COMPLETION, refused


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
