"""Limits of keys, from the gateway's file to the scheduler that counts, in real processes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from bench.stack import Stack
from gateway_http import keys

PEPPER = "a pepper for tests"
ENDLESS = {"model": "mock", "prompt": [1, 2, 3], "max_tokens": 30_000, "ignore_eos": True}
SHORT = {**ENDLESS, "max_tokens": 2}


class Doors(NamedTuple):
    """Two gateways before one scheduler, and the file that both read."""

    first: str
    second: str
    path: Path


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doors]:
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    path.write_text(entry(keys.new_key("hw")))
    settings = {
        "api_keys_file": path,
        "key_pepper": PEPPER,
        "signing_key": "a signing key for tests",
        "api_keys_reload_s": 0.001,
    }
    with Stack.start(gateway=settings, executor={"mock_step_ms": 5}) as stack:
        first = stack.gateway_url
        stack.start_gateway(settings)
        yield Doors(first, stack.gateway_url, path)


def entry(key: str, tenant: str = "alice", **limits: Any) -> str:
    return keys.entry_text(key, PEPPER.encode(), {"tenant": tenant, **limits})


def admit(doors: Doors, **limits: Any) -> dict[str, str]:
    """Headers of a new key that both gateways know."""
    key = keys.new_key("hw")
    doors.path.write_text(f"{doors.path.read_text()}\n{entry(key, **limits)}")
    return {"authorization": f"Bearer {key}"}


def test_what_runs_at_one_gateway_counts_at_the_other(doors: Doors) -> None:
    headers = admit(doors, max_inflight=1)
    with (
        httpx.Client(headers=headers, timeout=60) as http,
        http.stream("POST", f"{doors.first}/v1/completions", json={**ENDLESS, "stream": True}) as s,
    ):
        assert s.status_code == 200
        lines = s.iter_lines()  # to let it go would close the stream
        next(lines)
        refused = http.post(f"{doors.second}/v1/completions", json=SHORT)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "quota_exceeded"
        others = admit(doors, max_inflight=1)
        served = http.post(f"{doors.second}/v1/completions", json=SHORT, headers=others)
        assert served.status_code == 200


def test_a_rate_is_of_the_key_whatever_the_dialect(doors: Doors) -> None:
    headers = admit(doors, requests_per_s=0.01)
    tinker = {"x-api-key": headers["authorization"].removeprefix("Bearer ")}
    sample = {
        "base_model": "mock",
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1]}]},
        "sampling_params": {"max_tokens": 1},
    }
    with httpx.Client(timeout=60) as http:
        assert http.post(f"{doors.first}/v1/completions", json=SHORT, headers=headers).is_success
        refused = http.post(f"{doors.second}/api/v1/asample", json=sample, headers=tinker)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) > 1


def test_more_tokens_than_a_minute_has_are_never_admitted(doors: Doors) -> None:
    headers = admit(doors, tokens_per_minute=10)
    with httpx.Client(headers=headers, timeout=60) as http:
        url = f"{doors.first}/v1/completions"
        assert http.post(url, json={**SHORT, "max_tokens": 50}).status_code == 400
        assert http.post(url, json=SHORT).is_success
        assert http.post(url, json={**SHORT, "max_tokens": 6}).status_code == 429


def test_a_key_that_left_the_file_is_refused(doors: Doors) -> None:
    before = doors.path.read_text()
    headers = admit(doors)
    with httpx.Client(headers=headers, timeout=60) as http:
        url = f"{doors.first}/v1/completions"
        assert http.post(url, json=SHORT).is_success
        doors.path.write_text(before)
        assert http.post(url, json=SHORT).status_code == 401


def test_results_are_their_tenants_alone(doors: Doors) -> None:
    alice, mallory = admit(doors), admit(doors, tenant="mallory")
    named = {"idempotency-key": "the same key"}
    with httpx.Client(timeout=60) as http:
        url = f"{doors.first}/v1/completions"
        mine = http.post(url, json=SHORT, headers={**alice, **named})
        again = http.post(url, json=SHORT, headers={**alice, **named})
        other = http.post(url, json={**SHORT, "prompt": [9]}, headers={**mallory, **named})
        request_id = mine.headers["x-headway-request-id"]
        assert again.headers["x-headway-request-id"] == request_id
        assert other.is_success
        assert other.headers["x-headway-request-id"] != request_id
        for headers, status in ((alice, 200), (mallory, 410)):
            body = {"request_id": request_id}
            key = {"x-api-key": headers["authorization"].removeprefix("Bearer ")}
            found = http.post(f"{doors.second}/api/v1/retrieve_future", json=body, headers=key)
            assert found.status_code in (status, 404 if status == 410 else status)
