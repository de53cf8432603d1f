"""A scheduler that is told to stop: load balancers hear of it while what runs goes on."""

import json
import signal

import httpx

from bench.stack import Stack

STREAM = {"model": "mock", "prompt": [1, 2, 3], "max_tokens": 100_000, "stream": True}


def test_a_scheduler_that_shuts_down_is_no_place_for_new_work() -> None:
    executor = {"mock_max_context_tokens": 200_000}
    with Stack.start(executor=executor) as stack, httpx.Client(base_url=stack.gateway_url) as http:
        assert http.get("/ready").status_code == 200
        with http.stream("POST", "/v1/completions", json=STREAM, timeout=30) as stream:
            lines = stream.iter_lines()
            next(lines)
            stack.scheduler.signal(signal.SIGTERM)
            stack.scheduler.wait_for("drain.started")
            while (ready := http.get("/ready")).status_code == 200:  # it asks once a second
                pass
            assert (ready.status_code, ready.json()["reason"]) == (503, "scheduler_draining")
            assert http.get("/health").status_code == 200
            refused = http.post("/v1/completions", json={**STREAM, "stream": False})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            later = [next(lines) for _ in range(10)]
            events = [json.loads(x.removeprefix("data: ")) for x in later if x.startswith("data: ")]
            assert events
            assert all("choices" in event for event in events)
