"""Faults that other servers of this field had, tried on our doors; the names say whose they were.

Hostile HTTP is in hostile_cases, kernels and checkpoints that lie in tests/engine. What is here is
the shape of each known fault: once is somebody else's, twice would be ours.
"""

from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest

from bench.stack import Stack
from headway.v1 import scheduler_pb2_grpc

ALICE, BOB = "key-of-alice-0123456789", "key-of-bob-0123456789"
SIGNING_KEY = "a signing key for tests"
SECRET_TEXT = "a prompt that nobody else may read"
COMPLETION = {"model": "mock", "prompt": [1, 2, 3], "max_tokens": 2}
CHAT = {"model": "mock", "messages": [{"role": "user", "content": SECRET_TEXT}]}


@pytest.fixture(scope="package")
def stack() -> Iterator[Stack]:
    gateway = {"api_keys": f"alice={ALICE},bob={BOB}", "signing_key": SIGNING_KEY}
    gateway |= {"monitor": "key", "num_text_workers": "0"}
    with Stack.start(gateway=gateway) as stack:
        yield stack


@pytest.fixture(scope="package")
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
