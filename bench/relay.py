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

import uvloop

from bench.arguments import parser_of
from bench.figures import cpu_s
from bench.stack import Stack
from executor_svc.mock_engine import MockConfig
from executor_svc.mock_formulas import mock_tokens
from gateway_http.client import Finish, SchedulerClient, Tokens
from gateway_http.settings import GatewaySettings
from headway.v1 import generation_pb2

MODEL = "mock"
PROMPT = list(range(1, 65))
WARM_S = 1.0


@dataclass(frozen=True, slots=True)
class Usage:
    """The clock on the wall, and CPU seconds of the processes of the path, by their names."""

    wall_s: float
    cpu_s: dict[str, float]

    @classmethod
    def now(cls, stack: Stack) -> "Usage":
        processes = {
            "scheduler": cpu_s(stack.scheduler.pid),
            "gateway": cpu_s(os.getpid()),
            "executor": sum(cpu_s(process.pid) for process in stack.executors),
        }
        return cls(time.monotonic(), processes)

    @classmethod
    def since(cls, before: "Usage", stack: Stack) -> "Usage":
        now = cls.now(stack)
        processes = {name: used_s - before.cpu_s[name] for name, used_s in now.cpu_s.items()}
        return cls(now.wall_s - before.wall_s, processes)


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
    numbers, streams, seconds = itertools.count(1), arguments.streams, arguments.seconds
    async with SchedulerClient(settings).running() as client:
        await run_streams(client, numbers, streams, 100, min(WARM_S, seconds))
        print("warm; long answers", flush=True)

        before = Usage.now(stack)
        _, tokens = await run_streams(client, numbers, streams, arguments.tokens, seconds)
        used = Usage.since(before, stack)
        figures: dict[str, float] = {"tokens_per_s": round(tokens / used.wall_s)}
        for name, used_s in used.cpu_s.items():
            figures[f"{name}_us_per_token"] = round(1e6 * used_s / tokens, 3)
            figures[f"{name}_cores"] = round(used_s / used.wall_s, 2)
        print(f"{tokens} tokens in {used.wall_s:.1f} s; one-token answers", flush=True)

        before = Usage.now(stack)
        requests, _ = await run_streams(client, numbers, streams, 1, seconds)
        used = Usage.since(before, stack)
        figures["requests_per_s"] = round(requests / used.wall_s)
        for name, used_s in used.cpu_s.items():
            figures[f"{name}_us_per_request"] = round(1e6 * used_s / requests, 1)
        print(f"{requests} requests in {used.wall_s:.1f} s", flush=True)
    return figures


def main() -> None:
    parser = parser_of("bench.relay", __doc__)
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
