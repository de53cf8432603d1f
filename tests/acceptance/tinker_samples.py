"""Takes samples with the tinker SDK of whatever Python runs it: a job on stdin, answers on stdout.

The SDKs keep threads and sockets that pytest would complain about, and one of the two versions
has an environment of its own; so they run outside.
"""

import asyncio
import contextlib
import json
import logging
import os
import sys
from typing import Any

with contextlib.suppress(ImportError):
    import mint  # noqa: F401  (patches the SDK to take MinT's keys)

import tinker
from tinker import types


def submit(client: Any, case: dict[str, Any]) -> Any:
    prompt = types.ModelInput.from_ints(case["prompt"])
    if case.get("is_scoring"):
        return client.compute_logprobs(prompt)
    return client.sample(
        prompt=prompt,
        num_samples=case.get("num_samples", 1),
        sampling_params=types.SamplingParams(**case["params"]),
    )


def outcome(future: Any) -> Any:
    try:
        return told(future.result())
    except tinker.TinkerError as error:
        return {"error": type(error).__name__, "message": str(error)}


def told(response: Any) -> Any:
    if isinstance(response, list):  # compute_logprobs
        return response
    return [
        {
            "tokens": sequence.tokens,
            "logprobs": sequence.logprobs,
            "stop_reason": sequence.stop_reason,
            "id": getattr(sequence, "sequence_id", None),  # since 0.28
        }
        for sequence in response.sequences
    ]


async def take_async(job: dict[str, Any]) -> list[Any]:
    """The same by the coroutines of the same clients, all at once."""
    service = tinker.ServiceClient()
    client = await service.create_sampling_client_async(base_model=job["model"])

    async def take(case: dict[str, Any]) -> Any:
        prompt = types.ModelInput.from_ints(case["prompt"])
        if case.get("is_scoring"):
            return await client.compute_logprobs_async(prompt)
        params = types.SamplingParams(**case["params"])
        return told(await client.sample_async(prompt, case["num_samples"], params))

    return await asyncio.gather(*map(take, job["cases"]))


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    job = json.load(sys.stdin)
    if job.get("is_async"):
        print(json.dumps(asyncio.run(take_async(job))))
        return
    try:
        client: Any = tinker.ServiceClient().create_sampling_client(base_model=job["model"])
        client = client.result() if hasattr(client, "result") else client
    except tinker.TinkerError as error:
        print(json.dumps({"error": type(error).__name__, "message": str(error)}))
        return
    futures = [submit(client, case) for case in job["cases"]]
    print(json.dumps([outcome(future) for future in futures]))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # the SDK's threads, which nobody can end, abort a shutdown once in a while
