"""Tokens through the house: mock executor -> scheduler -> gateway client, over real gRPC.

Three processes on loopback: a scheduler, a mock executor that makes tokens as fast as they are
taken, and this one, which uses the gateway's own client. First NUM_STREAMS streams at once, again
and again, for tokens/s and CPU microseconds per token; then one-token requests for requests/s.
Order and number of the tokens are checked, and the last one of each answer. Ends with one line of
JSON.
"""

import argparse
import asyncio
import itertools
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import uvloop

from bench.stack import Stack
from executor_svc.mock_engine import MockConfig
from executor_svc.mock_formulas import mock_tokens
from gateway_http.client import Finish, SchedulerClient, Tokens
from gateway_http.settings import GatewaySettings
from headway.v1 import generation_pb2

MODEL = "mock"
PROMPT = list(range(1, 65))


@dataclass(frozen=True, slots=True)
class Usage:
    """CPU seconds so far of the processes of the path, and the wall clock."""

    wall_s: float
    scheduler_s: float
    executor_s: float
    gateway_s: float

    @classmethod
    def now(cls, stack: Stack) -> "Usage":
        def cpu_s(pid: int) -> float:
            times = psutil.Process(pid).cpu_times()
            return float(times.user + times.system)

        executor_s = sum(cpu_s(process.pid) for process in stack.executors)
        return cls(time.monotonic(), cpu_s(stack.scheduler.pid), executor_s, cpu_s(os.getpid()))


def request_number(number: int, num_tokens: int) -> generation_pb2.GenerationRequest:
    return generation_pb2.GenerationRequest(
        model=MODEL,
        prompt_token_ids=PROMPT,
        sampling=generation_pb2.SamplingParams(max_tokens=num_tokens, seed=number),
    )


def expected_tokens(number: int, start: int, stop: int) -> list[int]:
    vocab_size = MockConfig().vocab_size
    return mock_tokens(PROMPT, seed=number, sample=0, start=start, stop=stop, vocab_size=vocab_size)


async def run_one(client: SchedulerClient, number: int, num_tokens: int) -> int:
    """Follow one request to its end and check what came; gives its number of tokens."""
    tokens: list[int] = []
    finish: Finish | None = None
    async with client.generate(request_number(number, num_tokens)) as generation:
        async for event in generation:
            if isinstance(event, Tokens):
                assert event.first_index == len(tokens)
                tokens.extend(event.token_ids)
            elif isinstance(event, Finish):
                finish = event
    assert finish is not None
    assert finish.error is None, finish.error
    assert len(tokens) == num_tokens
    assert tokens[-1:] == expected_tokens(number, num_tokens - 1, num_tokens)
    return len(tokens)


async def run_streams(
    client: SchedulerClient,
    numbers: Iterator[int],
    num_streams: int,
    num_tokens: int,
    duration_s: float,
) -> tuple[int, int]:
    """Keep ``num_streams`` requests going for ``duration_s``; gives (requests, tokens) done."""
    deadline = time.monotonic() + duration_s
    done = [0, 0]

    async def keep_going() -> None:
        while time.monotonic() < deadline:
            num_done = await run_one(client, next(numbers), num_tokens)
            done[0] += 1
            done[1] += num_done

    async with asyncio.TaskGroup() as group:
        for _ in range(num_streams):
            group.create_task(keep_going())
    return done[0], done[1]


async def measure(arguments: argparse.Namespace, stack: Stack) -> dict[str, float]:
    settings = GatewaySettings(scheduler_addresses=[stack.scheduler_address])
    numbers = itertools.count(1)
    figures: dict[str, float] = {}
    async with SchedulerClient(settings).running() as client:
        await run_streams(client, numbers, arguments.streams, 100, 1.0)
        print("warm; long answers", flush=True)

        before = Usage.now(stack)
        _, tokens = await run_streams(
            client, numbers, arguments.streams, arguments.tokens, arguments.seconds
        )
        after = Usage.now(stack)
        wall_s = after.wall_s - before.wall_s
        figures["tokens_per_s"] = round(tokens / wall_s)
        for name in ("scheduler", "gateway", "executor"):
            cpu_s = getattr(after, f"{name}_s") - getattr(before, f"{name}_s")
            figures[f"{name}_us_per_token"] = round(1e6 * cpu_s / tokens, 3)
            figures[f"{name}_cores"] = round(cpu_s / wall_s, 2)
        print(f"{tokens} tokens in {wall_s:.1f} s; one-token answers", flush=True)

        before = Usage.now(stack)
        requests, _ = await run_streams(client, numbers, arguments.streams, 1, arguments.seconds)
        after = Usage.now(stack)
        wall_s = after.wall_s - before.wall_s
        figures["requests_per_s"] = round(requests / wall_s)
        for name in ("scheduler", "gateway", "executor"):
            cpu_s = getattr(after, f"{name}_s") - getattr(before, f"{name}_s")
            figures[f"{name}_us_per_request"] = round(1e6 * cpu_s / requests, 1)
        print(f"{requests} requests in {wall_s:.1f} s", flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=256, help="streams at once")
    parser.add_argument("--tokens", type=int, default=1000, help="tokens of a long answer")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each part")
    arguments = parser.parse_args()
    executor = {"max_num_seqs": arguments.streams, "mock_step_ms": 0}
    with Stack.start(executor=executor, has_gateway=False) as stack:
        figures = uvloop.run(measure(arguments, stack))
    print(json.dumps({"bench": "relay", "streams": arguments.streams, **figures}))


if __name__ == "__main__":
    main()
