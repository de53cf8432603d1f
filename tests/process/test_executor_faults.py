"""Executors that die, stand still or are there twice, at the moments that are awkward for it."""

import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from bench.stack import Stack

WAIT_S = 60.0
MODELS = {"mock_models": "a,b", "max_models": 1}


class Clients:
    """Each request is asked by a thread of its own."""

    def __init__(self, stack: Stack, pool: ThreadPoolExecutor) -> None:
        self._url, self._pool = stack.gateway_url, pool

    def ask(self, model: str, num_tokens: int = 2) -> "Future[httpx.Response]":
        body = {"model": model, "prompt": [1, 2, 3], "max_tokens": num_tokens}
        return self._pool.submit(
            httpx.post, f"{self._url}/v1/completions", json=body, timeout=WAIT_S
        )


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


def test_killed_in_a_load_another_one_loads_after_the_pause(pool: ThreadPoolExecutor) -> None:
    executor = {**MODELS, "mock_load_ms": 1_000}
    scheduler = {"executor_grace_ms": 100, "load_backoff_ms": 100}
    with Stack.start(executors=2, executor=executor, scheduler=scheduler) as stack:
        clients = Clients(stack, pool)
        asked = clients.ask("b")
        victim_id = stack.scheduler.wait_for("model.ordered")["executor_id"]
        victim = stack.executors[int(victim_id[-1]) - 1]
        victim.kill()
        assert clients.ask("a").result().status_code == 200
        assert asked.result().status_code == 200
        orders = [x for x in stack.scheduler.lines if x["event"] == "model.ordered"]
        assert [x["executor_id"] == victim_id for x in orders[:2]] == [True, False]


def test_a_load_that_kills_every_executor_ends_with_its_cause(pool: ThreadPoolExecutor) -> None:
    """As where memory does not suffice: each comes back, here under a new name."""
    executor = {**MODELS, "mock_load_ms": 60_000}
    scheduler = {"executor_grace_ms": 50, "load_backoff_ms": 50, "max_load_failures": 2}
    with Stack.start(executor=executor, scheduler=scheduler) as stack:
        clients = Clients(stack, pool)
        asked = clients.ask("b")
        start = 0
        for _ in range(2):
            stack.scheduler.wait_for("model.ordered", start=start)
            start = len(stack.scheduler.lines)
            stack.start_executor({"engine": "mock", **executor})
            stack.executors[-1].wait_for("executor.attached")
            stack.executors[-2].kill()
        answer = asked.result()
        assert answer.status_code == 503
        assert "lost while it loaded" in answer.json()["error"]["message"]
        assert clients.ask("a").result().status_code == 200


def test_killed_while_it_drains_its_work_goes_on_elsewhere(pool: ThreadPoolExecutor) -> None:
    executor = {"mock_step_ms": 20, "max_num_seqs": 4}
    with Stack.start(executors=2, executor=executor) as stack:
        clients = Clients(stack, pool)
        asked = [clients.ask("mock", 200) for _ in range(6)]
        with httpx.Client(base_url=stack.gateway_url) as http:

            def look() -> Any:
                return http.get("/monitor/data").json()

            def num_slots() -> dict[str, int]:
                return {one["url"]: one["slots_total"] for one in look()["backends"]}

            while look()["running"] < 6:
                pass
            stack.executors[0].signal(signal.SIGTERM)
            while num_slots()["executor-1"]:
                pass
            stack.executors[0].kill()
            assert [one.result().status_code for one in asked] == [200] * 6
        ends = [x["attempts"] for x in stack.scheduler.lines if x["event"] == "request.finished"]
        assert len(ends) == 6, "each request ended once"
        assert max(ends) > 1


def test_one_that_stands_still_in_a_load_is_replaced_and_taken_back(
    pool: ThreadPoolExecutor,
) -> None:
    executor = {**MODELS, "mock_load_ms": 500}
    # a machine that is busy besides may lose the other one, too
    scheduler = {"heartbeat_interval_ms": 100, "heartbeat_timeout_ms": 1_000, "max_attempts": 100}
    with Stack.start(executors=2, executor=executor, scheduler=scheduler) as stack:
        clients = Clients(stack, pool)
        asked = clients.ask("b")
        victim = stack.executors[
            int(stack.scheduler.wait_for("model.ordered")["executor_id"][-1]) - 1
        ]
        victim.signal(signal.SIGSTOP)
        try:
            assert asked.result().status_code == 200
        finally:
            start = len(stack.scheduler.lines)
            victim.signal(signal.SIGCONT)
        stack.scheduler.wait_for("executor.attached", start=start)
        again = [clients.ask(model) for model in "abab"]
        assert [one.result().status_code for one in again] == [200] * 4


def test_a_second_process_of_the_same_name_changes_nothing(pool: ThreadPoolExecutor) -> None:
    executor = {"executor_id": "same", "mock_step_ms": 5}
    with Stack.start(executor=executor) as stack:
        clients = Clients(stack, pool)
        twin = stack.start_executor({"engine": "mock", **executor})
        twin.wait_for("executor.attach_failed", lambda line: "Another process" in line["cause"])
        asked = [clients.ask("mock", 50) for _ in range(8)]
        assert [one.result().status_code for one in asked] == [200] * 8
        assert not [x for x in stack.scheduler.lines if x["event"] == "executor.lost"]
        stack.executors[0].kill()
        twin.wait_for("executor.attached")
        assert clients.ask("mock").result().status_code == 200
