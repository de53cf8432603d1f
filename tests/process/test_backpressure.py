"""Nobody there, and nobody free: every dialect is told by a status that it may try again."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from bench.stack import Stack

COMPLETION: dict[str, Any] = {"model": "mock", "prompt": [1, 2, 3], "max_tokens": 2}
SAMPLE: dict[str, Any] = {
    "base_model": "mock",
    "prompt": {"chunks": [{"tokens": [1, 2, 3]}]},
    "sampling_params": {"max_tokens": 30_000, "stop": []},
}
SESSION = {"session_id": "s", "sampling_session_seq_id": 0, "base_model": "mock"}
CALLS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/completions", COMPLETION),
    ("/v1/completions", {**COMPLETION, "stream": True}),
    ("/v1/chat/completions", {"model": "mock", "messages": [{"role": "user", "content": "x"}]}),
    ("/v1/responses", {"model": "mock", "input": "x"}),
    ("/tokenize", {"model": "mock", "prompt": "x"}),
    ("/api/v1/create_sampling_session", SESSION),
    ("/api/v1/asample", SAMPLE),
)


def refused(response: httpx.Response, status: int) -> None:
    """With everything that an SDK goes by."""
    assert response.status_code == status, response.text
    assert response.headers["x-should-retry"] == "true"
    assert 1 <= int(response.headers["retry-after"]) <= 60


@pytest.fixture
def stack() -> Iterator[Stack]:
    with Stack.start(executors=0) as stack:
        yield stack


def test_before_an_executor_attaches_and_after_it_is_gone_all_may_try_again(stack: Stack) -> None:
    with httpx.Client(base_url=stack.gateway_url, timeout=60) as http:
        for path, body in CALLS:
            refused(http.post(path, json=body), 503)
        assert http.get("/health").status_code == http.get("/ready").status_code == 503
        assert http.get("/v1/models").json()["data"] == []

        executor = stack.start_executor({"engine": "mock", "max_num_seqs": 1})
        executor.wait_for("executor.attached")
        assert http.post("/v1/completions", json=COMPLETION).status_code == 200
        assert http.post("/v1/completions", json={**COMPLETION, "model": "x"}).status_code == 404
        nobody = {**SESSION, "base_model": "x"}
        assert http.post("/api/v1/create_sampling_session", json=nobody).status_code == 404

        executor.kill()
        stack.scheduler.wait_for("executor.lost")
        for path, body in (CALLS[0], CALLS[1], CALLS[-2]):
            limits = {"queue_timeout_s": 0.2} if path.startswith("/v1/") else {}
            response = http.post(path, json={**body, **limits})
            if body.get("stream") and response.status_code == 200:  # accepted within the grace
                assert "queue_timeout" in response.text
            else:
                refused(response, 503)


def test_a_client_waits_as_long_as_it_says(stack: Stack) -> None:
    """A limit that is too short to wait at all is a refusal at once, and a real wait is told."""
    stack.start_executor({"engine": "mock", "max_num_seqs": 1}).wait_for("executor.attached")
    with httpx.Client(base_url=stack.gateway_url, timeout=60) as http:
        running = http.post("/api/v1/asample", json=SAMPLE).json()["request_id"]
        at_once = http.post("/v1/completions", json={**COMPLETION, "queue_timeout_s": 0.001})
        refused(at_once, 503)
        assert at_once.json()["error"]["code"] == "queue_timeout"
        named = {"idempotency-key": "again"}
        short = {**COMPLETION, "queue_timeout_s": 0.3}
        refused(http.post("/v1/completions", json=short, headers=named), 503)
        waiting = http.post("/api/v1/asample", json=SAMPLE).json()["request_id"]
        told = http.post("/api/v1/retrieve_future", json={"request_id": waiting})
        assert (told.status_code, told.headers["x-queue-status"]) == (408, "waiting")
        for request_id in (waiting, running):
            http.post("/api/v1/cancel_future", json={"request_id": request_id})
        served = http.post("/v1/completions", json={**COMPLETION, "queue_timeout_s": 20})
        assert served.status_code == 200
        served = http.post("/v1/completions", json=short, headers=named)
        assert served.status_code == 200, "who is told to try again may do so under the same key"
