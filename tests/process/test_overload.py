"""More work than the house holds: refused at the door, bounded in memory, two clocks."""

import asyncio
from collections.abc import Iterator

import httpx
import psutil
import pytest

from bench.stack import Stack

MODEL = "mock"
LIMIT = 100
BURST = 1000
ENDLESS = 30_000  # tokens: minutes of work


@pytest.fixture
def stack() -> Iterator[Stack]:
    with Stack.start(
        scheduler={"max_inflight": LIMIT, "log_level": "debug"},
        executor={"max_num_seqs": 8, "mock_step_ms": 5},
        gateway={"submit_timeout_s": 60, "header_timeout_s": 60},  # the machine may be busy
    ) as stack:
        yield stack


def body(num_tokens: int, **extra: object) -> dict[str, object]:
    return {"model": MODEL, "prompt": list(range(1, 50)), "max_tokens": num_tokens, **extra}


async def test_a_burst_ten_times_the_limit(stack: Stack) -> None:
    process = psutil.Process(stack.scheduler.pid)
    before = process.memory_info().rss
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=stack.gateway_url, limits=limits, timeout=60) as client:

        async def ask() -> httpx.Response:
            """Up to the head of the answer: nobody ends before everybody was answered."""
            wish = client.build_request("POST", "/v1/completions", json=body(ENDLESS, stream=True))
            return await client.send(wish, stream=True)

        responses = await asyncio.gather(*(ask() for _ in range(BURST)))
        statuses = [response.status_code for response in responses]
        assert (statuses.count(200), statuses.count(429)) == (LIMIT, BURST - LIMIT)
        for response in responses:
            if response.status_code == 429:
                assert int(response.headers["retry-after"]) >= 1
                assert response.headers["x-should-retry"] == "true"
                await response.aread()
                assert response.json()["error"]["code"] == "queue_full"
        grown = process.memory_info().rss - before
        for response in responses:
            await response.aclose()
        await asyncio.to_thread(finished, stack, LIMIT)
        served = await asyncio.gather(
            *(client.post("/v1/completions", json=body(60)) for _ in range(LIMIT))
        )
    assert [one.json()["usage"]["completion_tokens"] for one in served] == [60] * LIMIT
    assert grown < 64 << 20, f"the scheduler grew by {grown >> 20} MiB"


async def test_queue_timeout_and_execution_timeout_are_different_errors(stack: Stack) -> None:
    async with httpx.AsyncClient(base_url=stack.gateway_url, timeout=60) as client:

        async def ask(**settings: object) -> httpx.Response:
            return await client.post("/v1/completions", json=body(**settings))  # type: ignore[arg-type]

        # starts at once, so that only its execution can be too long (scenarios 73 and 74)
        too_long = await ask(num_tokens=1000, queue_timeout_s=30, execution_timeout_s=0.5)
        assert too_long.status_code == 504
        assert too_long.json()["error"]["code"] == "execution_timeout"
        assert too_long.headers["x-should-retry"] == "false"

        hogs = [asyncio.create_task(ask(num_tokens=ENDLESS)) for _ in range(8)]
        await asyncio.to_thread(granted, stack, 9)
        waiter = await ask(num_tokens=1, queue_timeout_s=0.5)
        assert waiter.status_code == 503
        assert waiter.json()["error"]["code"] == "queue_timeout"
        assert int(waiter.headers["retry-after"]) >= 1
        assert not any(hog.done() for hog in hogs), "evicted at its deadline, not when a seat frees"
        for hog in hogs:
            hog.cancel()
        await asyncio.gather(*hogs, return_exceptions=True)
        await asyncio.to_thread(finished, stack, 1 + 8 + 1)

        # a short queue limit harms nobody who is granted at once, however long that takes then
        served = await ask(num_tokens=1_000, queue_timeout_s=2)
        assert served.status_code == 200


def granted(stack: Stack, number: int) -> None:
    """Wait until the scheduler has logged so many grants."""
    wait_for(stack, "lease.granted", number)


def finished(stack: Stack, number: int) -> None:
    """Wait until the scheduler has logged so many ends."""
    wait_for(stack, "request.finished", number)


def wait_for(stack: Stack, event: str, number: int) -> None:
    lines = stack.scheduler.lines
    stack.scheduler.wait_for(event, lambda _: sum(x["event"] == event for x in lines) >= number)
