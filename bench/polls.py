"""What waiting Tinker clients cost: many outstanding samples behind a busy executor.

The tinker SDK keeps SAMPLES samples outstanding, a finished one being replaced by a new one. Polls
are counted where the SDK sends them. A sample's tokens are of a number of their own, by which its
delivery is matched with the scheduler's log of its end. Beside them a plain poller, in the manner
of a script that sleeps by itself, reads its place in the queue. Ends with one line of JSON.
"""

import argparse
import asyncio
import itertools
import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import httpx
import tinker
from tinker import types

from bench.arguments import parser_of
from bench.figures import cpu_s, percentile
from bench.stack import Stack

MODEL = "mock"
PROMPT = [1] * 64
PLAIN_PAUSE_S = 0.5
STEP_MS = 20
NUM_PARTS = 6  # progress


class PollCounter(logging.Handler):
    """Counts what the SDK's HTTP client logs, an answer a line."""

    def __init__(self) -> None:
        super().__init__()
        self.num_polls = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.num_polls += "/retrieve_future" in record.getMessage()

    def listen(self) -> None:
        logger = logging.getLogger("httpx")
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addHandler(self)


@dataclass(slots=True)
class Seen:
    """What clients have seen so far."""

    delivered_at: dict[int, float] = field(default_factory=dict)  # by number of tokens
    positions: list[int] = field(default_factory=list)  # of the plain poller
    num_plain_polls: int = 0


@dataclass(frozen=True, slots=True)
class Reading:
    """Counters at one moment."""

    wall_s: float
    num_polls: int
    gateway_s: float
    scheduler_s: float

    @classmethod
    def now(cls, stack: Stack, num_polls: int) -> "Reading":
        return cls(time.time(), num_polls, cpu_s(stack.gateway.pid), cpu_s(stack.scheduler.pid))


async def keep_sampling(sampler: Any, lengths: Iterator[int], seen: Seen, num_left: int) -> None:
    """One sample after the other."""
    for _ in range(num_left):
        num_tokens = next(lengths)
        answer = await sampler.sample(
            prompt=types.ModelInput.from_ints(PROMPT),
            num_samples=1,
            sampling_params=types.SamplingParams(max_tokens=num_tokens),
        )
        assert len(answer.sequences[0].tokens) == num_tokens
        assert num_tokens not in seen.delivered_at, "delivered twice"
        seen.delivered_at[num_tokens] = time.time()


async def poll_plainly(http: httpx.AsyncClient, num_tokens: int, seen: Seen) -> None:
    """Ask where a sample stands until it starts."""
    body = {
        "base_model": MODEL,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": PROMPT}]},
        "sampling_params": {"max_tokens": num_tokens},
    }
    future = (await http.post("asample", json=body)).raise_for_status().json()
    while True:
        answer = await http.post("retrieve_future", json={"request_id": future["request_id"]})
        seen.num_plain_polls += 1
        status = answer.json()
        if answer.status_code != 408 or status["queue_state"] != "waiting":
            return
        seen.positions.append(status["queue_position"])
        await asyncio.sleep(PLAIN_PAUSE_S)


async def measure(arguments: argparse.Namespace, stack: Stack) -> dict[str, object]:
    counter, seen = PollCounter(), Seen()
    counter.listen()

    def reading() -> Reading:
        return Reading.now(stack, counter.num_polls - seen.num_plain_polls)

    service = tinker.ServiceClient(base_url=stack.gateway_url, api_key="tml-bench")
    sampler = await service.create_sampling_client(base_model=MODEL)
    lengths = itertools.count(arguments.tokens)
    num_each = 1 if arguments.once else 1_000_000
    async with httpx.AsyncClient(base_url=f"{stack.gateway_url}/api/v1/") as http:
        tasks = [
            asyncio.create_task(keep_sampling(sampler, lengths, seen, num_each))
            for _ in range(arguments.samples)
        ]
        await asyncio.to_thread(wait_until_admitted, stack, arguments.samples)
        before = reading()
        plain = asyncio.create_task(poll_plainly(http, next(lengths), seen))
        print(f"{arguments.samples} samples are in the queue", flush=True)
        if arguments.once:
            await asyncio.gather(*tasks, plain)
        else:
            for part in range(1, NUM_PARTS + 1):
                await asyncio.sleep(arguments.seconds / NUM_PARTS)
                print(f"{part}/{NUM_PARTS}: {len(seen.delivered_at)} delivered", flush=True)
        after = reading()
        for task in (*tasks, plain):
            task.cancel()
        for outcome in await asyncio.gather(*tasks, plain, return_exceptions=True):
            if isinstance(outcome, Exception):  # and not the cancellation
                raise outcome
    return summary(arguments, stack, seen, before, after)


def wait_until_admitted(stack: Stack, number: int) -> None:
    def is_last(line: dict[str, Any]) -> bool:
        admitted = [x for x in stack.scheduler.lines if x["event"] == "request.admitted"]
        return len(admitted) >= number

    stack.scheduler.wait_for("request.admitted", is_last)


def summary(
    arguments: argparse.Namespace, stack: Stack, seen: Seen, before: Reading, after: Reading
) -> dict[str, object]:
    wall_s = after.wall_s - before.wall_s
    delays = sorted(delays_ms(stack, seen))
    return {
        "bench": "polls",
        "samples": arguments.samples,
        "seconds": round(wall_s, 1),
        "sdk_polls": after.num_polls,
        "sdk_polls_per_s": round((after.num_polls - before.num_polls) / wall_s, 2),
        "gateway_cores": round((after.gateway_s - before.gateway_s) / wall_s, 4),
        "scheduler_cores": round((after.scheduler_s - before.scheduler_s) / wall_s, 4),
        "delivered": len(delays),
        "delay_ms_p50": round(percentile(delays, 0.5), 1),
        "delay_ms_p99": round(percentile(delays, 0.99), 1),
        "plain_polls": seen.num_plain_polls,
        "plain_positions": [seen.positions[0], seen.positions[-1]] if seen.positions else [],
        "plain_positions_rose": sum(b > a for a, b in itertools.pairwise(seen.positions)),
    }


def delays_ms(stack: Stack, seen: Seen) -> Iterator[float]:
    """From the scheduler's line about a sample's end to its result in the caller's hands."""
    for line in stack.scheduler.lines:
        delivered_at = seen.delivered_at.get(line.get("num_tokens", -1))
        if line["event"] == "request.finished" and delivered_at is not None:
            ended_at = datetime.fromisoformat(line["timestamp"]).timestamp()
            yield 1000 * (delivered_at - ended_at)


def main() -> None:
    parser = parser_of("bench.polls", __doc__)
    parser.add_argument("--samples", type=int, default=200, help="outstanding at once")
    parser.add_argument("--slots", type=int, default=16, help="samples that run at once")
    parser.add_argument("--tokens", type=int, default=400, help="of the shortest sample")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of the measurement")
    parser.add_argument("--once", action="store_true", help="replace none; measure to the last")
    arguments = parser.parse_args()
    executor = {"max_num_seqs": arguments.slots, "mock_step_ms": STEP_MS}
    with Stack.start(scheduler={"log_level": "debug"}, executor=executor) as stack:
        figures = asyncio.run(measure(arguments, stack))
    print(json.dumps(figures), flush=True)
    os._exit(0)  # the SDK's threads would go on asking


if __name__ == "__main__":
    main()
