"""The steps of an executor at work: a stack is started, and some clients keep it busy.

Rule: each of NUM_CLIENTS asks again as soon as it is answered, with a random prompt of one of a few
lengths, for a random number of tokens. So prompts join while others decode, and kinds of steps
come again.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import httpx

from bench.stack import Stack

NUM_CLIENTS = 8
PROMPTS = (8, 16, 32, 64)
MIN_TOKENS, MAX_TOKENS = 4, 32
MODEL = "model"
_TELL_EVERY = 100
_LEAST_ID, _MOST_ID = 1, 200


def step_log(path: Path, engine: str, model: str, *, num_threads: int, num_requests: int) -> None:
    """Write the step log (executor_svc/step_log.py) of an executor that serves so many requests.

    ``engine`` is "mock", with steps of 5 ms, or "torch" with the ``model`` of this folder.
    """
    settings: dict[str, object] = {"step_log": path, "max_num_seqs": NUM_CLIENTS}
    if engine == "mock":
        settings |= {"mock_models": MODEL, "mock_step_ms": 5}
    else:
        settings |= {"model": model, "model_name": MODEL, "num_threads": num_threads}
    with Stack.start(engine=engine, executor=settings) as stack:
        asyncio.run(_keep_busy(stack.gateway_url, drawn(num_requests)))


@dataclass(frozen=True, slots=True)
class Ask:
    """One request."""

    prompt: list[int]
    num_tokens: int


def drawn(num_requests: int) -> list[Ask]:
    """The same ones each time."""
    random = Random(0)
    return [
        Ask(
            [random.randint(_LEAST_ID, _MOST_ID) for _ in range(random.choice(PROMPTS))],
            random.randint(MIN_TOKENS, MAX_TOKENS),
        )
        for _ in range(num_requests)
    ]


async def _keep_busy(url: str, asks: Iterable[Ask]) -> None:
    left = enumerate(asks, 1)

    async def keep_asking(client: httpx.AsyncClient) -> None:
        for number, ask in left:
            body = {"model": MODEL, "prompt": ask.prompt, "max_tokens": ask.num_tokens}
            answer = await client.post("/v1/completions", json={**body, "ignore_eos": True})
            usage = answer.raise_for_status().json()["usage"]
            assert usage["completion_tokens"] == ask.num_tokens, usage
            if number % _TELL_EVERY == 0:
                print(f"{number} requests", flush=True)

    async with httpx.AsyncClient(base_url=url, timeout=600) as client, asyncio.TaskGroup() as group:
        for _ in range(NUM_CLIENTS):
            group.create_task(keep_asking(client))
