"""What comes over the wire: parsers, sizes, connections, error texts."""

import asyncio
import socket
from importlib.metadata import version
from typing import Any

import grpc
import httpx
import pytest
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from bench.stack import Stack
from gateway_http.http_protocol import BoundedProtocol
from headway.v1 import generation_pb2, scheduler_pb2, scheduler_pb2_grpc
from tests.process.known_faults.conftest import COMPLETION


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
