"""Streams to be continued: whole ones, their ids, and the way back."""

from typing import Any

import httpx

from headway.v1 import generation_pb2
from tests.gateway import tiny_model
from tests.gateway.scripted import ScriptedScheduler
from tests.gateway.scripted_runs import leave_alone


def way_back(response: httpx.Response) -> tuple[str, dict[str, str]]:
    """Where the rest of a stream is, and the header that it takes."""
    name = response.headers["x-headway-request-id"]
    state = response.headers["x-headway-resume"]
    return f"/v1/requests/{name}/events", {"x-headway-resume": state}


async def streamed(
    http: httpx.AsyncClient,
    scheduler: ScriptedScheduler,
    path: str,
    body: Any,
    *texts: str,
    key: str = "",
) -> httpx.Response:
    """A whole stream, one token at a time; a text for each choice, whose tokens take turns."""
    scheduler.script = leave_alone
    headers = {"Idempotency-Key": key} if key else {}
    num_samples = body.get("n", 1)
    num_before = len(scheduler.runs)
    async with http.stream("POST", path, json=body, headers=headers) as response:
        runs = [await scheduler.run(num_before + n) for n in range(len(texts) // num_samples)]
        sequences = [tiny_model.encode(text) for text in texts]
        for place in range(max(map(len, sequences))):
            for index, token_ids in enumerate(sequences):
                run, sample = runs[index // num_samples], index % num_samples
                if place < len(token_ids):
                    run.emit([token_ids[place]], sample)
                    scheduler.publish()
                if place == len(token_ids) - 1:
                    run.end(sample, reason=generation_pb2.FINISH_REASON_LENGTH)
                    scheduler.publish()
        for run in runs:
            run.finish()
        scheduler.publish()
        await response.aread()
    return response


def numbered(text: str) -> list[tuple[str, str]]:
    """The ids of a stream's events, and all that comes up to each of them."""
    blocks = text.split("\n\n")
    return [
        (block.splitlines()[0].removeprefix("id: "), "\n\n".join(blocks[: number + 1]) + "\n\n")
        for number, block in enumerate(blocks)
        if block.startswith("id: ")
    ]
